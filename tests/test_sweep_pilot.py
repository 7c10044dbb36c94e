"""Pilot steps: what they say of a run, held against methods of known cost and against whole runs."""

import multiprocessing
import time
from dataclasses import dataclass, replace

import pytest
import torch

from broken_methods import Nan
from fastbp import DDG, Backprop, EpochPlan, HighwayBP, LayerDropBack, Method, WrappingEstimator
from fastbp.config import RunConfig, Task
from fastbp.recipe import Recipe
from fastbp.run import Run
from sweeps.pilot import EpochCost, Pilot, pilot

TASK = Task(model="mlp", model_args={"depth": 2, "width": 8}, data_args={"limit": 256})
RECIPE = Recipe(epochs=3, batch_size=16, lr=0.01)


@dataclass(frozen=True)
class TwoKinds(Method):
    """Every third epoch has twice the batch, and steps that sleep three times as long."""

    seconds: float = 0.01

    def bind(self, model, loss_fn):
        return _TwoKinds(self, Backprop().bind(model, loss_fn))

    def exact(self, model):
        return None


class _TwoKinds(WrappingEstimator):
    def start_epoch(self, epoch):
        self.slow = epoch % 3 == 2
        return EpochPlan(batch_scale=2.0, kind="slow") if self.slow else EpochPlan()

    def backward(self, x, y):
        time.sleep(self.method.seconds * (3 if self.slow else 1))
        return super().backward(x, y)


def test_every_kind_of_epoch_is_timed_and_weighted_as_in_the_run():
    truth = {"16": 0.01 / 16, "32 slow": 0.03 / 32}
    for _ in range(3):  # a busy machine wakes sleepers late
        found = pilot(RunConfig(TASK, replace(RECIPE, epochs=7), TwoKinds()), steps=3)
        assert found.order == ("16", "16", "32 slow", "16", "16", "32 slow", "16")
        over = {kind: found.kinds[kind].seconds_per_example / seconds for kind, seconds in truth.items()}
        assert min(over.values()) >= 1, f"a pilot is faster than the sleep in its steps: {over}"
        if max(over.values()) < 1.6:
            break
    assert max(over.values()) < 1.6, f"a pilot is far slower than the sleep in its steps: {over}"
    costs = {kind: cost.seconds_per_example for kind, cost in found.kinds.items()}
    assert found.seconds_per_example == pytest.approx((5 * costs["16"] + 2 * costs["32 slow"]) / 7)
    assert found.train_seconds(3) == pytest.approx(256 * (2 * costs["16"] + costs["32 slow"]))


@pytest.mark.parametrize("method", [Backprop(), LayerDropBack(drop_rate=0.4), DDG(modules=2, drain="epoch")])
def test_flops_are_those_of_the_whole_run_and_seconds_of_its_size(method):
    config = RunConfig(TASK, RECIPE, method)
    for _ in range(3):
        found = pilot(config)
        run = Run(config)
        while not run.done:
            record = run.train_epoch()
        ratio = found.train_seconds() / (record.train_seconds or 0.0)
        if 0.5 < ratio < 2:
            break
    assert found.flops_per_example == pytest.approx(record.flops_executed / record.examples)
    assert 0.5 < ratio < 2, f"pilot says {ratio:.2f} times what the run took"


def test_a_plan_reckons_with_all_rounds_of_a_tolerance():
    recipe = replace(RECIPE, epochs=3)
    found = pilot(RunConfig(TASK, recipe, HighwayBP(iterations=2, tolerance=10.0)))
    run = Run(RunConfig(TASK, replace(recipe, epochs=1), HighwayBP(iterations=2)))
    record = run.train_epoch()
    assert len(found.kinds) == 1, found.kinds
    assert found.flops_per_example == pytest.approx(record.flops_executed / record.examples)


def test_a_run_is_set_up_once_evaluated_as_its_recipe_says_and_tested_at_the_end():
    kinds = {"a": EpochCost(0.5, 8.0), "b": EpochCost(1.0, None)}
    found = Pilot(kinds, ("a", "a", "b", "a", "a"), 10, 100.0, 7.0, 3.0, 2, "cpu", 1)
    assert found.run_seconds() == 100 + 10 * (4 * 0.5 + 1.0) + 3 * 7 + 3, "evaluated after epochs 2, 4 and 5"
    assert found.run_seconds(1) == 100 + 10 * 0.5 + 7 + 3
    assert found.flops_per_example is None, "FLOPs of one kind are unknown"
    with pytest.raises(ValueError, match="epochs = 6: the pilot knows the 5 epochs"):
        found.run_seconds(6)


def test_a_pilot_leaves_threads_and_random_numbers_alone_and_survives_a_nan_loss():
    torch.set_num_threads(2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = pilot(RunConfig(TASK, replace(RECIPE, epochs=1), Nan()), threads=1)
    assert found.seconds_per_example > 0
    assert found.threads == 1
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), before)


@dataclass(frozen=True)
class EverySeventh(TwoKinds):
    """Sleeps in every seventh step only."""

    def bind(self, model, loss_fn):
        return _EverySeventh(self, Backprop().bind(model, loss_fn))


class _EverySeventh(WrappingEstimator):
    def __init__(self, method, inner):
        super().__init__(method, inner)
        self.period, self.steps = 7, 0

    def backward(self, x, y):
        self.steps += 1
        if self.steps % 7 == 0:
            time.sleep(self.method.seconds)
        return super().backward(x, y)


def test_a_pass_is_whole_periods():
    task = replace(TASK, data_args={"limit": 1024})
    found = pilot(RunConfig(task, replace(RECIPE, epochs=1), EverySeventh(seconds=0.07)), steps=1)
    assert found.seconds_per_example >= 0.07 / 7 / 16, "the sleep of every seventh step was missed"


@pytest.mark.long
@pytest.mark.slow
def test_a_run_of_several_processes_is_timed_in_them():
    task = replace(TASK, model_args={"depth": 4, "width": 8})
    config = RunConfig(task, RECIPE, DDG(modules=2, cuts=(2,)))
    alone, staged = pilot(config, threads=1), pilot(replace(config, method=DDG(cuts=(2,), processes=True)), threads=1)
    assert staged.flops_per_example == pytest.approx(alone.flops_per_example), "two stages do other work than one"
    assert staged.order == alone.order
    assert (staged.examples, staged.threads) == (alone.examples, 1)
    assert 0 < staged.seconds_per_example < 50 * alone.seconds_per_example, f"{staged} beside {alone}"
    assert not multiprocessing.active_children(), "processes were left running"
