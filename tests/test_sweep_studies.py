"""The searches: equal budgets, what samplers are told, and continuing after a stop."""

import json
import math
from collections import Counter

import pytest
from optuna.trial import TrialState
from ray.tune.search import Searcher

from sweep_files import TOY, ended, plan_of
from sweeps.ledger import Ledger
from sweeps.samplers import LEARNING
from sweeps.searcher import ArmSearcher, ListSearcher
from sweeps.source import SweepError
from sweeps.stopping import Stop
from sweeps.studies import ArmStudy, search_log

SAMPLERS = ["tpe", "nsga2", "random", "qmc", "grid"]
BOTH = ("val_accuracy", "flops")


def make_trial(run, attempt):
    return {"run": run.to_dict(), "attempt": attempt}


def studies_of(plan, sampler="tpe", trials=3):
    return [ArmStudy(arm, sampler, trials, 0, plan.search_run) for arm in plan.arms]


COMBINED = TOY.replace(
    "ldb: {method: ldb, drop_rate: search}",
    "both: {method: dbp, decor_lr: search, inner: {method: ldb, drop_rate: search, every_epochs: {choice: [2, 3]}}}",
)


def drive(searcher, result, stop_after=None):
    """Play Tune, one trial at a time; returns the suggested configs in order."""
    configs = []
    while stop_after is None or len(configs) < stop_after:
        config = searcher.suggest(f"t{len(configs)}")
        if config == Searcher.FINISHED:
            break
        assert config is not None, "nothing is running, yet the searcher waits"
        configs.append(config)
        outcome = result(config)
        if outcome is None:
            searcher.on_trial_complete(f"t{len(configs) - 1}", error=True)
        else:
            searcher.on_trial_complete(f"t{len(configs) - 1}", result=outcome)
    return configs


def finished(config):
    return {"end/status": "finished", "val_accuracy": config["run"]["recipe"]["lr"]}


def keys(configs):
    return [(c["run"]["arm"], c["run"]["recipe"]["lr"], c["run"]["method"].get("drop_rate")) for c in configs]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_arm_gets_the_same_number_of_trials_in_turn(tmp_path, sampler):
    plan = plan_of(tmp_path)
    trials = 4
    searcher = ArmSearcher(studies_of(plan, sampler, trials), Ledger(), make_trial, retries=0)
    arms = [config["run"]["arm"] for config in drive(searcher, finished)]
    assert Counter(arms) == {"bp": trials, "ldb": trials}, f"budgets are {Counter(arms)}"
    assert arms[:4] == ["bp", "ldb", "bp", "ldb"], f"order is {arms}"
    assert searcher.exhausted, "the search ended without saying so"


def test_an_arm_that_searches_nothing_runs_once(tmp_path):
    plan = plan_of(tmp_path, TOY.replace("lr: {log_uniform: [0.01, 0.5]}", "lr: 0.1"))
    searcher = ArmSearcher(studies_of(plan), Ledger(), make_trial, retries=0)
    arms = Counter(config["run"]["arm"] for config in drive(searcher, finished))
    assert arms == {"bp": 1, "ldb": 3}, f"budgets are {arms}"


@pytest.mark.parametrize(
    ("result", "state"),
    [
        ({"end/status": "finished", "val_accuracy": 0.5}, TrialState.COMPLETE),
        ({"end/status": "diverged", "val_accuracy": None}, TrialState.FAIL),
        ({"end/status": "finished", "val_accuracy": math.nan}, TrialState.FAIL),
        ({"end/status": "finished", "val_accuracy": math.inf}, TrialState.FAIL),
        ({"end/status": "finished", "val_accuracy": None}, TrialState.FAIL),
        ({"end/status": "stopped", "val_accuracy": 0.99}, TrialState.PRUNED),
        ({"val_accuracy": 0.99}, TrialState.PRUNED),
        (None, TrialState.FAIL),
    ],
    ids=["finished", "diverged", "nan", "inf", "never evaluated", "stopped", "cut short", "failed"],
)
def test_only_a_full_finite_trial_is_told_complete_and_none_stays_running(tmp_path, result, state):
    plan = plan_of(tmp_path)
    studies = studies_of(plan)
    searcher = ArmSearcher(studies, Ledger(), make_trial, retries=1)
    drive(searcher, lambda config: result)
    for study in studies:
        assert set(study.states()) == {state}, f"{study.arm.name} was told {study.states()}"
        assert len(study.states()) == 3, f"{study.arm.name} used {len(study.states())} of 3 trials"


