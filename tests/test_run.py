"""The one loop: records, resuming, divergence, plans, FLOPs."""

import dataclasses
import io
import json
import math
from dataclasses import dataclass

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbp import (
    DDG,
    Backprop,
    DecorrelatedBP,
    EpochPlan,
    HighwayBP,
    LayerDropBack,
    Method,
    WrappingEstimator,
    nest,
)
from fastbp.config import RunConfig, Task, check_bind
from fastbp.data import load_dataset
from fastbp.flops import Counter
from fastbp.models import make_model
from fastbp.recipe import Recipe
from fastbp.record import (
    EpochRecord,
    RecordWriter,
    RunRecord,
    SweepRecord,
    config_key,
    from_dict,
    last_runs,
    read_records,
    to_line,
)
from fastbp.run import Run

TASK = Task("synthetic", "resnet_tiny", data_args={"n": 120}, model_args={"width": 4})
RECIPE = Recipe(epochs=5, batch_size=16, lr=0.02, warmup_epochs=0.5, augment="flip_crop")


def finish(run, stop=None):
    records = []
    while not run.done and run.epoch != stop:
        records.append(run.train_epoch())
    return records


def numbers(record):
    seconds = {f.name for f in dataclasses.fields(record) if f.name.endswith("_seconds")}
    return {k: v for k, v in dataclasses.asdict(record).items() if k not in seconds and k != "attempt"}


@pytest.mark.parametrize(
    "method",
    [
        Backprop(),
        LayerDropBack(),
        DecorrelatedBP(decor_lr=1e-3),
        HighwayBP(2),
        DDG(3),
        DDG(3, "mixed"),
        DDG(3, "replay"),
        nest([DecorrelatedBP(decor_lr=1e-3), LayerDropBack(), DDG(2)]),
    ],
    ids=str,
)
def test_stopping_and_resuming_changes_no_number(method):
    config = RunConfig(TASK, RECIPE, method, seed=3)
    whole = Run(config)
    expected = finish(whole)
    for stop in (1, 3):
        first = Run(config)
        got = finish(first, stop)
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        torch.rand(7)  # the caller's random numbers are no part of a run
        second = Run(config, attempt=1)
        second.load_state_dict(torch.load(file, weights_only=True))
        got += finish(second)
        for a, b in zip(expected, got, strict=True):
            assert numbers(a) == numbers(b), f"{method} resumed after {stop}: epoch {a.epoch} differs"
        assert second.end().resumed
        state = second.estimator.model.state_dict()
        for name, tensor in whole.estimator.model.state_dict().items():
            assert torch.equal(tensor, state[name]), f"{method} resumed after {stop}: {name} differs"


def test_resuming_another_configuration_is_refused():
    state = Run(RunConfig(TASK, RECIPE)).state_dict()
    with pytest.raises(ValueError, match="belongs to run"):
        Run(RunConfig(TASK, RECIPE, seed=1)).load_state_dict(state)


def test_run_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    finish(Run(RunConfig(TASK, Recipe(epochs=1), DDG(2))))
    assert torch.equal(torch.rand(3), expected)


def test_records_count_and_end():
    run = Run(RunConfig(TASK, dataclasses.replace(RECIPE, eval_every_epochs=2), LayerDropBack(), arm="ldb"))
    start = run.start_record()
    records = finish(run)
    end = run.end()
    n = len(run.data.train)
    assert (start.status, end.status, start.run_key) == ("running", "finished", end.run_key)
    assert [r.batch_size for r in records] == [16, 16, 32, 16, 32], "the plan doubles the batch in epochs 2 and 4"
    assert [r.examples for r in records] == [n * (i + 1) for i in range(5)]
    assert [r.val_accuracy is None for r in records] == [True, False, True, False, False]
    assert [r.test_accuracy is None for r in records] == [True, True, True, True, False]
    assert records[2].lr == pytest.approx(2 * run.recipe.lr_at(2)), "1/(1-p) at p = 1/2"
    assert end.train_seconds == records[-1].train_seconds > 0
    assert end.warmup_seconds > 0
    assert end.peak_memory_bytes is None, "unknown on the CPU: null, never 0"
    assert end.energy_joules is None
    assert end.parameters == sum(p.numel() for p in run.estimator.finalize().parameters())
    assert json.loads(to_line(end))["method"]["method"] == "ldb"


def test_a_run_that_diverges_says_so():
    run = Run(RunConfig(TASK, Recipe(epochs=6, lr=1e18, momentum=0.0), Backprop()))
    records = finish(run)
    end = run.end()
    assert end.status == "diverged", f"status {end.status}, losses {[r.train_loss for r in records]}"
    assert "smaller learning rate" in end.reason
    assert run.done
    assert all(r.train_loss is None or math.isfinite(r.train_loss) for r in records)
    with pytest.raises(RuntimeError, match="diverged"):
        run.train_epoch()


