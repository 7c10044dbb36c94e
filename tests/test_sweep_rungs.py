"""Early stopping by rungs: against brute force, across restarts, and in real sweeps with Ray; what is then chosen."""

import json
import math
import random
import shutil
from collections import Counter
from dataclasses import replace

import pytest

from fastbp import DecorrelatedBP, LayerDropBack
from fastbp.record import EpochRecord, RunRecord, SweepRecord, read_records
from sweep_files import TOY, ended, invoke, plan_of
from sweeps.choose import chosen_trials
from sweeps.ledger import Ledger
from sweeps.mlflow_tree import Tree
from sweeps.pilot import EpochCost
from sweeps.rungs import Ladder, RungScheduler, arm_period, make_ladders, seconds_alone
from sweeps.source import SweepError
from sweeps.spec import RungsPart

EXAMPLES = 100  # per epoch, in the simulations


def epoch_of(key, done, accuracy, flops=None, seconds=0.0):
    return EpochRecord(
        run_key=key,
        epoch=done - 1,
        examples=EXAMPLES * done,
        val_accuracy=accuracy,
        flops_executed=flops,
        train_seconds=seconds,
    )


def slow_reason(part, period, events, now):
    """Whether the newest of the (run, epochs, amount, accuracy) events up to `now` is to be stopped: from scratch."""
    run, _, amount, _ = events[now]

    def entry(of, rung):
        """The accuracy with which a run stands on a rung: at the first epoch at which it could be looked at."""
        return next(
            (
                accuracy
                for other, done, reached, accuracy in events[: now + 1]
                if other == of
                and done % period == 0
                and done >= part.grace_epochs
                and reached >= part.first * part.factor**rung
            ),
            None,
        )

    earlier = [e for e in events[:now] if e[0] == run and e[1] % period == 0 and e[1] >= part.grace_epochs]
    if events[now][1] % period or events[now][1] < part.grace_epochs:
        return False
    for rung in range(30):
        at = part.first * part.factor**rung
        if amount >= at and not any(e[2] >= at for e in earlier):  # newly reached
            there = sorted((v for r in {e[0] for e in events} if (v := entry(r, rung)) is not None), reverse=True)
            kept = max(1, int(part.share * len(there) + 1e-9))
            if entry(run, rung) < there[kept - 1]:
                return True
    return False


def race(rng, scheduler, arms, epochs, seconds=None):
    """Trials of all arms in random turns, as Tune hears of them; returns arm, run, epochs, amount, accuracy, end."""
    live = {f"{arm}{i}": (arm, 0) for arm in arms for i in range(12)}
    events = []
    while live:
        key = rng.choice(sorted(live)[:4])  # four at a time
        arm, done = live[key]
        done, accuracy = done + 1, round(rng.random(), 1)  # ties happen
        if done == epochs:
            del live[key]
            continue
        flops = None if seconds is None else EXAMPLES * done * seconds[key]
        record = epoch_of(key, done, accuracy, flops, seconds=rng.random() * 1e6)
        stopped = scheduler.decide(arm, record) != ""
        amount = float(EXAMPLES * done) if flops is None else flops * scheduler.ladders[arm].cost.seconds_per_example
        events.append((arm, key, done, amount, accuracy, stopped))
        live[key] = (arm, done)
        if stopped:
            del live[key]
    return events


