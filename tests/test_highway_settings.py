"""Highway-BP's iterations as settings: schedules over epochs, adaptive rounds, min-residual, post-LN blocks."""

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastbp import Backprop, Chain, DecorrelatedBP, HighwayBP, LayerDropBack, Residual
from fastbp.chain import Add, AddNorm
from fastbp.config import RunConfig, Task
from fastbp.costs import measure_costs
from fastbp.nets import gpt_tiny
from fastbp.recipe import Recipe
from fastbp.run import Run
from fastbp.testing import check_method, small_batch, small_net
from reference import highway as twin
from test_highway import T3_X, assert_printed, gradients, half_square, net_and_batch, scalar_chain, t3_chain

SCHEDULED = HighwayBP(iterations=3, gamma=0.2, growing_epochs=3, gamma_epochs=2, exact_from=4)
SETTINGS = [
    SCHEDULED,
    HighwayBP(iterations=3, tolerance=0.05),
    HighwayBP(iterations=2, combination="min_residual"),
    HighwayBP(iterations=2, gamma=0.1, batched=True),
]


@pytest.mark.parametrize(
    "method",
    [
        SETTINGS[0],
        *(
            pytest.param(method, marks=pytest.mark.long)
            for method in (
                *SETTINGS[1:3],
                LayerDropBack(unit="block", inner=SETTINGS[1]),
                DecorrelatedBP(decor_lr=1e-2, inner=SETTINGS[2]),
            )
        ),
    ],
    ids=str,
)
def test_method_conforms(method):
    check_method(method)


def bound(method, make=small_net):
    torch.manual_seed(7)
    return method.bind(make(), cross_entropy)


def per_epoch(method, epochs):
    estimator = bound(method)
    rows = []
    for epoch in range(epochs):
        plan = estimator.start_epoch(epoch)
        rows.append((estimator.schedule.iterations, round(estimator.schedule.gamma, 3), plan.kind))
    return rows


def test_iterations_and_gamma_follow_the_epochs():
    assert per_epoch(SCHEDULED, 6) == [
        (1, 0.0, "k=1"),
        (2, 0.1, "k=2"),
        (3, 0.2, "k=3"),
        (3, 0.2, "k=3"),
        (3, 0.2, "exact"),
        (3, 0.2, "exact"),
    ]
    assert per_epoch(HighwayBP(iterations=5, growing_epochs=10), 11) == [
        (k, 0.0, f"k={k}") for k in (1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5)
    ]
    assert per_epoch(HighwayBP(iterations=2), 2) == [(2, 0.0, "")] * 2, "constant epochs are all of one kind"
    assert per_epoch(HighwayBP(iterations=0, growing_epochs=2), 2) == [(0, 0.0, "k=0")] * 2


def one_step(method, epoch, make=small_net):
    """The gradients of the first step of an epoch, dropout off."""
    estimator = bound(method, make)
    for module in estimator.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    estimator.start_epoch(epoch)
    loss = estimator.backward(*small_batch(0, 8))
    return loss, {name: p.grad for name, p in estimator.model.named_parameters()}


@pytest.mark.parametrize(
    ("epoch", "same_as"),
    [(0, HighwayBP(iterations=1)), (1, HighwayBP(2, 0.1)), (3, HighwayBP(3, 0.2)), (4, Backprop())],
)
def test_a_scheduled_step_is_that_of_the_constant_setting(epoch, same_as):
    loss, got = one_step(SCHEDULED, epoch)
    want_loss, want = one_step(same_as, 0)
    assert torch.equal(loss, want_loss)
    for name, grad in want.items():
        assert torch.equal(got[name], grad), f"epoch {epoch}: {name} is not that of {same_as}"


def chain_of(J, size=3, blocks=6):
    """h_i = h + J h for a random J of the given spectral norm."""
    torch.manual_seed(1)
    chain = Chain(nn.Linear(2, size), [Residual(nn.Linear(size, size)) for _ in range(blocks)], nn.Identity()).double()
    for block in chain.residuals():
        weight = block.branch.weight.data
        weight.mul_(J / torch.linalg.matrix_norm(weight, 2))
    return chain


def ratios_by_hand(chain, x, y, k, gamma):
    """|d^m| / |w^m| of the rounds from dense Jacobians; d^m = w^m - w^{m-1}."""
    J, K, states = twin.jacobians(chain, chain.stem(x).detach(), gamma)
    last = states[-1].clone().requires_grad_()
    (g,) = torch.autograd.grad(cross_entropy(last, y), last)
    sources = [torch.zeros(h.numel(), dtype=h.dtype) for h in states[:-1]] + [g.flatten()]
    w = [torch.cat(twin.path_sum(J, K, sources, m)) for m in range(k + 1)]
    return [((b - a).norm() / b.norm()).item() for a, b in pairwise(w)]


