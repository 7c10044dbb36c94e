"""DecorrelatedBP: the trajectory of two explicit stages, the printed tables, and surgery that leaves no trace."""

import copy
import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastbp import DDG, Backprop, DecorrelatedBP
from fastbp.layer_inputs import input_rows
from fastbp.methods.decorrelated import decorrelation_of
from fastbp.whitening import Decorrelation, Layout, Rule, decorrelation_losses, top_eigenvalue, update_direction
from reference import decorrelated as twin

F64 = torch.float64
cross_entropy = nn.functional.cross_entropy


def net(dtype=F64, seed=0):
    torch.manual_seed(seed)
    body = [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, groups=2, bias=False)]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def batches(count, dtype=F64, seed=1, size=6):
    g = torch.Generator().manual_seed(seed)
    shape = (size, 2, 6, 6)
    return [
        (torch.randn(shape, generator=g, dtype=dtype), torch.randint(0, 3, (size,), generator=g)) for _ in range(count)
    ]


def train(estimator, optimizer, data):
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        losses.append(estimator.backward(x, y).item())
        optimizer.step()
    return losses


def plain_weights(model):
    """The trained tensors W and b under the plain names, while parametrized."""
    return {n.replace("parametrizations.weight.original", "weight"): p for n, p in model.named_parameters()}


def R_of(layer):
    D = decorrelation_of(layer).D
    return torch.eye(D.shape[-1], dtype=D.dtype) + D


def rows_of(covariance):
    """F rows whose second moment is exactly the covariance, shape (1, F, F)."""
    return (len(covariance) ** 0.5 * torch.linalg.cholesky(covariance).T).unsqueeze(0)


def second_moment(covariance, D):
    R = torch.eye(len(covariance), dtype=F64) + D
    return R @ covariance @ R.T


def matrix_of(width, groups=1):
    return Decorrelation(Layout(groups, 1, width, 1), torch.zeros(1, dtype=F64))


def whiten(matrix, rows, decor_lr, kappa):
    rule = Rule(decor_lr, kappa)
    matrix.D = rule.next_D(matrix.D, rule.direction(rows, matrix.D), None)


# --- trajectories -----------------------------------------------------------------------------------------------