def test_the_sampler_learns_from_what_it_is_told(tmp_path):
    plan = plan_of(tmp_path)
    low, high = (
        drive(
            ArmSearcher(studies_of(plan, "tpe", 30), Ledger(), make_trial, retries=0),
            lambda c, sign=sign: {"end/status": "finished", "val_accuracy": sign * c["run"]["recipe"]["lr"]},
        )
        for sign in (-1, 1)
    )
    means = [sum(math.log(c["run"]["recipe"]["lr"]) for c in run[40:]) / len(run[40:]) for run in (low, high)]
    assert means[0] < means[1] - 1, f"mean log lr is {means[0]} when low is good, {means[1]} when high is good"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_search_continues_where_it_stopped_and_repeats_nothing(tmp_path, sampler):
    plan = plan_of(tmp_path)
    first = drive(ArmSearcher(studies_of(plan, sampler, 4), Ledger(), make_trial, 0), finished, stop_after=3)
    ledger = Ledger()
    from fastbp.config import RunConfig

    for config in first:
        ledger.add(ended(RunConfig.from_dict(config["run"]), val=config["run"]["recipe"]["lr"]))
    rest = drive(ArmSearcher(studies_of(plan, sampler, 4), ledger, make_trial, 0), finished)
    assert not set(keys(first)) & set(keys(rest)), f"repeated: {set(keys(first)) & set(keys(rest))}"
    assert Counter(k[0] for k in keys(first + rest)) == {"bp": 4, "ldb": 4}, f"in all: {keys(first + rest)}"
    if sampler not in LEARNING:
        whole = drive(ArmSearcher(studies_of(plan, sampler, 4), Ledger(), make_trial, 0), finished)
        assert sorted(keys(first + rest)) == sorted(keys(whole)), "stopping changed the search"


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("status", ["running", "failed"])
def test_interrupted_and_failed_trials_run_again_with_the_same_setting(tmp_path, sampler, status):
    plan = plan_of(tmp_path)
    from fastbp.config import RunConfig

    first = drive(ArmSearcher(studies_of(plan, sampler), Ledger(), make_trial, 0), finished, stop_after=2)
    ledger = Ledger.of(ended(RunConfig.from_dict(c["run"]), status=status, val=None) for c in first)
    again = drive(ArmSearcher(studies_of(plan, sampler), ledger, make_trial, 0), finished)
    attempts = {key: c["attempt"] for key, c in zip(keys(again), again, strict=True)}
    assert [attempts.get(key) for key in keys(first)] == [1, 1], f"{keys(first)} against {attempts}"
    assert Counter(k[0] for k in keys(again)) == {"bp": 3, "ldb": 3}, f"budget is {keys(again)}"


def test_a_setting_that_is_proposed_twice_is_trained_once(tmp_path):
    plan = plan_of(tmp_path, TOY.replace("lr: {log_uniform: [0.01, 0.5]}", "lr: {choice: [0.1, 0.2]}"))
    studies = [ArmStudy(plan.arms[0], "random", 8, 0, plan.search_run)]
    ledger = Ledger()
    searcher = ArmSearcher(studies, ledger, make_trial, retries=0)

    def remember(config):
        from fastbp.config import RunConfig

        ledger.add(ended(RunConfig.from_dict(config["run"]), val=0.5))
        return finished(config)

    trained = drive(searcher, remember)
    assert len(trained) == 2, f"two settings were trained {len(trained)} times"
    assert studies[0].states() == [TrialState.COMPLETE] * 8, f"told {studies[0].states()}"