@pytest.mark.parametrize("combination", ["sum", "min_residual"])
def test_metrics_are_the_norms_of_the_increments(combination):
    chain, (x, y) = chain_of(0.3), (torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 1]))
    estimator = HighwayBP(iterations=4, gamma=0.1, combination=combination).bind(chain, cross_entropy)
    estimator.start_epoch(0)
    assert estimator.metrics() == {"highway/iterations": 4.0}, "nothing was measured yet"
    estimator.backward(x, y)
    want = ratios_by_hand(chain, x, y, 4, 0.1)
    got = estimator.metrics()
    assert got["highway/last_increment"] == pytest.approx(want[-1], rel=1e-9), want
    assert got["highway/largest_increment"] == pytest.approx(max(want), rel=1e-9), want


def test_tolerance_decides_between_epochs_and_measures_rarely():
    chain, (x, y) = chain_of(0.1), (torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 1]))
    ratios = ratios_by_hand(chain, x, y, 5, 0.0)
    assert ratios == sorted(ratios, reverse=True), ratios
    method = HighwayBP(iterations=5, tolerance=(ratios[1] + ratios[2]) / 2)
    estimator = method.bind(chain, cross_entropy)
    assert estimator.start_epoch(0).kind == "k=5"
    grads = []
    for _ in range(2):
        chain.zero_grad()
        estimator.backward(x, y)
        grads.append(chain.stem.weight.grad.clone())
    assert torch.equal(*grads), "the measuring step and the next one run the same rounds"
    assert estimator.start_epoch(1).kind == "k=3", ratios
    assert estimator.metrics()["highway/iterations"] == 3.0
    three = gradients(chain, x, y, HighwayBP(iterations=3))[1]["stem.weight"]
    for step in range(2):
        chain.zero_grad()
        estimator.backward(x, y)
        assert torch.equal(chain.stem.weight.grad, three), f"step {step}: measured or not, an epoch has one k"
    asked, combine = [], estimator.combine
    estimator.combine = lambda tapes, g, k, measure: asked.append((k, measure)) or combine(tapes, g, k, measure=measure)
    for step in range(2, 201):
        estimator.backward(x, y)
        assert isinstance(estimator.schedule._seen, torch.Tensor), f"step {step} read the norms back"
    want = [(3, step % 100 == 0) for step in range(2, 201)]
    assert asked == want, [pair for pair in zip(asked, want, strict=True) if pair[0] != pair[1]]
    assert estimator.start_epoch(2).kind == "k=3", "three rounds still are enough"
    harder = chain_of(0.3)
    chain.load_state_dict(harder.state_dict())
    estimator.backward(x, y)
    assert estimator.start_epoch(3).kind == "k=5", (
        "three rounds no longer are: all run, and the next epoch chooses anew"
    )


def test_tolerance_never_exceeds_a_growing_schedule_and_keeps_all_rounds_where_nothing_converges():
    chain, (x, y) = chain_of(0.1), (torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 2, 1]))
    estimator = HighwayBP(iterations=4, tolerance=1e-9, growing_epochs=2).bind(chain, cross_entropy)
    kinds = []
    for epoch in range(3):
        kinds.append(estimator.start_epoch(epoch).kind)
        estimator.backward(x, y)
    assert kinds == ["k=2", "k=4", "k=4"]


def test_cancelling_blocks_show_in_the_metrics():
    """T2's chain with J = -0.2: the increments grow before they fall; gamma = 0.2 leaves nothing to cancel."""
    one = torch.ones(1, 1, dtype=torch.float64)
    found = {}
    for gamma in (0.0, 0.2):
        chain = scalar_chain(-0.2, 24)
        estimator = HighwayBP(iterations=3, gamma=gamma).bind(chain, lambda h, y: (h * y).sum())
        estimator.backward(one, one)
        found[gamma] = estimator.metrics()["highway/largest_increment"]
    assert found[0.0] > 1, found
    assert found[0.2] < 1e-12, found


@pytest.mark.parametrize("tolerance", [0.0, 0.05])
def test_resumes_with_the_rounds_it_had(tolerance):
    method = HighwayBP(iterations=4, tolerance=tolerance)
    first, second = bound(method), bound(method)
    first.start_epoch(0)
    first.backward(*small_batch(0, 8))
    state = first.state_dict()
    assert bool(state) == bool(tolerance)
    second.load_state_dict(state)
    assert second.start_epoch(1) == first.start_epoch(1)
    assert second.schedule.iterations == first.schedule.iterations
    if not tolerance:
        with pytest.raises(ValueError, match="keeps no state"):
            second.load_state_dict({"increments": [0.1]})