def test_trajectory_is_the_two_stage_twins():
    model, kappa = net(), 0.3
    slow = twin.two_stage(model)
    estimator = DecorrelatedBP(decor_lr=0.02, kappa=kappa, sample_fraction=1.0).bind(model, cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for t, (x, y) in enumerate(batches(8)):
        want = twin.step(slow, x, y, cross_entropy, 0.1, 0.02, kappa)
        got = train(estimator, optimizer, [(x, y)])[0]
        assert abs(got - want) < 1e-12, f"step {t}: loss {got}, the twin's {want}"
    for layer, stages in zip(model, slow, strict=True):
        if isinstance(stages, twin.TwoStageLinear | twin.TwoStageConv):
            torch.testing.assert_close(R_of(layer), torch.stack(stages.R), rtol=1e-11, atol=1e-12)
            W = layer.parametrizations.weight.original
            torch.testing.assert_close(W.data, stages.W.data, rtol=1e-11, atol=1e-12)
            assert (R_of(layer)[0] - torch.eye(len(stages.R[0]))).abs().max() > 1e-3, "R barely moved"


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_exact_is_backprop_to_the_bit(dtype):  # I1
    ours, plain = net(dtype), net(dtype)
    method = DecorrelatedBP(decor_lr=1e-3).exact(ours)
    assert method == DecorrelatedBP(decor_lr=0.0), f"exact is {method}"
    one, two = method.bind(ours, cross_entropy), Backprop().bind(plain, cross_entropy)
    data = batches(6, dtype)
    got = train(one, torch.optim.Adam(ours.parameters(), 1e-2), data)
    want = train(two, torch.optim.Adam(plain.parameters(), 1e-2), data)
    assert got == want, f"losses {got} instead of {want}"
    for name, p in plain.named_parameters():
        assert torch.equal(plain_weights(ours)[name], p), f"{name} differs from backprop"


def test_gradient_goes_through_R():  # I2, I3
    model = net()
    estimator = DecorrelatedBP(decor_lr=0.0, sample_fraction=1.0).bind(model, cross_entropy)
    for layer in estimator.layers.values():
        D = decorrelation_of(layer).D
        decorrelation_of(layer).D = 0.3 * torch.randn_like(D)
    folded = net()
    for layer, plain in zip(model, folded, strict=True):
        if hasattr(plain, "weight"):
            plain.weight.data.copy_(layer.weight)  # A = W R
    x, y = batches(1)[0]
    x_ours, x_plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    loss = cross_entropy(model(x_ours), y)
    loss.backward()
    cross_entropy(folded(x_plain), y).backward()
    torch.testing.assert_close(x_ours.grad, x_plain.grad, rtol=1e-14, atol=1e-15)
    for layer, plain in zip(model, folded, strict=True):
        if hasattr(plain, "weight"):
            R = R_of(layer)
            gA = plain.weight.grad.reshape(len(R), -1, R.shape[-1])
            gW = layer.parametrizations.weight.original.grad
            torch.testing.assert_close(gW, (gA @ R.mT).reshape(gW.shape), rtol=1e-13, atol=1e-15)
    W = torch.randn(4, 2, 3, dtype=F64, requires_grad=True)
    matrix = Decorrelation(Layout(2, 1, 6, 1), W)
    matrix.D = torch.randn(2, 6, 6, dtype=F64)
    assert torch.autograd.gradcheck(matrix, (W,)), "gradcheck of W R"


# --- the rule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [3, 7, 8, 40])
@pytest.mark.parametrize("kappa", [0.0, 0.3, 1.0])
def test_update_equals_the_explicit_matrix(n, kappa):  # I5, I12
    torch.manual_seed(n)
    rows, D = torch.randn(2, n, 8, dtype=F64), 0.5 * torch.randn(2, 8, 8, dtype=F64)
    got = update_direction(rows, D, 1 - kappa, kappa)
    for g in range(2):
        R = torch.eye(8, dtype=F64) + D[g]
        z = rows[g] @ R.T
        want = R - twin.whiten(R, z.T @ z / n, 1.0, kappa)
        error = (got[g] - want).norm() / want.norm()
        assert error < 1e-14, f"n={n}, F=8, kappa={kappa}: M R is off by {error:.3g}"


CLOSED_FORM = {
    (0.0, 1): "1 -0.09 0.8461 0.72729",
    (0.0, 10): "1.102496798 -0.492145999 0.481045976 0.2268",
    (0.5, 1): "1 -0.045 0.921025 0.8118225",
    (0.5, 10): "1.153163706 -0.362232499 0.709114848 0.4795",
}


@pytest.mark.parametrize(("kappa", "steps"), CLOSED_FORM)
def test_closed_form_table(kappa, steps):
    covariance = torch.tensor([[1, 0.9], [0.9, 1]], dtype=F64)
    matrix = matrix_of(2)
    for _ in range(steps):
        whiten(matrix, rows_of(covariance), 0.1, kappa)
    K = second_moment(covariance, matrix.D[0])
    got = [1 + matrix.D[0, 0, 0].item(), matrix.D[0, 0, 1].item(), K[0, 0].item(), K[0, 1].item()]
    for value, text in zip(got, CLOSED_FORM[kappa, steps].split(), strict=True):
        digits = len(text.partition(".")[2])
        assert f"{value:.{digits}f}" == text, f"R11, R12, var, cov after {steps}: {got}, printed {text}"


def equicorrelated(width, rho, dtype=F64):
    return torch.full((width, width), rho, dtype=dtype).fill_diagonal_(1.0)


def toeplitz(width, rho):
    i = torch.arange(width)
    return (rho ** (i[:, None] - i).abs()).to(F64)


def test_decorrelation_never_raises_and_keeps_the_volume():  # I6
    covariance, drifts = toeplitz(16, 0.8), []
    rows = rows_of(covariance)
    for eps in (4e-3, 2e-3):
        matrix = matrix_of(16)
        last = (math.inf, math.inf)
        for t in range(300):
            K = second_moment(covariance, matrix.D[0])
            now = ((K - K.diagonal().diag()).norm().item(), K.trace().item())
            assert now[0] <= last[0], f"step {t}: |C| rises from {last[0]} to {now[0]}"
            assert now[1] <= last[1], f"step {t}: trace K rises from {last[1]} to {now[1]}"
            last = now
            whiten(matrix, rows, eps, 0.0)
        drifts.append(torch.linalg.slogdet(torch.eye(16, dtype=F64) + matrix.D[0])[1].item())
    per_time = drifts[0] / drifts[1]
    assert drifts[0] < 0, f"log det R drifts by {drifts}"
    assert drifts[0] > -0.05, f"log det R drifts by {drifts}"
    assert 1.5 < per_time < 4.5, f"the drift is not second order: {drifts}"


def test_rates_near_whiteness():  # I7
    eps, kappa = 0.01, 0.2
    E = 1e-6 * torch.randn(5, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    covariance = torch.eye(5, dtype=F64) + E + E.T
    matrix = matrix_of(5)
    whiten(matrix, rows_of(covariance), eps, kappa)
    before, after = covariance - torch.eye(5), second_moment(covariance, matrix.D[0]) - torch.eye(5)
    ratio = after / before
    off = ratio[~torch.eye(5, dtype=torch.bool)]
    assert (off - 0.9840).abs().max() < 5e-5, f"off-diagonal ratios {off.tolist()}"
    diagonal = ratio.diagonal()
    assert (diagonal - 0.9960).abs().max() < 5e-5, f"variance ratios {diagonal.tolist()}"


def test_limits():  # I8
    covariance = toeplitz(4, 0.7)
    rows = rows_of(covariance)
    values, vectors = torch.linalg.eigh(covariance)
    for kappa in (0.5, 0.2, 0.0):
        matrix = matrix_of(4)
        for _ in range(4000):
            whiten(matrix, rows, 0.05 if kappa else 0.005, kappa)
        K, R = second_moment(covariance, matrix.D[0]), torch.eye(4, dtype=F64) + matrix.D[0]
        if kappa == 0.5:
            root = vectors @ torch.diag(values**-0.5) @ vectors.T
            assert (R - root).abs().max() < 1e-13, f"kappa 1/2 is {(R - root).abs().max():.3g} from Sigma^(-1/2)"
        if kappa:
            assert (K - torch.eye(4)).abs().max() < 1e-12, f"kappa {kappa}: K = {K}"
        else:
            off = (K - K.diagonal().diag()).abs().max()
            assert off < 1e-6, f"kappa 0: off-diagonal {off:.3g}"
            ratio = (K.diagonal().prod() / torch.linalg.det(covariance)).item()
            assert abs(ratio - 1) < 0.05, f"kappa 0: the volume changes by {ratio}"


def test_stability_bound_and_its_warning():  # I9
    covariance = equicorrelated(64, 0.5)
    rows = rows_of(covariance)
    top = top_eigenvalue(rows).item()
    assert abs(top - 31.5) < 1e-6, f"top eigenvalue {top}, not 31.5"

    def off_diagonal(step, updates):
        matrix = matrix_of(64)
        for _ in range(updates):
            whiten(matrix, rows, step / 31.5, 0.0)
        K = second_moment(covariance, matrix.D[0])
        return (K - K.diagonal().diag()).norm().item(), matrix.D[0]

    start = off_diagonal(1.95, 0)[0]
    assert off_diagonal(1.95, 60)[0] < start, "1.95 must converge"
    assert not off_diagonal(2.05, 8)[0] < start, "2.05 must diverge"
    logdet = torch.linalg.slogdet(torch.eye(64, dtype=F64) + off_diagonal(1.0, 1)[1])[1].item()
    assert logdet < -30, f"at 1.0 the top direction is destroyed, log det R is {logdet}"


def test_warns_once_where_the_rule_would_diverge():
    model = nn.Sequential(nn.Linear(64, 2)).double()
    method = DecorrelatedBP(decor_lr=0.05, sample_fraction=1.0)
    estimator = method.bind(model, nn.functional.mse_loss)
    x = rows_of(equicorrelated(64, 0.5))[0]
    estimator.backward(x, torch.zeros(64, 2, dtype=F64))
    with pytest.warns(UserWarning, match=r"^DecorrelatedBP\.decor_lr = 0\.05 is too large for layer 0: ") as caught:
        metrics = estimator.metrics()
    assert len(caught) == 1
    assert abs(metrics["dbp/step_x_top_eigenvalue"] - 0.05 * 31.5) < 1e-6, f"metrics {metrics}"
    assert metrics["dbp/rms_D_max"] > 0, f"metrics {metrics}"
    estimator.metrics()  # no second warning: warnings are errors
    advised = float(str(caught[0].message).rpartition("use at most ")[2])
    estimator = replace(method, decor_lr=advised).bind(nn.Sequential(nn.Linear(64, 2)).double(), nn.functional.mse_loss)
    estimator.backward(x, torch.zeros(64, 2, dtype=F64))
    assert 0.1 < estimator.metrics()["dbp/step_x_top_eigenvalue"] < 0.5, f"advised {advised}, and no warning"


OPTIMISATION = {
    (0.02, None): [26, 693, 2375, 4342],
    (0.05, None): [11, 277, 950, 1736],
    (0.1, (1e-3, 0.0)): [8, 126, 385, 683],
    (0.1, (1e-2, 0.5)): [6, 79, 150, 347],
}


def regression(lr, decorrelation, limit):
    """First steps at which loss over initial loss is below 1e-1 .. 1e-4, and the ratio when it stopped."""
    torch.manual_seed(0)
    T = torch.randn(4, 32, dtype=F64)
    rows = rows_of(toeplitz(32, 0.95))[0]
    model = nn.Sequential(nn.Linear(32, 4, bias=False, dtype=F64))
    model[0].weight.data.zero_()
    method = Backprop()
    if decorrelation is not None:
        method = DecorrelatedBP(decor_lr=decorrelation[0], kappa=decorrelation[1], sample_fraction=1.0)
    estimator = method.bind(model, lambda out, y: (out - y).square().sum() / (2 * len(y)))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    target, first, steps, ratio = rows @ T.T, None, [], 0.0
    for t in range(limit):
        optimizer.zero_grad()
        loss = estimator.backward(rows, target).item()
        first = loss if first is None else first
        ratio = loss / first
        while len(steps) < 4 and ratio < 10.0 ** -(1 + len(steps)):
            steps.append(t)
        if len(steps) == 4 or not ratio < 1e6:
            break
        optimizer.step()
    return steps, ratio


@pytest.mark.parametrize(("lr", "decorrelation"), OPTIMISATION)
def test_optimisation_table(lr, decorrelation):
    steps, _ = regression(lr, decorrelation, 5000)
    assert steps == OPTIMISATION[lr, decorrelation], f"steps to 1e-1 .. 1e-4: {steps}"


@pytest.mark.parametrize(("lr", "decorrelation"), [(0.1, None), (0.5, (1e-2, 0.5)), (0.5, (1e-3, 0.0))])
def test_optimisation_table_diverges(lr, decorrelation):
    _, ratio = regression(lr, decorrelation, 5000)
    assert ratio > 1e6 or math.isnan(ratio), f"loss ratio {ratio}: expected to diverge"


def test_reported_loss():
    rows, D = torch.randn(1, 30, 5, dtype=F64), 0.1 * torch.randn(1, 5, 5, dtype=F64)
    z = rows[0] @ (torch.eye(5, dtype=F64) + D[0]).T
    K = z.T @ z / 30
    C = K - K.diagonal().diag()
    want = (0.7 * C.square().sum() + 0.3 * (K.diagonal() - 1).square().sum()) / 25
    torch.testing.assert_close(decorrelation_losses(rows, D, 0.3)[0], want)


# --- rows and samples -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(
    "shape",
    [
        dict(kernel_size=3, padding=1),
        dict(kernel_size=(3, 2), stride=(2, 1), padding=(1, 2)),
        dict(kernel_size=2, stride=2, dilation=2, groups=2),
        dict(kernel_size=3, padding=1, groups=4),
    ],
)
def test_rows_are_the_patches(mode, shape):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, padding_mode=mode, dtype=F64, **shape)
    x = torch.randn(2, 4, 7, 6, dtype=F64)
    rows = input_rows(layer, x)
    want = torch.stack(twin.patches(layer, x))
    assert torch.equal(rows, want), "input_rows differ from the patches cut out in a loop"
    y = torch.einsum("gnf,gof->gno", rows, layer.weight.reshape(layer.groups, -1, rows.shape[-1]))
    out = layer(x) - layer.bias[:, None, None]
    y = y.unflatten(1, (2, -1)).permute(1, 0, 3, 2).reshape(out.shape)
    torch.testing.assert_close(y, out, rtol=1e-12, atol=1e-13)