@pytest.mark.parametrize("sampler", LEARNING)
def test_a_space_of_choices_is_tried_in_full_where_the_budget_allows_it(tmp_path, sampler):
    plan = plan_of(tmp_path, TOY.replace("lr: {log_uniform: [0.01, 0.5]}", "lr: {choice: [0.1, 0.2, 0.3, 0.4, 0.5]}"))
    for seed in range(3):
        study = ArmStudy(plan.arms[0], sampler, 5, seed, plan.search_run)
        trained = drive(ArmSearcher([study], Ledger(), make_trial, retries=0), finished)
        assert len(set(keys(trained))) == len(trained) == study.distinct == 5, f"seed {seed} tried {keys(trained)}"


def test_a_setting_proposed_while_it_trains_waits_for_that_result(tmp_path):
    plan = plan_of(tmp_path, TOY.replace("lr: {log_uniform: [0.01, 0.5]}", "lr: {choice: [0.1]}"))
    study = ArmStudy(plan.arms[0], "random", 3, 0, plan.search_run)
    searcher = ArmSearcher([study], Ledger(), make_trial, retries=0)
    assert isinstance(searcher.suggest("a"), dict)
    assert searcher.suggest("b") is None, "the same setting was started twice"
    searcher.on_trial_complete("a", result={"end/status": "finished", "val_accuracy": 0.5})
    assert searcher.suggest("b") == Searcher.FINISHED
    assert study.states() == [TrialState.COMPLETE] * 3, f"told {study.states()}"


def test_grid_covers_the_ends_and_stays_within_the_budget(tmp_path):
    plan = plan_of(tmp_path)
    configs = drive(ArmSearcher(studies_of(plan, "grid", 9), Ledger(), make_trial, 0), finished)
    lrs = sorted(c["run"]["recipe"]["lr"] for c in configs if c["run"]["arm"] == "bp")
    assert len(lrs) == 9, f"{len(lrs)} points of one field in a budget of 9"
    assert (lrs[0], lrs[-1]) == (0.01, 0.5), f"ends are {lrs[0]}, {lrs[-1]}"
    both = {(c["run"]["recipe"]["lr"], c["run"]["method"]["drop_rate"]) for c in configs if c["run"]["arm"] == "ldb"}
    assert len(both) == 9, f"a 3 x 3 grid has {len(both)} points"


def test_a_list_keeps_its_order_skips_what_is_done_and_retries_at_the_end(tmp_path):
    plan = plan_of(tmp_path)
    runs = [plan.search_run(plan.arms[0], {"recipe.lr": lr}) for lr in (0.1, 0.2, 0.3, 0.4)]
    ledger = Ledger.of([ended(runs[1]), ended(runs[3], status="failed", val=None)])
    fails = Counter()

    def result(config):
        fails[config["run"]["recipe"]["lr"]] += 1
        return None if config["run"]["recipe"]["lr"] == 0.1 else finished(config)

    configs = drive(ListSearcher(runs, ledger, make_trial, retries=1), result)
    seen = [(c["run"]["recipe"]["lr"], c["attempt"]) for c in configs]
    assert seen == [(0.1, 0), (0.3, 0), (0.4, 1), (0.1, 1)], f"order and attempts are {seen}"


def test_after_a_signal_nothing_is_handed_out(tmp_path):
    plan = plan_of(tmp_path, TOY)
    searcher = ArmSearcher(studies_of(plan), Ledger(), make_trial, 0)
    searcher.stop = Stop()
    assert searcher.suggest("a")["run"]
    searcher.stop.signal = 15
    assert searcher.suggest("b") is None
    assert not searcher.exhausted, "the next start goes on"