def test_key_is_the_configuration():
    config = RunConfig(TASK, RECIPE, LayerDropBack(), seed=1, sweep="s", phase="measure", arm="ldb", block=0)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.key == dataclasses.replace(config, block=7).key, "the block is when, not what"
    others = [
        dataclasses.replace(config, seed=2),
        dataclasses.replace(config, method=LayerDropBack(drop_rate=0.4)),
        dataclasses.replace(config, phase="search"),
        dataclasses.replace(config, recipe=Recipe(epochs=4)),
    ]
    assert len({c.key for c in [config, *others]}) == 5
    assert RunConfig(method=LayerDropBack(batch_scale=2)).key == RunConfig(method=LayerDropBack(batch_scale=2.0)).key


def test_method_noise_and_order_depend_on_the_seed_only():
    a, b = (finish(Run(RunConfig(TASK, RECIPE, DecorrelatedBP(decor_lr=1e-3), seed=4))) for _ in range(2))
    assert [r.train_loss for r in a] == [r.train_loss for r in b]
    c = finish(Run(RunConfig(TASK, RECIPE, DecorrelatedBP(decor_lr=1e-3), seed=5)))
    assert [r.train_loss for r in a] != [r.train_loss for r in c]


def flops(method, epochs=1):
    run = Run(RunConfig(TASK, dataclasses.replace(RECIPE, epochs=epochs), method))
    finish(run)
    return run.end().flops_executed, run


def test_flops_are_torchs_count_for_backprop_and_move_with_the_method():
    backprop, run = flops(Backprop())
    x, y = run.data.dummy_batch(16)
    model = make_model(TASK.model, run.data.input_shape, run.data.classes, TASK.model_args)
    with FlopCounterMode(display=False) as counter:
        run.loss_fn(model(x), y).backward()
    assert backprop == counter.get_total_flops() / 16 * len(run.data.train)
    assert flops(DDG(2))[0] == backprop, "a delay costs no arithmetic"
    assert flops(HighwayBP(3))[0] > flops(HighwayBP(1))[0] > backprop
    assert flops(DecorrelatedBP())[0] > backprop
    full, dropped = flops(Backprop(), 3)[0], flops(LayerDropBack(batch_scale=1.0, drop_rate=0.9), 3)[0]
    saved = (full - dropped) / (full / 3)
    assert 0 < saved < 2 / 3, f"dropping 90 % of the units saved {saved:.2f} of an epoch's FLOPs"


def test_attention_is_counted_on_the_cpu():
    q = torch.randn(2, 3, 16, 8, requires_grad=True)
    with Counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(q, q, q).sum().backward()
    forward = 2 * 2 * (2 * 3 * 16 * 16 * 8)
    assert counter.total >= 3 * forward, f"counted {counter.total}, the forward alone has {forward}"


@pytest.mark.parametrize(
    "method",
    [Backprop(), LayerDropBack(), DecorrelatedBP(decor_lr=1e-3), HighwayBP(2), DDG(2), DDG(2, "replay")],
    ids=str,
)
def test_bfloat16_follows_float32_within_an_epoch(method):
    """Autocast must not go on serving the weights of before the optimizer's step."""
    task = Task("digits", "mlp", data_args={"limit": 512}, model_args={"width": 16})
    losses = {}
    for precision in ("float32", "bfloat16", "float64"):
        records = finish(Run(RunConfig(task, Recipe(epochs=1, batch_size=16, lr=0.02, precision=precision), method)))
        losses[precision] = records[0].train_loss
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.03), losses
    assert losses["float64"] == pytest.approx(losses["float32"], rel=0.01), losses


def test_every_run_seed_draws_its_own_masks():
    def masks(seed):
        run = Run(RunConfig(TASK, RECIPE, LayerDropBack(), seed=seed))
        run.estimator.start_epoch(2)
        return run.estimator._masks_of_step()

    assert masks(1) == masks(1)
    assert len({tuple(masks(seed)) for seed in range(6)}) > 1, "all seeds share their masks"


def test_flops_average_over_the_methods_period_and_a_full_pipeline():
    every = [flops(DecorrelatedBP(interval=k))[0] for k in (1, 4, 16)]
    assert every[0] > every[1] > every[2], every
    update = (every[0] - every[1]) / 0.75
    assert every[2] == pytest.approx(every[0] - update * 15 / 16), f"interval 16 is not 1/16 of the updates: {every}"
    deep = Task("synthetic", "mlp", data_args={"n": 120}, model_args={"depth": 8, "width": 8})
    counts = []
    for method in (Backprop(), DDG(2), DDG(8)):
        run = Run(RunConfig(deep, Recipe(epochs=1, lr=0.01), method))
        finish(run)
        counts.append(run.end().flops_executed)
    assert counts[0] == counts[1] == counts[2], f"delays cost no arithmetic: {counts}"


def test_steps_count_the_drain():
    run = Run(RunConfig(TASK, Recipe(epochs=2, lr=0.02), DDG(3, drain="epoch")))
    finish(run)
    assert run.end().steps == 2 * (run.data.steps(64) + 2)