def test_same_padding_and_unbatched_rows():
    layer = nn.Conv2d(2, 3, (5, 3), padding="same", dtype=F64)
    x = torch.randn(2, 5, 6, dtype=F64)
    rows = input_rows(layer, x)
    out = (rows[0] @ layer.weight.flatten(1).T + layer.bias).T.reshape(3, 5, 6)
    torch.testing.assert_close(out, layer(x))


def test_every_token_is_a_row_and_a_tiny_batch_still_gives_one():  # I11
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    estimator = DecorrelatedBP(decor_lr=0.1, sample_fraction=0.01).bind(model, nn.functional.mse_loss)
    seen = []
    for shape in ((1, 4), (3, 5, 4), (2, 3, 4, 4)):
        x = torch.randn(*shape[:-1], 8, dtype=F64)[..., ::2]  # not contiguous
        estimator.backward(x, torch.zeros(*shape[:-1], 2, dtype=F64))
        seen.append(decorrelation_of(model[0]).D.clone())
    assert all(bool(D.isfinite().all()) for D in seen), "a tiny sample gave NaN"
    assert all(bool(D.any()) for D in seen), "D did not move"


def test_sample_is_fresh_without_replacement_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 1)).double()
    estimator = DecorrelatedBP(sample_fraction=0.3).bind(model, nn.functional.mse_loss)
    kept = []
    model[0].register_forward_hook(lambda *_: kept.append(estimator.kept["0"][0].flatten().tolist()))
    x = torch.arange(10.0, dtype=F64).reshape(10, 1)
    state = torch.get_rng_state()
    for _ in range(6):
        estimator.backward(x, x)
    assert torch.equal(torch.get_rng_state(), state), "sampling used the global generator"
    assert all(len(set(rows)) == len(rows) == 3 for rows in kept), f"samples {kept}"
    assert len({tuple(rows) for rows in kept}) > 1, f"always the same sample {kept[0]}"


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3, dtype=F64)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x)))