@pytest.mark.parametrize("objectives", [BOTH[:1], BOTH], ids=["one", "two"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_fields_of_inner_methods_are_searched_with_equal_budgets_and_found_again(tmp_path, sampler, objectives):
    plan, ledger, log = plan_of(tmp_path, COMBINED), Ledger(), []
    from fastbp.config import RunConfig

    def studies():
        return [ArmStudy(arm, sampler, 6, 0, plan.search_run, objectives, log.append) for arm in plan.arms]

    def result(config):
        run = RunConfig.from_dict(config["run"])
        rate = run.method.inner.drop_rate if run.arm == "both" else 0.0
        ledger.add(ended(run, val=run.recipe.lr, flops=1e9 - rate))
        return finished(config) | {"record/flops_executed": 1e9 - rate}

    made = studies()
    configs = drive(ArmSearcher(made, Ledger(), make_trial, 0), result)
    assert Counter(c["run"]["arm"] for c in configs) == {"bp": 6, "both": 6}, "budgets differ"
    assert all(study.states() == [TrialState.COMPLETE] * 6 for study in made), "a finished trial was not told"
    inner = [c["run"]["method"]["inner"] for c in configs if c["run"]["arm"] == "both"]
    assert len({i["drop_rate"] for i in inner}) > 1, f"{sampler} proposed one drop rate: {inner}"
    assert {i["every_epochs"] for i in inner} <= {2, 3}, f"{inner}"
    asked = [e["setting"] for e in log if e["event"] == "ask" and e["arm"] == "both"]
    known = [plan.arms[1].values_of(r.method, r.recipe) for r in ledger.of_phase("search", "both")]
    assert asked == known, "records give other settings than were asked for"
    assert drive(ArmSearcher(studies(), ledger, make_trial, 0), result) == [], "a complete search went on"


@pytest.mark.parametrize("flops", [None, math.nan, math.inf])
def test_with_two_objectives_a_trial_without_a_finite_cost_is_no_result(tmp_path, flops):
    plan = plan_of(tmp_path)
    study = ArmStudy(plan.arms[0], "nsga2", 3, 0, plan.search_run, BOTH)
    drive(ArmSearcher([study], Ledger(), make_trial, 0), lambda c: finished(c) | {"record/flops_executed": flops})
    assert study.states() == [TrialState.FAIL] * 3, f"told {study.states()}"


def test_with_two_objectives_a_cheap_trial_that_was_stopped_is_no_result(tmp_path):
    plan = plan_of(tmp_path)
    for sampler in SAMPLERS:
        study = ArmStudy(plan.arms[0], sampler, 3, 0, plan.search_run, BOTH)
        cheap = {"val_accuracy": 0.9, "record/flops_executed": 1.0}
        drive(ArmSearcher([study], Ledger(), make_trial, 0), lambda c, cheap=cheap: cheap)
        assert study.states() == [TrialState.PRUNED] * 3, f"{sampler} was told {study.states()}"


def test_nsga2_lowers_flops_too_and_goes_on_with_its_generation(tmp_path):
    """FLOPs fall with the drop rate and nothing else matters: later trials drop more; also after a restart."""
    plan = plan_of(tmp_path)
    from fastbp.config import RunConfig

    def rates(stop, ledger):
        def result(config):
            run = RunConfig.from_dict(config["run"])
            flops = 1e6 * (1 - run.method.drop_rate)
            ledger.add(ended(run, val=0.5, flops=flops))
            return {"end/status": "finished", "val_accuracy": 0.5, "record/flops_executed": flops}

        study = ArmStudy(plan.arms[1], "nsga2", 40, 0, plan.search_run, BOTH)
        configs = drive(ArmSearcher([study], ledger, make_trial, 0), result, stop)
        return [c["run"]["method"]["drop_rate"] for c in configs]

    ledger = Ledger()
    first, rest = rates(20, ledger), rates(None, ledger)
    assert len(first) + len(rest) == 40, f"{len(first)} and {len(rest)} trials in a budget of 40"
    means = [sum(part) / len(part) for part in (first[:10], rest[10:])]
    assert means[1] > means[0] + 0.15, f"mean drop rates {means}: the search forgot what it was told"


@pytest.mark.parametrize("sampler", ["random", "qmc", "grid"])
def test_what_becomes_of_trials_does_not_change_a_fixed_sequence(tmp_path, sampler):
    plan = plan_of(tmp_path)
    sequences = [
        keys(drive(ArmSearcher(studies_of(plan, sampler, 6), Ledger(), make_trial, 0), result))
        for result in (finished, lambda c: {"end/status": "diverged", "val_accuracy": None}, lambda c: None)
    ]
    assert sequences[0] == sequences[1] == sequences[2], f"{sequences}"


def test_qmc_fills_the_space_more_evenly_than_chance(tmp_path):
    """16 scrambled Sobol points have one in each sixteenth of every axis."""
    plan = plan_of(tmp_path)
    study = ArmStudy(plan.arms[1], "qmc", 16, 0, plan.search_run)
    configs = drive(ArmSearcher([study], Ledger(), make_trial, 0), finished)
    cells = sorted(int((c["run"]["method"]["drop_rate"] - 0.1) / 0.8 * 16) for c in configs)
    assert cells == list(range(16)), f"sixteenths of the drop rate are {cells}"


def test_the_log_has_version_arguments_and_the_order_of_asks_and_tells(tmp_path):
    plan = plan_of(tmp_path)
    study = ArmStudy(plan.arms[0], "tpe", 2, 7, plan.search_run, log=search_log(tmp_path / "search.jsonl"))
    searcher = ArmSearcher([study], Ledger(), make_trial, 0)
    assert isinstance(searcher.suggest("a"), dict)
    assert isinstance(searcher.suggest("b"), dict)
    searcher.on_trial_complete("b", result={"end/status": "finished", "val_accuracy": 0.5})
    searcher.on_trial_complete("a", error=True)
    events = [json.loads(line) for line in (tmp_path / "search.jsonl").read_text().splitlines()]
    order = [(e["event"], e.get("trial"), e.get("state")) for e in events]
    assert order == [
        ("start", None, None),
        ("ask", 0, None),
        ("ask", 1, None),
        ("tell", 1, "COMPLETE"),
        ("tell", 0, "FAIL"),
    ], f"logged {order}"
    import optuna

    sampler = events[0]["sampler"]
    assert (sampler["optuna"], sampler["class"]) == (optuna.__version__, "TPESampler"), f"logged {sampler}"
    assert {"n_startup_trials", "multivariate", "constant_liar", "group", "n_ei_candidates"} <= set(sampler)


@pytest.mark.parametrize("name", SAMPLERS[:-1])
def test_every_argument_of_a_sampler_that_is_not_deprecated_is_given(name):
    import inspect

    import optuna

    from sweeps.samplers import arguments

    given = arguments(name, 10)
    kind = getattr(optuna.samplers, given.pop("class"))
    deprecated = {
        "constraints_func",
        *("consider_prior", "prior_weight", "consider_magic_clip", "consider_endpoints"),
        *("gamma", "weights", "warn_independent_sampling"),
    } - {"warn_independent_sampling" if name == "qmc" else ""}
    names = set(inspect.signature(kind).parameters) - {"seed", "independent_sampler"}
    assert names - deprecated <= set(given), f"{kind.__name__} has arguments of its own choosing: {names - set(given)}"


@pytest.mark.parametrize("inner", ["{choice: [{method: ldb, drop_rate: search}, {method: bp}]}", "search"])
def test_a_choice_of_inner_methods_is_refused_with_what_to_do(tmp_path, inner):
    text = TOY.replace("ldb: {method: ldb, drop_rate: search}", f"both: {{method: dbp, inner: {inner}}}")
    with pytest.raises(SweepError) as refused:
        plan_of(tmp_path, text)
    assert "toy.yaml:6: arms.both.inner: the method inside is not searched" in str(refused.value), str(refused.value)
    assert "make one arm per inner method" in str(refused.value), str(refused.value)
