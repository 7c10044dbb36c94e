"""Highway-BP against the brute-force sum over paths, hand-made numbers, and autograd at full iterations."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastbp import Chain, HighwayBP, Residual
from fastbp.chain import Add, AddNorm, AddReLU, Replace, ShortcutAdd, transition
from fastbp.nets import cifar_resnet, vit_tiny
from reference import highway as twin


class Bias(nn.Module):
    """x + b: its gradient is w_0."""

    def __init__(self, size):
        super().__init__()
        self.b = nn.Parameter(torch.zeros(size, dtype=torch.float64))

    def forward(self, x):
        return x + self.b


class MatrixMerge(nn.Module):
    """K x + z for any matrix K."""

    def __init__(self, K):
        super().__init__()
        self.register_buffer("K", K)

    def forward(self, x, z):
        return x @ self.K.T + z


def linear(J, bias=True):
    layer = nn.Linear(len(J), len(J), bias=bias, dtype=torch.float64)
    layer.weight.data.copy_(J)
    if bias:
        layer.bias.data.zero_()
    return layer


def linear_chain(J, K):
    """h_i = K_i h + J_i h + b_i: the gradients of the biases are w_1 .. w_L, that of the stem is w_0."""
    blocks = [Residual(linear(j), MatrixMerge(k)) for j, k in zip(J, K, strict=True)]
    return Chain(Bias(len(J[0])), blocks, nn.Identity())


def signals(chain, g, k, gamma=0.0):
    """w_0 .. w_L of a linear chain for the loss g h_L."""
    chain.zero_grad()
    size = len(chain.stem.b)
    estimator = HighwayBP(iterations=k, gamma=gamma).bind(chain, lambda h, y: (h * y).sum())
    estimator.backward(torch.ones(1, size, dtype=torch.float64), g.reshape(1, size))
    return [chain.stem.b.grad.clone()] + [block.branch.bias.grad.clone() for block in chain.residuals()]


def matrices(*rows):
    return [torch.tensor(r, dtype=torch.float64) for r in rows]


T1_J = matrices([[1, 2], [0, 1]], [[0, 1], [1, 0]], [[2, 0], [1, -1]], [[1, 1], [-1, 1]])
T1_K = matrices([[1, 0], [0, 0]], [[1, 0], [0, 1]], [[0, 0], [0, 1]], [[2, 0], [0, 1]])
ONE = torch.ones(2, dtype=torch.float64)


@pytest.mark.parametrize("k", range(6))
def test_T1_integer_chain_is_exact(k):
    chain = linear_chain(T1_J, T1_K)
    w = signals(chain, ONE, k)
    zero = torch.zeros(2, dtype=torch.float64)
    want = twin.path_sum(T1_J, T1_K, [zero] * 4 + [ONE], k)
    for i, (got, slow) in enumerate(zip(w, want, strict=True)):
        assert torch.equal(got, slow), f"w_{i} at k={k}: {got.tolist()}, the sum over paths is {slow.tolist()}"
    printed = {0: [0.0, 0.0], 1: [6.0, 1.0]}
    assert w[0].tolist() == printed.get(k, w[0].tolist()), f"w_0 at k={k} is {w[0].tolist()}"
    if k >= 4:
        chain.zero_grad()
        chain(torch.ones(1, 2, dtype=torch.float64)).sum().backward()
        assert torch.equal(w[0], chain.stem.b.grad), f"w_0 {w[0]} is not autograd's {chain.stem.b.grad}"


def test_T1_twin_with_a_loss_per_state():
    g = matrices([0, 0], [1, 0], [0, 1], [-1, 2], [1, 1])
    got = [twin.path_sum(T1_J, T1_K, g, k)[0].tolist() for k in (0, 1)]
    assert got == [[1, 0], [11, 6]], f"w_0 at k = 0, 1: {got}"


def scalar_chain(J, L):
    eye = torch.ones(1, 1, dtype=torch.float64)
    return linear_chain([J * eye] * L, [eye] * L)


def test_T2_scalar_chains():
    one = torch.ones(1, dtype=torch.float64)
    growing = scalar_chain(0.5, 4)
    w0 = [signals(growing, one, k)[0].item() for k in range(5)]
    assert w0 == [1, 3, 4.5, 5, 5.0625], f"J = 1/2: {w0}"
    cancelling = scalar_chain(-0.2, 24)
    w0 = [signals(cancelling, one, k)[0].item() for k in range(9)]
    assert [round(w, 2) for w in w0] == [1, -3.8, 7.24, -8.95, 8.05, -5.55, 3.06, -1.37, 0.52], f"J = -0.2: {w0}"
    exact = signals(cancelling, one, 24)[0].item()
    assert round(exact, 4) == 0.0047, f"exact: {exact}"
    errors = [abs(w - exact) for w in w0]
    assert errors[3] > errors[0], "the cancelling chain's error must not fall with k"
    shifted = [abs(signals(cancelling, one, k, gamma=0.2)[0].item() - exact) for k in range(3)]
    assert max(shifted) < 1e-12, f"gamma = 0.2 makes J + gamma K zero here, errors {shifted}"


def t3_chain(merge=Add):
    a, b = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    blocks = []
    for index in range(1, 7):
        W = 0.4 * torch.sin((1 + 7 * index + a + 3 * b).double())
        blocks.append(Residual(nn.Sequential(linear(W, bias=False), nn.Tanh()), merge()))
    return Chain(Bias(4), blocks, nn.Identity())


T3_X = torch.tensor([[0.5, -0.25, 0.75, -1.0]], dtype=torch.float64)


def half_square(h, y):
    return h.square().sum() / 2


def t3_run(chain, k, gamma=0.0):
    chain.zero_grad()
    loss = HighwayBP(iterations=k, gamma=gamma).bind(chain, half_square).backward(T3_X, T3_X)
    theta = torch.cat([block.branch[0].weight.grad.flatten() for block in chain.residuals()])
    return loss.item(), theta, chain.stem.b.grad.clone()


def t3_errors(chain, gamma=0.0):
    chain.zero_grad()
    half_square(chain(T3_X), None).backward()
    exact = torch.cat([block.branch[0].weight.grad.flatten() for block in chain.residuals()])
    errors = [((t3_run(chain, k, gamma)[1] - exact).norm() / exact.norm()).item() for k in range(6)]
    assert errors[5] < 1e-15, f"theta must be exact at k = L-1, relative error {errors[5]:.3g}"
    return exact.norm().item(), errors[:5]


def assert_printed(got, printed, what):
    """Every value rounds to what is printed, given as text such as 8.918e-3."""
    for value, text in zip(got, printed.split(), strict=True):
        mantissa, _, exponent = text.partition("e")
        digits = len(mantissa.partition(".")[2])
        shown = value / 10.0 ** int(exponent or 0)
        assert f"{shown:.{digits}f}" == mantissa, f"{what}: {value!r}, printed {text}"


def test_T3_tanh_net():
    chain = t3_chain()
    loss, theta, w0 = t3_run(chain, 6)
    assert_printed([loss, theta.norm()], "4.022793217163 14.004579755956", "loss, |theta|")
    assert_printed(w0.tolist(), "0.838131211 -3.310798843 -0.268583556 -1.804120114", "dL/dh0")
    assert_printed(t3_errors(chain)[1], "2.2276e-1 8.918e-3 1.183e-3 4.657e-5 1.967e-6", "theta error")
    norms = [t3_run(chain, k)[2].norm().item() for k in range(7)]
    printed = "2.8364743 3.7500779 3.8791211 3.8727883 3.8717969 3.8717995 3.8718005"
    assert_printed(norms, printed, "|w_0|")


def test_T3_gamma_fpi_and_relu():
    chain = t3_chain()
    assert_printed(t3_errors(chain, 0.2)[1], "4.478e-1 1.549e-1 3.244e-2 3.953e-3 2.089e-4", "gamma = 0.2")
    assert_printed(t3_errors(chain, 1.0)[1], "7.936e-1 6.751e-1 6.144e-1 5.177e-1 2.406e-1", "FPI")
    relu = t3_chain(AddReLU)
    norm, errors = t3_errors(relu)
    loss = t3_run(relu, 0)[0]
    assert_printed([loss, norm], "0.673872841328 3.134482104167", "ReLU: loss, |theta|")
    assert_printed(errors, "1.6472e-1 6.157e-2 1.931e-2 3.790e-3 3.010e-5", "ReLU: theta error")


class _Scale(nn.Module):
    """A merge with a parameter: a x + z."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.7))

    def forward(self, x, z):
        return self.a * x + z


