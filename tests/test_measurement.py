"""Comparing a step's gradient with backprop's says what it should and changes nothing, also inside other methods."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastbp import DDG, Backprop, DecorrelatedBP, HighwayBP, LayerDropBack
from fastbp.chain import Chain, Residual
from fastbp.config import RunConfig, Task
from fastbp.measurement import agreement, beside_backprop, measuring
from fastbp.method import uncompared
from fastbp.models import make_model
from fastbp.recipe import Recipe
from fastbp.run import Run

MEASURED = HighwayBP(iterations=1, cosine_every=2)
ALL = [
    MEASURED,
    replace(MEASURED, combination="min_residual", tolerance=0.1),
    LayerDropBack(unit="tensor", inner=MEASURED),
    LayerDropBack(unit="prefix", inner=MEASURED),
    DecorrelatedBP(decor_lr=1e-2, sample_fraction=1.0, inner=MEASURED),
]


def dropout_net():
    """Random numbers, running statistics and blocks that matter to one another."""
    torch.manual_seed(0)
    branches = (
        nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 6)) for _ in range(4)
    )
    return Chain(nn.Linear(5, 6), [Residual(branch) for branch in branches], nn.Linear(6, 3)).double()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 5, generator=generator, dtype=torch.float64), torch.arange(8) % 3


def silent(method):
    inner = getattr(method, "inner", None)
    return replace(method, cosine_every=0) if inner is None else replace(method, inner=silent(inner))


def trained(method, steps=6):
    """Losses, gradients, buffers and random numbers of a few steps, and the metrics after them."""
    model = dropout_net()
    estimator = method.bind(model, cross_entropy)
    estimator.start_epoch(2)
    optimizer = torch.optim.SGD(estimator.model.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    seen = []
    for i in range(steps):
        if i % 3 != 1:  # two batches accumulate
            optimizer.zero_grad()
        seen.append(estimator.backward(*batch(i)))
        seen += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return [*seen, *model.state_dict().values(), torch.get_rng_state()], estimator.metrics()


@pytest.mark.parametrize("method", ALL, ids=str)
def test_measuring_changes_nothing(method):
    (ours, metrics), (others, without) = trained(method), trained(silent(method))
    assert len(ours) == len(others)
    for a, b in zip(ours, others, strict=True):
        assert torch.equal(a, b)
    found = {name: value for name, value in metrics.items() if name not in without}
    assert list(found) == ["highway/cosine", "highway/relative_error"]
    assert 0 < found["highway/cosine"] <= 1, found
    assert found["highway/relative_error"] > 0, "one round of four is not exact"


@pytest.mark.parametrize("net", ["deep", "over time"])
def test_what_is_measured_is_the_distance_to_backprop(net):
    if net == "deep":
        x, y = batch(0)
        make = dropout_net
    else:
        x, y = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)).double(), torch.arange(4) % 3
        make = lambda: make_model("gru", (1, 4, 4), 3, {"width": 5}).double()  # noqa: E731
    grads, metrics = [], {}
    for method in (HighwayBP(iterations=0, cosine_every=1), Backprop()):
        estimator = method.bind(make(), cross_entropy)
        torch.manual_seed(3)
        estimator.backward(x, y)
        grads.append(torch.cat([p.grad.flatten() for p in estimator.model.parameters()]))
        metrics = estimator.metrics() or metrics
    ours, exact = grads
    assert metrics["highway/cosine"] == pytest.approx(torch.cosine_similarity(ours, exact, 0).item())
    assert metrics["highway/relative_error"] == pytest.approx(((ours - exact).norm() / exact.norm()).item())
    assert 0.1 < metrics["highway/cosine"] < 0.9999


def test_at_full_iterations_nothing_is_left():
    estimator = HighwayBP(iterations=4, cosine_every=1).bind(dropout_net(), cross_entropy)
    estimator.backward(*batch(0))
    metrics = estimator.metrics()
    assert metrics["highway/cosine"] == pytest.approx(1)
    assert metrics["highway/relative_error"] < 1e-12


def test_it_is_measured_when_asked_and_forgotten_with_the_epoch():
    estimator = HighwayBP(iterations=1, cosine_every=3, exact_from=1).bind(dropout_net(), cross_entropy)
    calls = []
    estimator.model.register_forward_hook(lambda *_: calls.append(0))  # the estimate itself runs the blocks apart
    for i in range(7):
        estimator.backward(*batch(i))
    assert len(calls) == 3, "steps 0, 3 and 6"
    assert "highway/cosine" in estimator.metrics()
    estimator.start_epoch(1)
    assert "highway/cosine" not in estimator.metrics(), "the epoch is plain backprop"


def test_a_gradient_that_only_one_has_counts():
    one, two = torch.tensor([3.0, 4.0]), torch.tensor([5.0])
    cosine, error = agreement([one, None, None], [one, two, None]).tolist()
    assert (cosine, error) == pytest.approx((25 / (5 * 50**0.5), 5 / 50**0.5))
    assert agreement([None], [None]).isnan().all()


def test_an_optimizer_in_the_backward_is_refused():
    model = dropout_net()
    estimator = HighwayBP(iterations=1, cosine_every=1).bind(model, cross_entropy)
    next(model.parameters()).register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(ValueError, match="an optimizer that runs in the backward"):
        estimator.backward(*batch(0))


def test_the_comparison_is_no_part_of_counted_flops():
    counts = set()
    for every in (0, 1, 4):
        method = HighwayBP(iterations=1, cosine_every=every)
        task = Task("digits", "resnet_tiny", {"limit": 64}, {"blocks": 2, "width": 4})
        run = Run(RunConfig(task, Recipe(epochs=1, batch_size=16), method))
        counts.add(run.train_epoch().flops_executed)
        assert ("highway/cosine" in run.estimator.metrics()) == bool(every)
    assert len(counts) == 1, counts
    assert uncompared(LayerDropBack(inner=DDG(cosine_every=3))) == LayerDropBack(inner=DDG())


def test_hooks_are_told_and_random_numbers_go_on_where_the_step_left_them():
    model, (x, y), told = dropout_net(), batch(0), []
    model.register_forward_hook(lambda *_: told.append(measuring()))

    def step():
        cross_entropy(model(x), y).backward()
        torch.rand(3)  # which backprop does not draw

    torch.manual_seed(0)
    step()
    want = torch.get_rng_state()
    torch.manual_seed(0)
    beside_backprop(model, [x.device], step, lambda: cross_entropy(model(x), y))
    assert torch.equal(torch.get_rng_state(), want)
    assert told == [False, False, True]


def test_nothing_waits_for_the_device():
    from test_no_waiting import _Reading

    model = dropout_net()
    x, y = batch(0)
    loss = lambda: cross_entropy(model(x), y)  # noqa: E731
    with _Reading():
        beside_backprop(model, [x.device], lambda: loss().backward(), loss)