@pytest.mark.parametrize("unit", ["examples", "seconds"])
@pytest.mark.parametrize("seed", range(20))
def test_decisions_are_those_of_successive_halving_done_from_scratch(seed, unit):
    rng = random.Random(seed)
    part = RungsPart(
        unit=unit,
        first=rng.choice([50.0, 100.0, 250.0]),
        factor=rng.choice([2.0, 3.0]),
        keep=rng.choice([None, 0.5, 0.34]),
        grace_epochs=rng.choice([0, 1, 3]),
    )
    period = {"a": 1, "b": 2, "c": 3}
    keys = [f"{arm}{i}" for arm in period for i in range(12)]
    cost = EpochCost(2.0, 1.0) if unit == "seconds" else None
    relative = {key: rng.choice([0.25, 0.5, 1.0]) for key in keys} if cost else None
    scheduler = RungScheduler({arm: Ladder(part, n, cost) for arm, n in period.items()})
    events = race(rng, scheduler, period, 20, relative)
    for arm, n in period.items():
        own = [(key, done, amount, accuracy) for a, key, done, amount, accuracy, _ in events if a == arm]
        made = [stopped for a, *_, stopped in events if a == arm]
        for i, stopped in enumerate(made):
            assert stopped == slow_reason(part, n, own, i), (
                f"arm {arm}: {own[i]} was {'' if stopped else 'not '}stopped"
            )
    assert any(e[-1] for e in events), "nothing was ever stopped"
    assert not all(e[-1] for e in events if e[2] == 6), "nothing ever went on"


def run_of(plan, arm, lr, status, **more):
    config = plan.search_run(next(a for a in plan.arms if a.name == arm), {"recipe.lr": lr})
    return replace(ended(config, status=status, val=more.pop("val", None)), **more)


def test_after_a_restart_decisions_continue_as_if_nothing_had_happened(tmp_path):
    """Every prefix of a race, told as records to a new scheduler, leads to the same rest."""
    plan, part = plan_of(tmp_path), RungsPart(first=100.0, factor=2.0, keep=0.5, grace_epochs=1)

    def fresh():
        return RungScheduler({"bp": Ladder(part), "ldb": Ladder(part, 2)})

    events = race(random.Random(3), fresh(), ["bp", "ldb"], 9)
    for cut in range(0, len(events), 7):
        records = []
        for arm, key, done, _, accuracy, stopped in events[:cut]:
            if done == 1:
                records.append(replace(run_of(plan, arm, 0.1, "running"), run_key=key))
            records.append(epoch_of(key, done, accuracy))
            if stopped:
                records.append(replace(run_of(plan, arm, 0.1, "stopped"), run_key=key))
        scheduler = fresh()
        scheduler.restore_from(records)
        for arm, key, done, _, accuracy, stopped in events[cut:]:
            reason = scheduler.decide(arm, epoch_of(key, done, accuracy))
            assert (reason != "") == stopped, (
                f"after a restart at {cut}, {key} at epoch {done} was decided on otherwise"
            )


def test_a_run_that_has_to_start_anew_is_not_asked_for_a_rung_that_it_passed_and_counts_once(tmp_path):
    plan = plan_of(tmp_path)
    records = [replace(run_of(plan, "bp", 0.1, "running"), run_key="first"), epoch_of("first", 1, 0.3)]
    records += [replace(run_of(plan, "bp", 0.1, "running"), run_key="second"), epoch_of("second", 1, 0.9)]
    scheduler = RungScheduler({"bp": Ladder(RungsPart(first=100.0))})
    scheduler.restore_from(records)
    assert scheduler.decide("bp", epoch_of("first", 1, 0.3)) == "", "a rung that was passed was asked for again"
    reason = scheduler.decide("bp", epoch_of("third", 1, 0.2))
    assert reason == "rung 1 at 100 examples: val accuracy 0.2 is not among the best 1 of 3", f"{reason!r}"


def test_arms_do_not_compete_and_the_first_and_the_equal_go_on():
    scheduler = RungScheduler({"bp": Ladder(RungsPart(first=100.0)), "ldb": Ladder(RungsPart(first=100.0))})
    assert scheduler.decide("bp", epoch_of("a", 1, 0.9)) == ""
    assert scheduler.decide("ldb", epoch_of("b", 1, 0.1)) == "", "the first of its arm was stopped"
    assert scheduler.decide("ldb", epoch_of("c", 1, 0.1)) == "", "an equal was stopped"
    assert scheduler.decide("ldb", epoch_of("d", 1, 0.05)) != "", "the worst of three went on"
    assert scheduler.decide("other", epoch_of("e", 1, 0.0)) == "", "an arm without rungs was stopped"