def small_conv_net():
    """Downsampling by ShortcutAdd with parameters and batch norm, a ReLU merge, a block without residual path."""

    def branch(channels_in, channels_out, stride=1):
        conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(channels_out), nn.Tanh())

    shortcut = nn.Sequential(nn.Conv2d(2, 3, 1, stride=2, bias=False), nn.BatchNorm2d(3))
    blocks = [
        Residual(branch(2, 2), AddReLU()),
        Residual(branch(2, 3, stride=2), ShortcutAdd(shortcut, relu=True)),
        Residual(nn.Conv2d(3, 2, 1), Replace()),
        Residual(nn.Sequential(nn.ReLU(), nn.Conv2d(2, 2, 1)), _Scale()),
    ]
    return Chain(nn.Conv2d(1, 2, 1), blocks, nn.Sequential(nn.Flatten(), nn.Linear(8, 3)))


def staged_net():
    """Two widths, with norm and linear map between them on the highway; the transitions have parameters."""
    branches = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for width in (4, 3, 3)]
    merging = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3), nn.ReLU())
    blocks = [*map(Residual, branches[:2]), Residual(branches[2], AddReLU())]
    return Chain(nn.Linear(6, 4), [blocks[0], transition(merging), *blocks[1:], transition(nn.Tanh())], nn.Linear(3, 3))