def test_min_residual_tames_the_cancelling_chain():
    """The scalar chain is one Krylov space: the least-squares solution over |states 1..L| by an explicit solve."""
    blocks, k, g = 8, 3, 1.0
    chain = scalar_chain(-0.9, blocks)
    estimator = HighwayBP(iterations=k, combination="min_residual").bind(chain, lambda h, y: (h * y).sum())
    one = torch.ones(1, 1, dtype=torch.float64)
    estimator.backward(one, one)
    J = [torch.full((1, 1), -0.9, dtype=torch.float64)] * blocks
    K = [torch.ones(1, 1, dtype=torch.float64)] * blocks
    sources = [torch.zeros(1, dtype=torch.float64)] * blocks + [torch.full((1,), g, dtype=torch.float64)]
    w = torch.stack([torch.cat(twin.path_sum(J, K, sources, m)) for m in range(k + 1)])
    d = torch.cat([w[:1], w[1:] - w[:-1]])
    columns = (d[:-1] - d[1:])[:, 1:].T
    c = torch.linalg.lstsq(columns, d[0, 1:, None]).solution[:, 0]
    want = d[0] + c @ d[1:]
    got = torch.stack([chain.stem.b.grad, *(b.branch.bias.grad for b in chain.residuals())])[:, 0]
    assert torch.allclose(got, want, rtol=1e-6, atol=1e-9), f"{got} against the explicit solution {want}"
    exact = torch.cat(twin.path_sum(J, K, sources, blocks))
    assert (got - exact).norm() < 0.1 * (w[k] - exact).norm(), "no better than the plain sum"


def test_min_residual_on_T3():
    chain = t3_chain()
    chain.zero_grad()
    half_square(chain(T3_X), None).backward()
    parts = [block.branch[0].weight for block in chain.residuals()]
    exact = torch.cat([p.grad.flatten() for p in parts])
    errors = []
    for k in range(7):
        chain.zero_grad()
        HighwayBP(iterations=k, combination="min_residual").bind(chain, half_square).backward(T3_X, T3_X)
        errors.append(((torch.cat([p.grad.flatten() for p in parts]) - exact).norm() / exact.norm()).item())
    assert_printed(errors[:2], "2.2276e-1 2.0e-2", "theta error with min_residual")
    assert errors[6] < 1e-12, f"exact at k = L: {errors}"


@pytest.mark.parametrize("name", ["conv", "vit", "tanh"])
def test_min_residual_is_backprop_at_full_iterations(name):
    chain, x, y = net_and_batch(name)
    plain = copy.deepcopy(chain)
    cross_entropy(plain(x), y).backward()
    _, got = gradients(chain, x, y, HighwayBP(iterations=len(chain.blocks), combination="min_residual"))
    for key, p in plain.named_parameters():
        assert (got[key] - p.grad).norm() <= 1e-10 * p.grad.norm().clamp_min(1e-6), key


@pytest.mark.parametrize("method", [replace(SETTINGS[2], iterations=2), SETTINGS[3]], ids=["min_residual", "batched"])
def test_scales_with_the_loss_and_accumulates(method):
    chain, x, y = net_and_batch("vit")
    _, once = gradients(chain, x, y, method)
    big = lambda h, t: 1024 * cross_entropy(h, t)  # noqa: E731
    _, scaled = gradients(chain, x, y, method, big)
    for key, grad in once.items():
        assert torch.equal(1024 * grad, scaled[key]), f"{key} does not scale with the loss"
    method.bind(chain, big).backward(x, y)
    for key, p in chain.named_parameters():
        assert torch.equal(p.grad, 2 * scaled[key]), f"{key} does not accumulate"