def test_a_layer_called_twice_learns_from_both_calls():
    torch.manual_seed(0)
    model = _Twice()
    x = torch.randn(5, 3, dtype=F64)
    rows = torch.cat([x, torch.tanh(model.layer(x)).detach()])[None]
    DecorrelatedBP(decor_lr=0.1, kappa=0.2, sample_fraction=1.0).bind(model, nn.functional.mse_loss).backward(x, x)
    want = -0.1 * update_direction(rows, torch.zeros(1, 3, 3, dtype=F64), 0.8, 0.2)
    torch.testing.assert_close(decorrelation_of(model.layer).D, want, rtol=1e-12, atol=1e-13)


def test_interval():
    model = net()
    estimator = DecorrelatedBP(decor_lr=0.01, interval=4).bind(model, cross_entropy)
    changes = []
    for x, y in batches(9):
        before = decorrelation_of(model[0]).D
        estimator.backward(x, y)
        changes.append(not torch.equal(before, decorrelation_of(model[0]).D))
    assert changes == [t % 4 == 3 for t in range(9)], f"R moved in steps {changes}"


# --- surgery ----------------------------------------------------------------------------------------------------


def test_evaluation_optimizer_and_decay_leave_D_alone():  # I11
    model = net()
    estimator = DecorrelatedBP(decor_lr=0.01, sample_fraction=1.0).bind(model, cross_entropy)
    names = {n for n, _ in model.named_parameters()}
    assert not any(n.endswith(".D") for n in names), f"D is a parameter: {names}"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    data = batches(3)
    train(estimator, optimizer, data[:1])
    before = [decorrelation_of(layer).D for layer in estimator.layers.values()]
    old = [D.clone() for D in before]
    optimizer.step()
    model.eval()
    model(data[1][0])
    model.train()
    model(data[1][0])
    assert not estimator.kept, "an input was kept outside a step"
    for layer, D, was in zip(estimator.layers.values(), before, old, strict=True):
        assert decorrelation_of(layer).D is D, "D was replaced by something else than a step"
        assert torch.equal(D, was), "D was changed in place"
        assert not D.requires_grad
    estimator.backward(*data[2])
    for D, was in zip(before, old, strict=True):
        assert torch.equal(D, was), "an update of R wrote into the matrix that graphs may hold"