NETS = {
    "conv": small_conv_net,
    "staged": staged_net,
    "vit": lambda: vit_tiny((1, 2, 2), 3, patch=1, dim=4, depth=2, heads=2, mlp_ratio=1),
    "tanh": lambda: Chain(
        nn.Identity(), [Residual(nn.Sequential(nn.Linear(6, 6), nn.Tanh())) for _ in range(3)], nn.Linear(6, 3)
    ),
}
SHAPES = {"conv": (3, 1, 4, 4), "staged": (3, 6), "vit": (3, 1, 2, 2), "tanh": (3, 6)}


def net_and_batch(name):
    torch.manual_seed(3)
    return NETS[name]().double(), torch.randn(SHAPES[name], dtype=torch.float64), torch.tensor([0, 2, 1])


def gradients(model, x, y, method, loss_fn=nn.functional.cross_entropy):
    model.zero_grad()
    loss = method.bind(model, loss_fn).backward(x, y)
    return loss, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("gamma", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_equals_the_sum_over_paths(name, gamma):
    chain, x, y = net_and_batch(name)
    blocks = len(chain.blocks)
    want_loss = nn.functional.cross_entropy(copy.deepcopy(chain)(x), y)
    for k in range(blocks + 1):
        want = twin.gradients(chain, x, y, nn.functional.cross_entropy, k, gamma)
        loss, got = gradients(chain, x, y, HighwayBP(iterations=k, gamma=gamma))
        assert torch.equal(loss, want_loss.detach()), f"the loss is {loss}, backprop's {want_loss}"
        for key, grad in got.items():
            error = (grad - want[key]).norm() / want[key].norm().clamp_min(1e-6)
            assert error < 1e-11, f"k={k}: {key} differs from the sum over paths by {error:.3g}"


@pytest.mark.parametrize("gamma", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("name", NETS)
def test_full_iterations_are_backprop(name, gamma):  # invariants 1 and 6
    chain, x, y = net_and_batch(name)
    plain = copy.deepcopy(chain)
    nn.functional.cross_entropy(plain(x), y).backward()
    for k in (len(chain.blocks) - 1, len(chain.blocks), 50):
        _, got = gradients(chain, x, y, HighwayBP(iterations=k, gamma=gamma))
        for key, p in plain.named_parameters():
            if k >= len(chain.blocks) or not key.startswith("stem"):
                error = (got[key] - p.grad).norm() / p.grad.norm().clamp_min(1e-6)
                assert error < 1e-12, f"k={k}: {key} is {error:.3g} from backprop"
    assert HighwayBP(gamma=gamma).exact(chain) == HighwayBP(iterations=len(chain.blocks), gamma=gamma)


def test_signals_become_final_from_the_top():  # invariants 2 and 3
    torch.manual_seed(0)
    J = [torch.randn(3, 3, dtype=torch.float64) for _ in range(5)]
    K = [torch.randn(3, 3, dtype=torch.float64) for _ in range(5)]
    g = torch.randn(3, dtype=torch.float64)
    chain = linear_chain(J, K)
    table = [signals(chain, g, k) for k in range(7)]
    for k in range(7):
        assert torch.equal(table[k][5], g), f"w_L at k={k} is not g_L"
        for j in range(6):
            same = torch.equal(table[k][5 - j], table[6][5 - j])
            assert same == (k >= j), f"w_(L-{j}) at k={k}: final is {same}, expected from k={j} on"
    identity = linear_chain(J, [torch.eye(3, dtype=torch.float64)] * 5)
    assert all(torch.equal(w, g) for w in signals(identity, g, 0)), "k=0, K=I: w_i is not g_L for every i"


def test_no_branch_is_exact_at_once_and_no_highway_is_truncated():  # invariant 5
    torch.manual_seed(0)
    eye, zero = torch.eye(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
    K = [torch.randn(2, 2, dtype=torch.float64) for _ in range(4)]
    only_merge = linear_chain([zero] * 4, K)
    for got, want in zip(signals(only_merge, ONE, 0), signals(only_merge, ONE, 4), strict=True):
        assert torch.equal(got, want), "J = 0 must be exact at k = 0"
    only_branch = linear_chain(K, [0 * eye] * 4)
    reached = [bool(w.any()) for w in signals(only_branch, ONE, 1)]
    assert reached == [False, False, False, True, True], f"K = 0, k = 1: signals reach {reached}"


def test_batch_norm_moves_once_and_as_in_backprop():  # invariant 9
    chain, x, y = net_and_batch("conv")
    plain = copy.deepcopy(chain)
    plain(x)
    gradients(chain, x, y, HighwayBP(iterations=3))
    for (name, a), b in zip(chain.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a, b), f"{name} is not backprop's"


def test_linear_in_the_loss_and_accumulates():  # invariant 9
    chain, x, y = net_and_batch("conv")
    method = HighwayBP(iterations=2, gamma=0.2)
    _, once = gradients(chain, x, y, method)
    _, scaled = gradients(chain, x, y, method, lambda h, t: 1024 * nn.functional.cross_entropy(h, t))
    for key, grad in once.items():
        assert torch.equal(1024 * grad, scaled[key]), f"{key} is not linear in the loss scale"
    method.bind(chain, lambda h, t: 1024 * nn.functional.cross_entropy(h, t)).backward(x, y)
    for key, p in chain.named_parameters():
        assert torch.equal(p.grad, 2 * scaled[key]), f"{key} does not accumulate"


def test_dropout_has_one_mask_per_step():  # invariant 9
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6)) for _ in range(3)]
    chain = Chain(nn.Linear(6, 6), [Residual(b) for b in branches], nn.Linear(6, 3)).double()
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    plain = copy.deepcopy(chain)
    torch.manual_seed(5)
    nn.functional.cross_entropy(plain(x), y).backward()
    torch.manual_seed(5)
    _, got = gradients(chain, x, y, HighwayBP(iterations=3))
    for key, p in plain.named_parameters():
        torch.testing.assert_close(got[key], p.grad, rtol=1e-12, atol=1e-12, msg=key)