@pytest.mark.parametrize("accuracy", [None, math.nan, math.inf])
def test_an_epoch_without_a_finite_accuracy_is_no_rung(accuracy):
    scheduler = RungScheduler({"bp": Ladder(RungsPart(first=100.0))})
    assert scheduler.decide("bp", epoch_of("a", 1, accuracy)) == ""
    assert scheduler.ladders["bp"].values == [], f"{accuracy} stands on a rung"


def test_seconds_are_the_pilots_times_the_trials_flops_and_never_its_own():
    cost = EpochCost(seconds_per_example=0.5, flops_per_example=10.0)
    for own in (0.0, 1e9):
        assert seconds_alone(cost, epoch_of("a", 2, 0.5, flops=20.0 * 200, seconds=own)) == 200.0, (
            "twice the FLOPs, twice the time"
        )
        assert seconds_alone(cost, epoch_of("a", 2, 0.5, seconds=own)) == 100.0, "unknown FLOPs: the pilot's"
    ladder = Ladder(RungsPart(unit="seconds", first=150.0), 1, cost)
    assert ladder.climb(epoch_of("cheap", 2, 0.5, flops=10.0 * 200)) == [], "100 s are no 150 s"
    assert ladder.climb(epoch_of("dear", 2, 0.5, flops=20.0 * 200)) == [0]


def test_rungs_lie_at_whole_periods_of_everything_that_the_arm_may_be(tmp_path):
    assert DecorrelatedBP(inner=LayerDropBack(every_epochs=3)).epoch_period == 3
    text = TOY.replace("epochs: 2,", "epochs: 40, eval_every_epochs: 4,")
    text = text.replace("drop_rate: search", "every_epochs: search").replace(", epochs: 1}", "}")
    plan = plan_of(tmp_path, text)
    periods = [arm_period(arm) for arm in plan.arms]
    assert periods == [4, math.lcm(2, 3, 4)], f"periods are {periods}"
    part = RungsPart(first=150.0, factor=2.0, grace_epochs=5)
    ladders = make_ladders(part, plan.arms, {})
    looks = {arm: ladder.epochs(EXAMPLES, 40) for arm, ladder in ladders.items()}
    assert looks == {"bp": [8, 12, 24], "ldb": [12, 24]}, f"{looks}"
    for arm, ladder in ladders.items():
        seen = [done for done in range(1, 40) if ladder.climb(epoch_of("x", done, 0.5))]
        assert seen == looks[arm], f"planned {looks[arm]}, looked at {seen}"


SEARCH = "search: {trials: 3, epochs: 1}"


@pytest.mark.parametrize(
    ("search", "measure", "message"),
    [
        (
            "objectives: [val_accuracy, flops], rungs: {first: 100}",
            "",
            "toy.yaml:7: search.rungs need one objective",
        ),
        (
            "",
            "settings: 2, ",
            "toy.yaml:8: measure.settings = 2: several settings of an arm are points of its trade-off",
        ),
        ("objectives: [flops]", "", "toy.yaml:7: search.objectives = ['flops']: expected [val_accuracy] or"),
        ("rungs: {unit: minutes, first: 1}", "", "toy.yaml:7: search.rungs.unit = 'minutes': input should be"),
        ("rungs: {first: 100, keep: 1.5}", "", "toy.yaml:7: search.rungs.keep = 1.5: input should be less than 1"),
        ("rungs: {first: 100, factor: 1}", "", "toy.yaml:7: search.rungs.factor = 1: input should be greater than 1"),
        ("rungs: {frist: 100}", "", "unknown key 'frist' in search.rungs; did you mean first?"),
        ("rungs: {factor: 2}", "", "toy.yaml:7: missing key 'first' in search.rungs"),
        (
            "rungs: {first: 100000}",
            "",
            "toy.yaml:7: search.rungs: arm bp has no rung before its end: its trials have 1 ",
        ),
    ],
)
def test_a_file_that_cannot_work_is_refused_where_it_says_so(tmp_path, search, measure, message):
    text = TOY.replace("epochs: 1}", f"epochs: 1, {search}}}").replace("{seeds", f"{{{measure}seeds")
    with pytest.raises(SweepError) as refused:
        plan_of(tmp_path, text)
    assert message in str(refused.value), str(refused.value)