def test_state_dict_carries_D_and_resuming_is_exact(tmp_path):
    data = batches(7)
    method = DecorrelatedBP(decor_lr=0.02, kappa=0.2, sample_fraction=0.4, interval=2)
    one, two, three = net(), net(), net(seed=5)
    a = method.bind(one, cross_entropy)
    want = train(a, torch.optim.SGD(one.parameters(), 0.1), data)
    b = method.bind(two, cross_entropy)
    got = train(b, torch.optim.SGD(two.parameters(), 0.1), data[:3])
    torch.save({"model": two.state_dict(), "method": b.state_dict()}, tmp_path / "state.pt")
    torch.manual_seed(77)
    c = method.bind(three, cross_entropy)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    three.load_state_dict(state["model"])
    c.load_state_dict(state["method"])
    got += train(c, torch.optim.SGD(three.parameters(), 0.1), data[3:])
    assert got == want, f"resumed {got}, uninterrupted {want}"


def test_finalize_folds_without_a_trace():  # I4
    model, plain = net(torch.float32), net(torch.float32)
    original = dict(model.named_parameters())
    estimator = DecorrelatedBP(decor_lr=0.02).bind(model, cross_entropy)
    train(estimator, torch.optim.SGD(model.parameters(), 0.1), batches(5, torch.float32))
    x = batches(1, torch.float32)[0][0]
    before = model(x)
    assert estimator.finalize() is model
    assert torch.equal(model(x), before), "folding changes the output"
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()], "classes differ"
    names = [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in model.named_parameters()] == names, "parameter order differs"
    assert list(model.state_dict()) == list(plain.state_dict()), "keys differ"
    assert all(original[n] is p for n, p in model.named_parameters()), "another Parameter object"
    assert all(not m._forward_pre_hooks for m in model.modules()), "hooks stayed"
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(x), before), "pickling changes the output"
    for a, b in ((model[0], plain[0]), (model[2], plain[2])):
        assert str(a) == str(b), f"settings changed: {a}"