def test_text_trains(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    task = Task(f"text:{path}", "gpt_tiny", data_args={"length": 16}, model_args={"dim": 16, "depth": 1, "heads": 2})
    run = Run(RunConfig(task, Recipe(epochs=3, optimizer="adamw", lr=3e-3), HighwayBP(1)))
    records = finish(run)
    assert records[-1].train_loss < records[0].train_loss
    assert 0 <= records[-1].test_accuracy <= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": DDG(modules=9)}, "DDG.modules = 9: this Chain has 4 blocks"),
        ({"task": Task("digits", "resnet_tiny", model_args={"widht": 3})}, "did you mean width"),
        ({"task": Task("digit")}, "did you mean digits"),
        ({"task": Task(model="resnet_tin")}, "did you mean resnet_tiny"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_check_bind_refuses_in_a_sentence(change, message):
    with pytest.raises(ValueError, match=message):
        check_bind(dataclasses.replace(RunConfig(), **change))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 0}, "Recipe.lr = 0.0: must be positive"),
        ({"optimizer": "sdg"}, "Recipe.optimizer = 'sdg': must be one of sgd, adam, adamw; did you mean sgd"),
        ({"epochs": 0}, "Recipe.epochs = 0: must be at least 1"),
        ({"lr": float("nan")}, "Recipe.lr = nan: must be finite"),
    ],
)
def test_recipe_refuses_in_a_sentence(fields, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


def test_schedules():
    cosine = Recipe(epochs=10, lr=1.0, warmup_epochs=2.0)
    assert [cosine.lr_at(e) for e in (0.0, 1.0, 2.0, 6.0)] == pytest.approx([0.0, 0.5, 1.0, 0.5])
    assert cosine.lr_at(10.0) == pytest.approx(0.0)
    step = Recipe(epochs=8, lr=1.0, schedule="step")
    assert [step.lr_at(e) for e in (0, 3.9, 4, 6)] == pytest.approx([1.0, 1.0, 0.1, 0.01])


def test_records_survive_a_torn_tail(tmp_path):
    path = tmp_path / "records.jsonl"
    RecordWriter(path).write(SweepRecord(sweep="s"), RunRecord(run_key="a"), EpochRecord(run_key="a", train_loss=1.0))
    with path.open("a") as file:
        file.write('{"kind": "run", "run_k')  # a crash in the middle of a write
    assert len(list(read_records(path))) == 3
    RecordWriter(path).write(RunRecord(run_key="a", status="finished"))
    records = list(read_records(path))
    assert len(records) == 4
    assert last_runs(records)["a"].status == "finished"


def test_records_refuse_what_they_do_not_know(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text('nonsense\n{"kind": "run", "schema_version": 1}\n')
    with pytest.raises(ValueError, match=r"records\.jsonl:1: not JSON"):
        list(read_records(path))
    with pytest.raises(ValueError, match="schema_version 99"):
        from_dict({"kind": "run", "schema_version": 99})
    with pytest.raises(ValueError, match="unknown columns colour"):
        from_dict({"kind": "run", "schema_version": 1, "colour": 1})
    line = to_line(EpochRecord(train_loss=float("nan"), metrics={"x": float("inf")}))
    assert json.loads(line)["train_loss"] is None
    assert json.loads(line)["metrics"] == {"x": None}
    assert config_key({"a": 1, "b": 2}) == config_key({"b": 2, "a": 1})


def test_a_clock_that_is_set_back_does_not_end_a_run_before_its_start():
    run = Run(RunConfig(Task("synthetic", "mlp", {"n": 60}), Recipe(epochs=1)))
    run.started_at = "2999-01-01T00:00:00+00:00"  # the clock was right then, and has gone back since
    run.train_epoch()
    end = run.end()
    assert "2999-01-01T00:00:00" <= end.ended_at < "2999-01-01T00:10:00", f"ended at {end.ended_at}"


def test_given_data_is_used():
    data = load_dataset("synthetic", device="cpu", n=60)
    run = Run(RunConfig(Task("synthetic", "mlp"), Recipe(epochs=1)), data=data)
    assert len(run.data.train) == len(data.train)


@dataclass(frozen=True)
class Forgetful(Method):
    """Its epochs alternate between two kinds by a count of all starts, which no state holds."""

    def bind(self, model, loss_fn):
        return _Forgetful(self, Backprop().bind(model, loss_fn))

    def exact(self, model):
        return None


class _Forgetful(WrappingEstimator):
    starts = 0

    def start_epoch(self, epoch):
        self.starts += 1
        return EpochPlan(kind=f"{self.starts // 3}")


def test_flops_of_a_kind_that_cannot_be_brought_about_again_are_unknown():
    run = Run(RunConfig(Task("digits", "mlp", {"limit": 64}), Recipe(epochs=2, batch_size=16), Forgetful()))
    record = run.train_epoch()
    assert record.flops_executed is None, "a number of another kind of step is worse than none"