def trials_of(plan, rows):
    """Search trials (accuracy, FLOPs, status) of the arm `ldb`."""
    arm = plan.arms[1]
    return [
        ended(plan.search_run(arm, {"recipe.lr": 0.01 + i * 1e-4}), val=val, flops=flops, status=status)
        for i, (val, flops, status) in enumerate(rows)
    ]


def area_by_counting(points, limit):
    """Dominated area where accuracies are tenths and FLOPs whole: the number of cells."""
    cells = [(x, y) for x in range(limit) for y in range(10)]
    return sum(any(flops <= x and round(acc * 10) > y for acc, flops in points) for x, y in cells)


@pytest.mark.parametrize("seed", range(10))
def test_further_settings_are_on_the_front_and_add_the_most_area(tmp_path, seed):
    rng, plan = random.Random(seed), plan_of(tmp_path)
    rows = [
        (rng.randint(1, 10) / 10, rng.randint(1, 12), rng.choice(["finished"] * 3 + ["stopped"])) for _ in range(12)
    ]
    trials = trials_of(plan, [*rows, (0.99, 1, "stopped"), (None, 1, "diverged"), (0.99, 0, "failed")])
    full = [(r.val_accuracy, int(r.flops_executed)) for r in trials if r.status == "finished"]
    limit = max(flops for _, flops in full)
    for most in (1, 2, 3):
        chosen = chosen_trials(trials, most)
        assert {r.status for r in chosen} == {"finished"}, "a trial without its full budget was chosen"
        points = [(r.val_accuracy, int(r.flops_executed)) for r in chosen]
        assert points[0][0] == max(acc for acc, _ in full), f"{points[0]} is not the most accurate of {full}"
        for i in range(1, len(points)):
            best = max(area_by_counting([*points[:i], p], limit) for p in full)
            assert area_by_counting(points[: i + 1], limit) == best, f"{points[i]} adds less than another of {full}"
        for acc, flops in points if most > 1 else ():
            better = [p for p in full if p[0] >= acc and p[1] <= flops and p != (acc, flops)]
            assert not better, f"{(acc, flops)} is dominated by {better}"


def test_a_stopped_trial_is_never_the_best(tmp_path):
    plan = plan_of(tmp_path)
    ledger = Ledger.of(trials_of(plan, [(0.99, 1.0, "stopped"), (0.5, 9.0, "finished")]))
    assert ledger.best_trial("ldb").val_accuracy == 0.5
    assert plan.chosen(plan.arms[1], ledger) == {"recipe.lr": 0.0101, "method.drop_rate": 0.5}


TWO = TOY.replace("epochs: 1}", "epochs: 1, objectives: [val_accuracy, flops]}").replace(
    "{seeds", "{settings: 2, seeds"
)


def test_several_settings_are_measured_beside_their_own_controls_and_stand(tmp_path):
    plan = plan_of(tmp_path, TWO)
    bp, ldb = plan.arms
    rows = [(0.5, 2.0), (0.9, 9.0), (0.8, 4.0), (0.7, 8.0)]
    ledger = Ledger()
    for i, (val, flops) in enumerate(rows):
        ledger.add(ended(plan.search_run(bp, {"recipe.lr": 0.1 + i / 100}), val=val, flops=9.0))
        values = {"recipe.lr": 0.1 + i / 100, "method.drop_rate": (2 + i) / 10}
        ledger.add(ended(plan.search_run(ldb, values), val=val, flops=flops))
    runs = plan.measure_runs(ledger)
    found = Counter((r.arm, r.role, getattr(r.method, "drop_rate", None)) for r in runs)
    assert found == {
        ("bp", "baseline", None): 3,
        ("ldb", "method", 0.3): 3,
        ("ldb", "control", 0.3): 3,
        ("ldb", "method", 0.4): 3,
        ("ldb", "control", 0.4): 3,
    }, f"cells are {found}"
    ledger.add(ended(next(r for r in runs if r.role == "method" and r.method.drop_rate == 0.4)))
    ledger.add(ended(plan.search_run(ldb, {"recipe.lr": 0.3, "method.drop_rate": 0.6}), val=0.85, flops=1.0))
    rates = [values["method.drop_rate"] for values in plan.chosen_settings(ldb, ledger)]
    assert rates == [0.3, 0.4], f"a measured setting was given up: {rates}"