class _Odd(nn.Module):
    """A tied pair, an attention that reads a weight without calling its layer, a wide layer, one ordinary layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.wide, self.plain = nn.Linear(40, 2), nn.Linear(4, 10)

    def forward(self, x):
        x = self.b(self.a(x))
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.wide(self.plain(x).flatten(1))


def test_layers_that_stay_plain():
    torch.manual_seed(0)
    model = _Odd()
    message = "DecorrelatedBP leaves 1 layer(s) with more than max_features = 16 input features plain: wide (40)"
    with pytest.warns(UserWarning, match=r"^DecorrelatedBP leaves") as caught:
        estimator = DecorrelatedBP(max_features=16).bind(model, cross_entropy)
    assert [str(w.message) for w in caught] == [message]
    assert list(estimator.layers) == ["plain"], f"decorrelated: {list(estimator.layers)}"
    estimator.backward(torch.randn(3, 4, 4), torch.tensor([0, 1, 0]))
    assert model.a.weight is model.b.weight, "the tie is broken"
    assert bool(decorrelation_of(model.plain).D.any()), "the ordinary layer did not learn"


def test_frozen_weights_stay_plain_and_are_never_moved():
    model = net()
    for p in [*model[0].parameters(), model[4].bias]:
        p.requires_grad_(False)
    start = copy.deepcopy(model.state_dict())
    estimator = DecorrelatedBP(decor_lr=0.05).bind(model, cross_entropy)
    assert list(estimator.layers) == ["2", "4", "6"], f"decorrelated: {list(estimator.layers)}"
    train(estimator, torch.optim.SGD(model.parameters(), 0.1, weight_decay=0.1), batches(4))
    estimator.finalize()
    for name in ("0.weight", "0.bias", "4.bias"):
        assert torch.equal(model.state_dict()[name], start[name]), f"frozen {name} moved"
        assert not model.get_parameter(name).requires_grad, f"{name} was unfrozen"


def test_white_input_noise_floor():  # I10
    """Sampling noise keeps off-diagonals of the true K at sqrt(eps (1-kappa) / n)."""
    torch.manual_seed(0)
    eps, n, kappa, width = 0.05, 50, 0.5, 16
    matrix, squares = matrix_of(width), []
    off = ~torch.eye(width, dtype=torch.bool)
    for t in range(700):
        whiten(matrix, torch.randn(1, n, width, dtype=F64), eps, kappa)
        if t >= 200:
            squares.append(second_moment(torch.eye(width, dtype=F64), matrix.D[0])[off].square().mean())
    rms = torch.stack(squares).mean().sqrt().item()
    assert abs(rms / 0.0224 - 1) < 0.1, f"rms off-diagonal of K: {rms:.4f}, expected 0.0224"


def test_over_delayed_gradients_keeps_the_old_matrix():
    """DDG's graphs in flight go on with the R of their forward: nothing raises, and stash equals its twin's idea."""
    from fastbp.nets import mlp

    torch.manual_seed(0)
    model = mlp((6,), 3, depth=3, width=8).double()
    estimator = DecorrelatedBP(decor_lr=0.05, inner=DDG(modules=3)).bind(model, cross_entropy)
    copies, g = [], torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for t in range(6):
        x, y = torch.randn(5, 6, generator=g, dtype=F64), torch.randint(0, 3, (5,), generator=g)
        copies.append(copy.deepcopy(model))
        cross_entropy(copies[-1](x), y).backward()
        optimizer.zero_grad()
        estimator.backward(x, y)
        if t >= 2:
            for name, p in model.named_parameters():
                if name.startswith(("stem", "blocks.0")):
                    want = copies[t - 2].get_parameter(name).grad
                    assert torch.equal(p.grad, want), f"step {t}: {name} is not the gradient of t-2"
        optimizer.step()
    assert bool(decorrelation_of(model.stem[1]).D.any()), "R did not move"


def test_refusals():
    model = net()
    before = [type(m) for m in model.modules()]
    refused = {
        DecorrelatedBP(inner=DecorrelatedBP()): "DecorrelatedBP in DecorrelatedBP: the weights already are W R",
        DecorrelatedBP(inner=DDG(weights="mixed")): (
            "DecorrelatedBP on DDG(weights='mixed'): the layers apply W R, a copy that does not follow W; "
            "use weights='stash' or 'replay'"
        ),
        DecorrelatedBP(max_features=3): (
            "DecorrelatedBP: Sequential has no Linear or Conv2d layer with at most 3 input features that is called "
            "as a module; raise max_features or use another model"
        ),
    }
    for method, message in refused.items():
        with pytest.raises(TypeError) as caught:
            method.bind(model, cross_entropy)
        assert str(caught.value) == message
    with pytest.raises(ValueError, match=r"^DDG\.modules = 9"):
        DecorrelatedBP(inner=DDG(modules=9)).bind(model, cross_entropy)
    assert [type(m) for m in model.modules()] == before, "a refused bind changed the model"
    for settings, message in (
        ({"kappa": 1.1}, "DecorrelatedBP.kappa = 1.1: must be in [0, 1]"),
        ({"sample_fraction": 0.0}, "DecorrelatedBP.sample_fraction = 0.0: must be in (0, 1]"),
        ({"decor_lr": -1.0}, "DecorrelatedBP.decor_lr = -1.0: must not be negative; 0 is backprop"),
    ):
        with pytest.raises(ValueError, match=r"^DecorrelatedBP") as caught:
            DecorrelatedBP(**settings)
        assert str(caught.value) == message
