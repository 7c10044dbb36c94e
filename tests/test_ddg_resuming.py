"""DDG resumed by the run: batches in flight under autocast, and cuts that were measured."""

import io

import pytest
import torch

from fastbp import DDG, DecorrelatedBP, LayerDropBack, nest
from fastbp.config import RunConfig, Task
from fastbp.recipe import Recipe
from fastbp.run import Run
from fastbp.split import BlockCost, pieces
from fastbp.views import as_chain
from test_ddg import MODES
from test_run import finish, numbers

CONVS = Task("synthetic", "resnet_tiny", data_args={"n": 96}, model_args={"width": 4})
LAYERS = Task(model="mlp", model_args={"depth": 4, "width": 8}, data_args={"limit": 128})


def resumed(first, config):
    """Another run that continues from the first one's state, as it comes back from a file."""
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Run(config, device="cpu", attempt=1)
    second.load_state_dict(torch.load(file, weights_only=True))
    return second


def assert_same_run(config, whole, first):
    """The first run, continued by another one, has the numbers and weights of the whole one."""
    expected, got = finish(whole), finish(first, stop=1)
    second = resumed(first, config)
    got += finish(second)
    for a, b in zip(expected, got, strict=True):
        assert numbers(a) == numbers(b), f"epoch {a.epoch} differs"
    state = second.estimator.model.state_dict()
    for name, tensor in whole.estimator.model.state_dict().items():
        assert torch.equal(tensor, state[name]), f"{name} differs"


@pytest.mark.parametrize(
    ("task", "method"),
    [
        *[(LAYERS, DDG(K, mode)) for K in (2, 3) for mode in MODES],
        (LAYERS, DDG(3, devices=("cpu",) * 3, cuts=(1, 2))),
        (CONVS, DDG(3, "mixed")),
        (CONVS, nest([DecorrelatedBP(decor_lr=1e-3), LayerDropBack(), DDG(2)])),
    ],
    ids=["2 stash", "2 mixed", "2 replay", "3 stash", "3 mixed", "3 replay", "placed", "convs", "wrapped"],
)
def test_batches_in_flight_keep_their_precision(task, method):
    config = RunConfig(task, Recipe(epochs=3, batch_size=32, lr=0.05, precision="bfloat16"), method)
    assert_same_run(config, Run(config, device="cpu"), Run(config, device="cpu"))


@pytest.mark.parametrize("devices", [None, ("cpu", "cpu")])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_cuts_that_were_measured_are_those_of_the_saved_run(monkeypatch, optimizer, devices):
    """Times never come out twice the same, and the optimizer's groups go by module."""
    heavy = 0

    def measured(model, *_, **__):
        blocks = len(pieces(as_chain(model)))
        return [BlockCost(forward_seconds=9.0 if i == heavy % blocks else 1.0, flops=1.0) for i in range(blocks)]

    monkeypatch.setattr("fastbp.methods.ddg.measure", measured)
    method = DDG(modules=2, split="time", lr_power=1.0, devices=devices)
    config = RunConfig(LAYERS, Recipe(epochs=3, batch_size=32, lr=0.01, optimizer=optimizer), method)
    whole, first = Run(config, device="cpu"), Run(config, device="cpu")
    heavy = -1
    cuts = {run.estimator.cutter.cuts for run in (first, Run(config, device="cpu"))}
    assert len(cuts) == 2, f"measured anew, the cuts are the same: {cuts}"
    assert_same_run(config, whole, first)
    rates = [group["lr_scale"] for group in resumed(first, config).optimizer.param_groups]
    assert rates == [0.5, 1.0]