def test_mlflow_shows_every_setting_of_an_arm_as_a_cell_of_its_own(tmp_path):
    plan = plan_of(tmp_path, TWO)
    ldb = plan.arms[1]
    rows = [({"recipe.lr": 0.1, "method.drop_rate": rate}, seed) for seed in (0, 1) for rate in (0.3, 0.4)]
    runs = [replace(plan.cells(ldb, values)[0], seed=seed) for values, seed in rows]
    trials = [plan.search_run(ldb, values) for values, _ in rows[:2]]
    tree = Tree.of([ended(run) for run in [*trials, *runs]])
    sizes = {name: len(cell) for name, cell in tree.cells.items()}
    assert sizes == {"search ldb": 2, "ldb": 2, "ldb 2": 2}, f"cells are {sizes}"
    rates = {name: {h.run.method["drop_rate"] for h in cell} for name, cell in tree.cells.items()}
    assert (rates["ldb"], rates["ldb 2"]) == ({0.3}, {0.4}), f"cells mix settings: {rates}"
    assert list(tree.changed_cells()) == ["search ldb", "ldb", "ldb 2"], f"{list(tree.changed_cells())}"


def test_settings_that_share_their_control_measure_it_once(tmp_path):
    text = TWO.replace("ldb: {method: ldb, drop_rate: search}", "ldb: {method: ddg, modules: {choice: [2, 3]}}")
    text = text.replace("model: mlp, model_args: {depth: 2, width: 8}", "model: resnet_tiny")
    plan = plan_of(tmp_path, text.replace("lr: {log_uniform: [0.01, 0.5]}", "lr: 0.1"))
    ledger = Ledger.of(
        [
            ended(plan.search_run(plan.arms[0], {}), flops=9.0),
            *(ended(plan.search_run(plan.arms[1], {"method.modules": n}), val=n / 10, flops=float(n)) for n in (2, 3)),
        ]
    )
    found = Counter((r.arm, r.role) for r in plan.measure_runs(ledger))
    assert found == {("bp", "baseline"): 3, ("ldb", "method"): 6, ("ldb", "control"): 3}, f"cells are {found}"


RUNGS = """\
name: rungs
task: {data: digits, model: mlp, model_args: {depth: 2, width: 8}, data_args: {limit: 128}}
recipe: {epochs: 6, batch_size: 64, lr: {log_uniform: [0.0001, 0.5]}}
arms:
  bp: {method: bp}
  ldb: {method: ldb, drop_rate: search}
search: {sampler: tpe, trials: 5, checkpoint_epochs: 1, rungs: {unit: seconds, first: 1.0e-9, factor: 1000000}}
measure: {seeds: [0, 1, 2], threads: 1, controls: false}
"""
NSGA2 = """\
name: nsga2
task: {data: digits, model: mlp, model_args: {depth: 2, width: 8}, data_args: {limit: 128}}
recipe: {epochs: 2, batch_size: 64, lr: {log_uniform: [0.05, 0.5]}}
arms:
  bp: {method: bp}
  both:
    method: dbp
    inner: {method: ldb, drop_rate: search}
    recipe: {epochs: {choice: [1, 9]}}
search: {sampler: nsga2, trials: 6, objectives: [val_accuracy, flops]}
measure: {seeds: [0], settings: 2, threads: 1, controls: false}
"""


def records_in(out):
    return list(read_records(out / "records.jsonl"))