def test_frozen_parts_get_no_gradient():
    chain, x, y = net_and_batch("conv")
    want = gradients(copy.deepcopy(chain), x, y, HighwayBP(iterations=2))[1]
    frozen = ["stem.weight", "blocks.1.merge.shortcut.0.weight", "blocks.0.branch.0.weight", "head.1.weight"]
    for name in (*frozen, "blocks.2.branch.weight", "blocks.2.branch.bias"):
        chain.get_parameter(name).requires_grad_(False)
    HighwayBP(iterations=2).bind(chain, nn.functional.cross_entropy).backward(x, y)
    for name, p in chain.named_parameters():
        if p.requires_grad:
            assert torch.equal(p.grad, want[name]), f"{name} changed because others are frozen"
        else:
            assert p.grad is None, f"frozen {name} has a gradient"


class HandMade(nn.Module):
    """Stochastic depth without a graph: a skipped branch returns zeros."""

    def __init__(self, width):
        super().__init__()
        self.linear, self.skipped = nn.Linear(width, width), False

    def forward(self, x):
        return torch.zeros_like(x) if self.skipped else torch.tanh(self.linear(x))


@pytest.mark.parametrize("k", [0, 1, 5])
def test_a_skipped_branch_has_no_jacobian(k):
    torch.manual_seed(0)
    merges = [Add(), AddReLU(), AddNorm(nn.LayerNorm(4)), Add(), Replace(), Add()]
    chain = Chain(nn.Linear(6, 4), [Residual(HandMade(4), merge) for merge in merges], nn.Linear(4, 3)).double()
    x, y = torch.randn(5, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    for i in (1, 2, 3, 5) if k == 5 else (0, 1, 2, 3, 4, 5):
        chain.blocks[i].branch.skipped = True
    HighwayBP(iterations=k).bind(chain, nn.functional.cross_entropy).backward(x, y)
    for i, block in enumerate(chain.residuals()):
        assert (block.branch.linear.weight.grad is None) == block.branch.skipped, f"block {i}"
    if k == 5:
        got = {name: p.grad for name, p in chain.named_parameters()}
        chain.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(chain(x), y).backward()
        for name, p in chain.named_parameters():
            assert (p.grad is None) == (got[name] is None), name
            if p.grad is not None:
                torch.testing.assert_close(got[name], p.grad, rtol=1e-12, atol=1e-14, msg=name)


class Checkpointed(nn.Module):
    def __init__(self, norm, reentrant):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), norm, nn.Tanh())
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


