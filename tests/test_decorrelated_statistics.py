"""DecorrelatedBP: its rates and noise away from white, the optimizer-side form, uneven blocks, one sample per step."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastbp import DecorrelatedBP, LayerDropBack
from fastbp.methods.decorrelated import decorrelation_of
from fastbp.whitening import Decorrelation, Layout, layout
from reference import decorrelated as twin
from test_decorrelated import F64, batches, cross_entropy, matrix_of, net, rows_of, second_moment, train, whiten

# --- the spec's invariants --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kappa", [0.0, 0.2])
def test_rates_near_a_diagonal_moment(kappa):  # I7, general
    """Off-diagonals shrink by 1 - eps (1-kappa) (K_ii + K_jj), to first order, and with the rows that are rescaled."""
    eps = 0.01
    variances = torch.tensor([0.3, 0.7, 1.0, 1.3, 1.7], dtype=F64)
    E = 1e-6 * torch.randn(5, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    covariance = variances.diag() + (E + E.T).fill_diagonal_(0.0)
    matrix = matrix_of(5)
    whiten(matrix, rows_of(covariance), eps, kappa)
    after = second_moment(covariance, matrix.D[0])
    pairs = variances[:, None] + variances
    off = ~torch.eye(5, dtype=torch.bool)
    want = 1 - eps * (1 - kappa) * pairs - eps * kappa * (pairs - 2)
    error = ((after / covariance - want).abs())[off].max()
    assert error < 5e-4, f"kappa {kappa}: off-diagonal ratios off by {error:.3g}"
    balanced = off & ((pairs - 2).abs() < 1e-9)  # K_ii + K_jj = 2: the two agree for every kappa
    assert balanced.any()
    ratio = (after / covariance)[balanced]
    assert (ratio - (1 - 2 * eps * (1 - kappa))).abs().max() < 5e-4, f"kappa {kappa}: {ratio.tolist()}"
    diagonal = after.diagonal() / variances
    torch.testing.assert_close(diagonal, (1 - eps * kappa * (variances - 1)).square(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("kappa", "rms"), [(0.5, 0.0032), (0.0, 0.0045)])
def test_white_input_noise_floor_at_smaller_steps(kappa, rms):  # I10
    torch.manual_seed(0)
    eps, n, width = 0.01, 500, 16
    matrix, squares = matrix_of(width), []
    off = ~torch.eye(width, dtype=torch.bool)
    for t in range(1600):
        whiten(matrix, torch.randn(1, n, width, dtype=F64), eps, kappa)
        if t >= 400 and t % 10 == 0:
            squares.append(second_moment(torch.eye(width, dtype=F64), matrix.D[0])[off].square().mean())
    found = torch.stack(squares).mean().sqrt().item()
    assert found == pytest.approx(rms, rel=0.1), f"rms off-diagonal of K: {found:.5f}"


OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, 0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, 0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_parametrization_equals_the_optimizer_side_form(kind):  # I13
    """Candidate B of the spec: a plain model that holds A, while W and R live beside its optimizer."""
    ours, theirs = net(), net()
    settings = dict(decor_lr=0.02, kappa=0.3)
    estimator = DecorrelatedBP(sample_fraction=1.0, **settings).bind(ours, cross_entropy)
    optimizer = OPTIMIZERS[kind](list(ours.parameters()))
    other = twin.OptimizerSide(theirs, OPTIMIZERS[kind], eps=0.02, kappa=0.3)
    for t, (x, y) in enumerate(batches(6)):
        want = other.step(x, y, cross_entropy)
        got = train(estimator, optimizer, [(x, y)])[0]
        assert got == pytest.approx(want, rel=1e-11), f"step {t}: loss {got}, the other form's {want}"
    plain = estimator.finalize()
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(plain.state_dict()[name], value, rtol=1e-9, atol=1e-11, msg=name)


# --- blocks that do not fit -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "taps", "size", "want"),
    [
        (37, 1, 16, Layout(1, 3, 13, 1, 2)),  # 13, 13, 11
        (37, 1, 37, Layout(1, 1, 37, 1)),
        (37, 1, 1, Layout(1, 37, 1, 1)),
        (11, 9, 40, Layout(1, 3, 36, 1, 9)),  # 4, 4 and 3 channels of 9
        (13, 1, 3, Layout(1, 5, 3, 1, 2)),  # 3, 3, 3, 3, 1
        (74, 1, 40, Layout(1, 2, 37, 1)),
    ],
)
def test_blocks_of_awkward_widths_stay_near_the_block_size(channels, taps, size, want):
    assert layout(torch.zeros(5, channels, taps), 1, "block", size) == want


def test_blocks_are_never_less_than_half_as_wide_as_they_may_be():
    for channels in range(1, 200):
        for size in (1, 2, 7, 16, 64):
            form = layout(torch.zeros(2, channels), 1, "block", size)
            widest = min(size, channels)
            assert form.blocks * form.width - form.padding == channels
            assert widest / 2 <= form.width <= widest, f"{channels} channels, {size}: {form}"
            assert 0 <= form.padding < form.width


LAYERS = {
    "linear": (lambda: nn.Linear(37, 5, dtype=F64), 16, [13, 13, 11]),
    "conv": (lambda: nn.Conv2d(11, 4, 3, padding=1, dtype=F64), 40, [36, 36, 27]),
    "grouped": (lambda: nn.Conv2d(22, 4, 3, groups=2, dtype=F64), 40, [36, 36, 27]),
}


@pytest.mark.parametrize(
    "options", [{}, {"gain": True}, {"rule": "normalized"}, {"preserve_function": True}, {"center": True}]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_uneven_blocks_learn_what_blocks_of_their_own_would(kind, options):
    """Each block like a layer that sees its features alone; the padding stays without a trace."""
    make, size, widths = LAYERS[kind]
    torch.manual_seed(0)
    layer = make()
    plain = layer.weight.detach().clone()
    groups = getattr(layer, "groups", 1)
    x = torch.randn(6, *((37,) if kind == "linear" else (11 * groups, 5, 5)), dtype=F64)
    before = layer(x)
    method = DecorrelatedBP(
        decor_lr=0.02, kappa=0.3, sample_fraction=1.0, structure="block", block_size=size, **options
    )
    estimator = method.bind(nn.Sequential(layer), lambda out, y: out.square().mean())
    matrix = decorrelation_of(layer)
    assert torch.equal(layer(x), before), "D = 0 changes the output"
    steps = 4
    for _ in range(steps):
        estimator.backward(x, x)
    if method.preserve_function:
        torch.testing.assert_close(layer(x), before, rtol=1e-11, atol=1e-12)
    rows = twin.patches(layer, x) if kind != "linear" else [x]
    D = matrix.D.unflatten(0, (groups, len(widths)))
    for g, group in enumerate(rows):
        for b, part in enumerate(group.split(widths, dim=1)):
            alone = Decorrelation(Layout(1, 1, widths[b], 1), torch.zeros(1, dtype=F64))
            for _ in range(steps):
                sample = estimator.rule.prepare(part[None], alone.D)
                off, diagonal = estimator.rule.weights(max(widths))  # `normalized` divides by the matrix's width
                R = torch.eye(widths[b], dtype=F64) + alone.D[0]
                z = sample[0] @ R.T
                K = z.T @ z / len(z)
                M = off * (K - K.diagonal().diag()) + diagonal * (K.diagonal() - 1).diag()
                length = (sample[0].norm(dim=1) / z.norm(dim=1)).mean() if method.gain else 1.0
                alone.D = (length * (R - 0.02 * M @ R) - torch.eye(widths[b], dtype=F64))[None]
            w = widths[b]
            torch.testing.assert_close(D[g, b, :w, :w], alone.D[0], rtol=1e-10, atol=1e-12, msg=f"group {g}, block {b}")
            assert not D[g, b, w:].any(), "rows of the padding learn"
            assert not D[g, b, :, w:].any(), "columns of the padding learn"
    want = layer(x)
    W = layer.parametrizations.weight.original.detach()
    dense = torch.stack([torch.block_diag(*[torch.eye(w) + D[g, b, :w, :w] for b, w in enumerate(widths)])
                         for g in range(groups)])  # fmt: skip
    A = (W.reshape(groups, -1, dense.shape[-1]) @ dense).reshape(W.shape)
    torch.testing.assert_close(layer.weight, A, rtol=1e-12, atol=1e-13)
    assert W.shape == plain.shape
    estimator.finalize()
    assert torch.equal(layer(x), want), "folding changes the output"


def test_the_padding_has_no_loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(37, 5, dtype=F64))
    method = DecorrelatedBP(decor_lr=0.01, kappa=0.3, sample_fraction=1.0, structure="block", block_size=16)
    estimator = method.bind(model, nn.functional.mse_loss)
    x = torch.randn(200, 37, dtype=F64)
    (row,) = estimator.report(x)
    K = x.T @ x / 200
    assert row["variance"] == pytest.approx((K.diagonal() - 1).square().sum().item() / 13**2)


# --- one sample per step ----------------------------------------------------------------------------------------


class _Checkpointed(nn.Module):
    """A layer that is called twice, in checkpointed blocks; `use_reentrant` None: not checkpointed."""

    def __init__(self, use_reentrant):
        super().__init__()
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh()) for _ in range(3)]
        self.stem, self.blocks, self.head = nn.Linear(6, 6), nn.ModuleList(blocks), nn.Linear(6, 3)
        self.use_reentrant = use_reentrant
        self.double()

    def forward(self, x):
        x = self.stem(x)
        for block in [*self.blocks, self.blocks[0]]:
            x = block(x) if self.use_reentrant is None else checkpoint(block, x, use_reentrant=self.use_reentrant)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch itself, where all below is dropped
@pytest.mark.parametrize(("inner", "use_reentrant"), [("bp", False), ("bp", True), ("ldb", False)])
def test_checkpointed_layers_are_sampled_once(inner, use_reentrant):
    """The recomputation in the backward pass runs the layers again: R and the cost are those of the plain model."""
    method = DecorrelatedBP(decor_lr=0.02, kappa=0.3, sample_fraction=0.5)
    method = LayerDropBack(inner=method) if inner == "ldb" else method
    x, y = torch.randn(8, 6, dtype=F64), torch.arange(8) % 3
    found = []
    for how in (None, use_reentrant):
        model = _Checkpointed(how)
        torch.manual_seed(1)
        estimator = method.bind(model, cross_entropy)
        estimator.start_epoch(2)
        dbp = estimator.inner if inner == "ldb" else estimator
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sizes = []
        for _ in range(4):
            train(estimator, optimizer, [(x, y)])
            sizes.append(dict(dbp.sizes))
        found.append((sizes, {name: value.clone() for name, value in model.state_dict().items()}))
    (plain_sizes, plain), (sizes, checkpointed) = found
    assert sizes == plain_sizes, f"rows per layer {sizes[-1]} instead of {plain_sizes[-1]}"
    assert sizes[-1]["blocks.0.0"] == 8, "both calls of a layer, half of 8 rows each"
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-12, atol=1e-14, msg=name)


# --- the report -------------------------------------------------------------------------------------------------


def test_the_report_says_how_white_each_layer_is():
    model = net()
    estimator = DecorrelatedBP(decor_lr=0.05, kappa=0.3, sample_fraction=1.0).bind(model, cross_entropy)
    data = [(x + 2 * x[:, :, :1, :1], y) for x, y in batches(30)]
    train(estimator, torch.optim.SGD(model.parameters(), 0.01), data)
    x = data[0][0][:4]  # fewer rows than layer 4 has outputs: there R meets the rows
    rows = {row["layer"]: row for row in estimator.report(x)}
    assert list(rows) == ["0", "2", "4", "6"]
    h = x
    for path, layer in model.named_children():
        if path in rows:
            groups = twin.patches(layer, h) if isinstance(layer, nn.Conv2d) else [h]
            D = decorrelation_of(layer).D
            off = variance = plain = 0.0
            for part, D_g in zip(groups, D, strict=True):
                for R in (torch.eye(len(D_g), dtype=F64) + D_g, torch.eye(len(D_g), dtype=F64)):
                    z = part.detach() @ R.T
                    K = z.T @ z / len(z)
                    parts = (K - K.diagonal().diag()).square().sum(), (K.diagonal() - 1).square().sum()
                    off_, variance_ = (value.item() / len(D_g) ** 2 for value in parts)
                    if torch.equal(R, torch.eye(len(D_g), dtype=F64)):
                        plain += 0.7 * off_ + 0.3 * variance_
                    else:
                        off, variance = off + off_, variance + variance_
            got = [rows[path][name] for name in ("loss", "off_diagonal", "variance", "loss_of_input")]
            want = [0.7 * off + 0.3 * variance, off, variance, plain]
            assert got == pytest.approx(want, rel=1e-9), f"layer {path}"
            assert path != "0" or rows[path]["loss"] < 0.7 * plain, "the input, correlated, is not much whiter behind R"
        h = layer(h)
    assert "loss" not in estimator.report()[0], "without a batch there is nothing to measure"


def test_a_report_leaves_no_trace():
    """Also with batch norm, dropout, a subsample, a frozen evaluation mode, and a layer that nobody calls."""

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
        model.unused = nn.Linear(4, 4)
        model.forward = lambda x: nn.Sequential(*list(model.children())[:4])(x)
        model[1].eval()
        torch.manual_seed(3)
        return model, DecorrelatedBP(decor_lr=0.05, sample_fraction=0.3).bind(model, cross_entropy)

    x, y = torch.randn(10, 4), torch.arange(10) % 3
    losses = []
    for asked in (False, True):
        model, estimator = make()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        hooks = [len(m._forward_pre_hooks) for m in model.modules()]
        torch.manual_seed(4)
        losses.append([])
        for _ in range(4):
            losses[-1] += train(estimator, optimizer, [(x, y)])
            if asked:
                rows = estimator.report(torch.randn(7, 4, generator=torch.Generator().manual_seed(0)))
                assert [row["loss"] is None for row in rows] == [False, False, True]
                assert [m.training for m in model.children()] == [True, False, True, True, True]
                assert not estimator.kept
                assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert losses[0] == losses[1], "a report changed the training"


def test_a_report_sees_the_layers_of_torchs_encoder():
    """Which in evaluation mode would take a fused path that calls no layer."""
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(block, 1, enable_nested_tensor=False), nn.Flatten(), nn.Linear(24, 2))
    estimator = DecorrelatedBP().bind(model, cross_entropy)
    assert all(row["loss"] is not None for row in estimator.report(torch.randn(4, 3, 8)))


def test_a_report_measures_while_the_model_is_on_one_device(monkeypatch):
    """Of a net that a method has on several: there the matrices would not be where the batch is."""
    estimator = DecorrelatedBP().bind(net(), cross_entropy)
    gathered, measure = [], estimator._losses_of

    @contextmanager
    def whole():
        gathered.append(True)
        yield estimator.model
        gathered.clear()

    def measured(path):
        assert gathered, f"layer {path} is measured where it trains"
        return measure(path)

    monkeypatch.setattr(estimator.inner, "whole", whole)
    monkeypatch.setattr(estimator, "_losses_of", measured)
    assert len(estimator.report(batches(1)[0][0])) == 4