class NaiveK(nn.Module):
    """x and z to LayerNorm(x + z), written out."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def parts(self, x, z):
        s = x + z
        mean = s.mean(-1, keepdim=True)
        sigma = ((s - mean).square().mean(-1, keepdim=True) + self.norm.eps).sqrt()
        return s, mean, sigma


@pytest.mark.parametrize("gamma", [0.0, 0.2, 1.0])
def test_post_ln_keeps_the_diagonal_and_leaves_the_rest_to_the_branch(gamma):
    """Against dense Jacobians: K = diag(alpha / sigma), J all the rest."""
    torch.manual_seed(2)
    chain = gpt_tiny((3,), 5, dim=4, depth=1, heads=2, mlp_ratio=1, norm="post").double()
    for block in chain.residuals():
        assert type(block.merge) is AddNorm
        nn.init.normal_(block.merge.norm.weight)
        for p in block.branch.parameters():
            nn.init.normal_(p, std=0.5)
    x, y = torch.tensor([[0, 2, 4]]), torch.tensor([[1, 3, 0]])
    loss_fn = lambda out, t: cross_entropy(out.flatten(0, 1), t.flatten())  # noqa: E731
    for k in range(3):
        want = twin.gradients(chain, x, y, loss_fn, k, gamma)
        _, got = gradients(chain, x, y, HighwayBP(iterations=k, gamma=gamma), loss_fn)
        for key, grad in got.items():
            error = (grad - want[key]).norm() / want[key].norm().clamp_min(1e-6)
            assert error < 1e-11, f"k={k}: {key} differs from the sum over paths by {error:.3g}"
    plain = copy.deepcopy(chain)
    plain.zero_grad()
    loss_fn(plain(x), y).backward()
    for key, p in plain.named_parameters():
        assert (got[key] - p.grad).norm() <= 1e-12 * p.grad.norm().clamp_min(1e-6), f"{key} at k = L"


def test_add_norm_scale_and_refusal():
    norm = nn.LayerNorm(5, dtype=torch.float64)
    nn.init.normal_(norm.weight)
    x, z = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    _, _, sigma = NaiveK(norm).parts(x, z)
    torch.testing.assert_close(AddNorm(norm).scale(x, z), norm.weight / sigma)
    plain = nn.LayerNorm(5, elementwise_affine=False, dtype=torch.float64)
    torch.testing.assert_close(AddNorm(plain).scale(x, z), 1 / NaiveK(plain).parts(x, z)[2])
    with pytest.raises(TypeError, match=r"^AddNorm: norm must be an nn.LayerNorm, got BatchNorm1d$"):
        AddNorm(nn.BatchNorm1d(5))
    assert type(gpt_tiny((3,), 5).residuals()[0].merge) is Add
    with pytest.raises(ValueError, match="gpt_tiny: norm = 'mid': must be pre or post"):
        gpt_tiny((3,), 5, norm="mid")


def test_a_run_warms_up_and_counts_every_number_of_rounds():
    task = Task("digits", "mlp", {"limit": 64}, {"depth": 3, "width": 8})
    run = Run(RunConfig(task, Recipe(epochs=4, batch_size=16), replace(SCHEDULED, exact_from=3)))
    counts = []
    while not run.done:
        record = run.train_epoch()
        counts.append(record.flops_executed - sum(counts))
    assert run.rehearsal.kinds == ["16 k=1", "16 k=2", "16 k=3", "16 exact"]
    assert counts[0] < counts[1] < counts[2], counts
    assert counts[3] < counts[0], "an exact epoch is plain backprop"
    assert record.metrics == {"highway/iterations": 3.0}


def test_rounds_that_a_tolerance_saves_are_not_counted():
    task = Task("digits", "mlp", {"limit": 64}, {"depth": 3, "width": 8})
    config = RunConfig(task, Recipe(epochs=3, batch_size=16), HighwayBP(iterations=3, tolerance=10.0))
    run = Run(config)
    flops = [run.train_epoch().flops_executed for _ in range(3)]
    rounds = {k: Run(replace(config, method=HighwayBP(iterations=k))).train_epoch().flops_executed for k in (1, 3)}
    assert run.rehearsal.kinds == ["16 k=3"] * 3, "nothing is known before training"
    assert flops == [rounds[3], rounds[3] + rounds[1], rounds[3] + 2 * rounds[1]], (flops, rounds)
    run.rewind(1)
    assert run.rehearsal.kind(run.estimator.start_epoch(1)) == "16 k=3", "timed as planned"
    ((_, cost),) = measure_costs({"adaptive": config.method}, small_net, cross_entropy, *small_batch(0, 8))
    assert set(cost.step_flops) == {"k=3"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"growing_epochs": -1}, "HighwayBP.growing_epochs = -1: must not be negative; 0 is constant iterations"),
        ({"gamma_epochs": -1}, "HighwayBP.gamma_epochs = -1: must not be negative; 0 is constant gamma"),
        ({"exact_from": -2}, "HighwayBP.exact_from = -2: must not be negative; 0 is never"),
        ({"tolerance": -0.1}, "HighwayBP.tolerance = -0.1: must not be negative; 0 runs all iterations"),
        (
            {"combination": "minres"},
            "HighwayBP.combination = 'minres': must be one of sum, min_residual; did you mean min_residual?",
        ),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match="HighwayBP") as caught:
        HighwayBP(**settings)
    assert str(caught.value) == message