def checkpointed(norm, reentrant):
    torch.manual_seed(0)
    blocks = [Residual(Checkpointed(norm(6), reentrant)) for _ in range(3)]
    return Chain(nn.Linear(6, 6), blocks, nn.Linear(6, 3)).double()


@pytest.mark.parametrize("k", [0, 2])
def test_checkpoints_that_cannot_be_rounds_are_refused(k):
    x, y = torch.randn(4, 6, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    for norm, reentrant, message in (
        (nn.LayerNorm, True, r"^HighwayBP on reentrant activation checkpointing: .*use_reentrant=False"),
        (nn.BatchNorm1d, False, r"^HighwayBP on checkpointed blocks with buffers: .*running statistics"),
    ):
        estimator = HighwayBP(iterations=k).bind(checkpointed(norm, reentrant), nn.functional.cross_entropy)
        with pytest.raises(ValueError, match=message):
            estimator.backward(x, y)
    chain = checkpointed(nn.LayerNorm, False)
    estimator = HighwayBP(iterations=3).bind(chain, nn.functional.cross_entropy)
    for _ in range(2):
        chain.zero_grad()
        estimator.backward(x, y)
    plain = copy.deepcopy(chain)
    plain.zero_grad()
    nn.functional.cross_entropy(plain(x), y).backward()
    for (name, p), q in zip(chain.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-14, msg=name)


def test_cifar_resnet_error_falls_with_iterations():  # invariant 8
    torch.manual_seed(0)
    model = cifar_resnet((3, 8, 8), 4, depth=20, width=4).double()
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 3])
    exact = gradients(model, x, y, HighwayBP(iterations=9))[1]
    errors = []
    for k in range(10):
        got = gradients(model, x, y, HighwayBP(iterations=k))[1]
        errors.append(sum((got[n] - exact[n]).square().sum().item() for n in exact) ** 0.5)
    assert errors == sorted(errors, reverse=True), f"errors over k: {errors}"


def test_refusals():
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"^HighwayBP: no block of this Sequential has a residual path"):
        HighwayBP().bind(plain, half_square)
    stepwise = [Residual(nn.Linear(2, 2), Replace()), transition(nn.ReLU()), Residual(nn.Linear(2, 2), Replace())]
    with pytest.raises(TypeError, match=r"^HighwayBP: no block of this Chain has a residual path"):
        HighwayBP().bind(Chain(nn.Identity(), stepwise, nn.Identity()), half_square)
    for settings, message in (
        ({"iterations": -1}, "HighwayBP.iterations = -1: must be 0 or more; the number of blocks is exact"),
        ({"gamma": 1.5}, "HighwayBP.gamma = 1.5: must be in [0, 1]"),
    ):
        with pytest.raises(ValueError, match=r"^HighwayBP") as caught:
            HighwayBP(**settings)
        assert str(caught.value) == message