@pytest.fixture(scope="module")
def rungs(ray, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rungs")
    (folder / "rungs.yaml").write_text(RUNGS)
    return folder, invoke(folder, "run", "rungs.yaml", "--no-mlflow")


def check_stops(records, period):
    """Every stop in records files was right at its time, and none was left out."""
    arms, seen, ended_as = {}, {}, {}
    for record in records:
        if isinstance(record, RunRecord) and record.phase == "search":
            arms[record.run_key] = record.arm
            ended_as[record.run_key] = record
    for record in records:
        arm = arms.get(record.run_key) if isinstance(record, EpochRecord) else None
        if arm is not None and record.epoch + 1 == period[arm]:  # the only rung
            known = seen.setdefault(arm, {})
            known[record.run_key] = record.val_accuracy
            better = sum(v > record.val_accuracy for v in known.values())
            end = ended_as[record.run_key]
            expected = "finished" if better < max(1, int(len(known) * 1e-6)) else "stopped"
            assert end.status == expected, f"{arm}: {record.val_accuracy} among {known} ended as {end.status}"
            assert end.epochs_done == (6 if expected == "finished" else period[arm]), f"{end}"


@pytest.mark.long
@pytest.mark.slow
def test_a_real_sweep_stops_laggards_and_measures_full_trials(rungs):
    folder, result = rungs
    assert result.exit_code == 0, result.output
    out = folder / "fastbp-runs" / "rungs"
    records = records_in(out)
    ends = Ledger.of(records).of_phase("search")
    counts = Counter((r.arm, r.status in ("finished", "stopped")) for r in ends)
    assert counts == {("bp", True): 5, ("ldb", True): 5}, f"budgets are {counts}"
    assert {r.status for r in ends} == {"finished", "stopped"}, "nothing was stopped, or everything"
    check_stops(records, {"bp": 1, "ldb": 2})
    for run in ends:
        if run.status == "stopped":
            assert run.reason.startswith("rung 1 at 1e-09 seconds: val accuracy 0."), run.reason
            assert run.reason in result.output, result.output
            last = [r for r in records if isinstance(r, EpochRecord) and r.run_key == run.run_key][-1]
            assert (run.val_accuracy, run.examples, run.train_seconds) == (
                last.val_accuracy,
                last.examples,
                last.train_seconds,
            ), "the end of a stopped run is not its last epoch"
            assert run.test_accuracy is None, "a stopped run looked at the test split"
    finished = {json.dumps([r.method, r.recipe]) for r in ends if r.status == "finished"}
    measured = [r for r in Ledger.of(records).of_phase("measure")]
    assert len(measured) == 6, f"{len(measured)} measured runs"
    assert {json.dumps([r.method, r.recipe]) for r in measured} <= finished, "a stopped setting was measured"
    assert sorted(json.loads((out / "pilots.json").read_text())) == ["bp", "ldb"]
    sweep = next(r for r in records if isinstance(r, SweepRecord))
    assert sweep.config["sampler"]["class"] == "TPESampler", f"{sweep.config}"


@pytest.mark.long
@pytest.mark.slow
def test_the_samplers_log_agrees_with_the_records(rungs):
    folder, _ = rungs
    out = folder / "fastbp-runs" / "rungs"
    events = [json.loads(line) for line in (out / "search.jsonl").read_text().splitlines()]
    told = {e["run_key"]: e["state"] for e in events if e["event"] == "tell"}
    states = {"finished": "COMPLETE", "stopped": "PRUNED"}
    assert told == {r.run_key: states[r.status] for r in Ledger.of(records_in(out)).of_phase("search")}
    asked = [(e["arm"], e["trial"]) for e in events if e["event"] == "ask"]
    assert sorted(asked) == [(arm, i) for arm in ("bp", "ldb") for i in range(5)], f"asked {asked}"


@pytest.mark.long
@pytest.mark.slow
def test_the_report_counts_stopped_trials_and_has_none_on_its_front(rungs):
    folder, result = rungs
    out = folder / "fastbp-runs" / "rungs"
    stopped = sum(r.status == "stopped" for r in Ledger.of(records_in(out)).runs.values())
    assert f"{stopped} stopped" in result.output or "stopped" in (out / "report" / "report.md").read_text()
    tables = {path.stem: json.loads(path.read_text()) for path in (out / "report" / "tables").glob("*.json")}
    assert tables, "the report has no tables"
    status = invoke(folder, "status", "rungs.yaml")
    assert status.exit_code == 0, status.output
    assert "stopped" in status.output, status.output


@pytest.mark.long
@pytest.mark.slow
def test_started_again_nothing_is_repeated_and_a_cut_search_goes_on_by_the_same_rungs(rungs, tmp_path):
    folder, _ = rungs
    before = records_in(folder / "fastbp-runs" / "rungs")
    again = invoke(folder, "run", "rungs.yaml", "--no-mlflow", "--no-report")
    assert again.exit_code == 0, again.output
    assert "pilot:" not in again.output, "a complete sweep was piloted again"
    assert records_in(folder / "fastbp-runs" / "rungs") == before, "a complete sweep ran something again"

    out = tmp_path / "cut"  # as a killed driver leaves it: three trials ended, another one in its second epoch
    out.mkdir()
    shutil.copy(folder / "fastbp-runs" / "rungs" / "pilots.json", out)
    lines = (folder / "fastbp-runs" / "rungs" / "records.jsonl").read_text().splitlines(keepends=True)
    parsed = [json.loads(line) for line in lines]
    third = [i for i, p in enumerate(parsed) if p["kind"] == "run" and p["status"] != "running"][2]
    (out / "records.jsonl").write_text("".join(lines[: third + 1]) + lines[third + 1][:40])
    kept = {p["run_key"] for p in parsed[: third + 1] if p["kind"] == "run" and p["status"] != "running"}
    rest = invoke(folder, "run", "rungs.yaml", "--out", str(out), "--no-mlflow", "--no-report")
    assert rest.exit_code == 0, rest.output
    records = records_in(out)
    ends = Ledger.of(records).of_phase("search")
    assert Counter(r.arm for r in ends) == {"bp": 5, "ldb": 5}, f"budgets are {Counter(r.arm for r in ends)}"
    assert all(r.status in ("finished", "stopped") for r in ends), f"{[r.status for r in ends]}"
    assert not any(r.attempt for r in ends if r.run_key in kept), "an ended trial was repeated"
    check_stops(records, {"bp": 1, "ldb": 2})


@pytest.mark.long
@pytest.mark.slow
def test_a_real_sweep_with_two_objectives_measures_points_of_the_trade_off(ray, tmp_path):
    (tmp_path / "nsga2.yaml").write_text(NSGA2)
    result = invoke(tmp_path, "run", "nsga2.yaml")
    assert result.exit_code == 0, result.output
    out = tmp_path / "fastbp-runs" / "nsga2"
    ledger = Ledger.of(records_in(out))
    ends = ledger.of_phase("search")
    assert Counter((r.arm, r.status) for r in ends) == {("bp", "finished"): 6, ("both", "finished"): 6}
    assert all(r.flops_executed for r in ends), "a trial has no count of FLOPs"
    own = [r for r in ends if r.arm == "both"]
    settings = [(r.method, r.recipe) for r in chosen_trials(own, 2)]
    epochs = [recipe["epochs"] for _, recipe in settings]
    assert epochs == [9, 1], f"nine epochs are more accurate than one, and dearer: {epochs}"
    measured = {json.dumps((r.method, r.recipe)) for r in ledger.of_phase("measure") if r.arm == "both"}
    assert measured == {json.dumps(s) for s in settings}, f"measured {measured}"
    front = json.loads((out / "report" / "tables" / "pareto.json").read_text())
    assert len([row for row in front["rows"] if "both" in row["arm"]]) == len(settings), f"{front}"
    again = invoke(tmp_path, "run", "nsga2.yaml", "--no-report")
    assert again.exit_code == 0, again.output
    assert len(Ledger.of(records_in(out)).runs) == len(ledger.runs), "a complete sweep went on"
