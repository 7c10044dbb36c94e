"""DecorrelatedBP on other people's layers: structures, rules, options, layer choice, compile, ranks, precision."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import decorrelation_ranks
from fastbp import DDG, Backprop, DecorrelatedBP
from fastbp.layer_inputs import channel_rows, input_rows
from fastbp.methods.decorrelated import decorrelation_of, plain_state_dict
from fastbp.whitening import Decorrelation, Layout, Rule, bracket, directions, gain, layout, update_direction
from test_decorrelated import F64, R_of, batches, cross_entropy, net, train

timm = pytest.importorskip("timm")


def dense(matrix):
    """R of a layer over all input features of a group, (G, F, F) in patch order, whatever its structure."""
    form = matrix.layout
    R = torch.eye(form.width, dtype=F64) + matrix.D
    R = R.unflatten(0, (form.groups, form.blocks))
    whole = [torch.block_diag(*blocks) for blocks in R]
    return torch.stack([torch.kron(R_g, torch.eye(form.taps, dtype=F64)) for R_g in whole])


LAYERS = {
    "conv": lambda: nn.Conv2d(6, 4, 3, padding=1, dtype=F64),
    "grouped": lambda: nn.Conv2d(8, 6, (3, 2), groups=2, stride=2, dtype=F64),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, groups=4, dtype=F64),
    "linear": lambda: nn.Linear(12, 5, dtype=F64),
}
STRUCTURES = [("full", 1), ("block", 27), ("block", 4), ("block", 1), ("channel", 1)]


@pytest.mark.parametrize(("structure", "size"), STRUCTURES)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_layer_applies_W_times_the_dense_matrix(kind, structure, size):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    groups = getattr(layer, "groups", 1)
    form = layout(layer.weight, groups, structure, size)
    matrix = Decorrelation(form, layer.weight)
    matrix.D = torch.randn(form.matrices, form.width, form.width, dtype=F64)
    assert torch.equal(form.join(form.split(layer.weight), layer.weight), layer.weight), "split and join"
    W = layer.weight.reshape(groups, -1, layer.weight[0].numel())
    want = (W @ dense(matrix)).reshape(layer.weight.shape)
    torch.testing.assert_close(matrix(layer.weight), want, rtol=1e-12, atol=1e-13)


def test_block_sizes_keep_channels_whole_and_equal():
    weight = torch.zeros(8, 64, 3, 3)
    assert layout(weight, 1, "block", 256) == Layout(1, 4, 144, 1)  # 16 channels of 9; 28 would not divide 64
    assert layout(weight, 1, "block", 10**6) == layout(weight, 1, "full", 1) == Layout(1, 1, 576, 1)
    assert layout(weight, 1, "block", 1) == Layout(1, 64, 9, 1)
    assert layout(weight, 2, "channel", 1) == Layout(2, 1, 64, 9)
    assert layout(torch.zeros(5, 768), 1, "block", 256) == Layout(1, 3, 256, 1)
    assert layout(torch.zeros(5, 768), 1, "channel", 256) == Layout(1, 1, 768, 1)


@pytest.mark.parametrize(("structure", "size"), STRUCTURES)
@pytest.mark.parametrize("kind", LAYERS)
def test_every_matrix_learns_from_its_own_features(kind, structure, size):
    """One step at learning rate 0: each matrix moves by the explicit M R of the rows that it sees."""
    torch.manual_seed(1)
    layer = LAYERS[kind]()
    groups = getattr(layer, "groups", 1)
    x = torch.randn(3, layer.in_features if kind == "linear" else layer.in_channels, 5, 5, dtype=F64)
    x = x.flatten(1)[:, :12] if kind == "linear" else x
    if structure == "channel" and kind != "linear":
        seen = [x[:, g].flatten(2).transpose(1, 2).reshape(-1, x.shape[1] // groups) for g in
                torch.arange(x.shape[1]).reshape(groups, -1)]  # fmt: skip
    else:
        rows = input_rows(layer, x)
        width = layout(layer.weight, groups, structure, size).width
        seen = [part for group in rows for part in group.split(width, dim=1)]
    model = nn.Sequential(layer)
    method = DecorrelatedBP(decor_lr=0.1, kappa=0.3, sample_fraction=1.0, structure=structure, block_size=size)
    estimator = method.bind(model, lambda out, y: out.square().mean())
    estimator.backward(x, x)
    D = decorrelation_of(layer).D
    assert len(D) == len(seen), f"{len(D)} matrices for {len(seen)} parts"
    for matrix, part in zip(D, seen, strict=True):
        K = part.T @ part / len(part)
        M = 0.7 * (K - K.diagonal().diag()) + 0.3 * (K.diagonal() - 1).diag()
        torch.testing.assert_close(matrix, -0.1 * M, rtol=1e-11, atol=1e-12)
    before = layer(x)
    estimator.finalize()
    torch.testing.assert_close(layer(x), before, rtol=1e-13, atol=1e-13, msg="folding changes the output")
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_channel_rows_are_pixels():
    layer, x = LAYERS["grouped"](), torch.randn(2, 8, 3, 4, dtype=F64)
    rows = channel_rows(layer, x)
    assert rows.shape == (2, 24, 4)
    assert torch.equal(rows[1, 13], x[1, 4:, 0, 1]), "row 13 is image 1, pixel (0, 1)"


# --- rules and options ------------------------------------------------------------------------------------------


def explicit(rows, D, off, diagonal):
    """R and M from the full second moment, per matrix."""
    R = torch.eye(D.shape[-1], dtype=F64) + D
    z = rows @ R.mT
    K = z.mT @ z / rows.shape[1]
    diag = torch.diag_embed(K.diagonal(dim1=1, dim2=2))
    return R, off * (K - diag) + diagonal * (diag - torch.eye(D.shape[-1], dtype=F64))


@pytest.mark.parametrize("n", [4, 9, 30])
def test_options_equal_the_explicit_matrices(n):
    torch.manual_seed(n)
    rows, D = torch.randn(2, n, 6, dtype=F64) + 0.5, 0.3 * torch.randn(2, 6, 6, dtype=F64)
    for name, off, diagonal in (("standard", 0.6, 0.4), ("normalized", 0.6 / 5, 0.8)):
        for center in (False, True):
            rule = Rule(0.1, 0.4, name, center, True)
            sample = rule.prepare(rows, D)
            x = rows - rows.mean(1, keepdim=True) if center else rows
            R, M = explicit(x, D, off, diagonal)
            torch.testing.assert_close(rule.direction(sample, D), M @ R, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(bracket(sample, D, off, diagonal), M, rtol=1e-12, atol=1e-12)
            g = (x.norm(dim=2) / (x @ R.mT).norm(dim=2)).mean(dim=1)[:, None, None]
            new = rule.next_D(D, rule.direction(sample, D), gain(sample, D))
            want = g * (R - 0.1 * M @ R) - torch.eye(6, dtype=F64)
            torch.testing.assert_close(new, want, rtol=1e-12, atol=1e-12)


def test_gain_keeps_the_length_and_survives_dead_rows():
    torch.manual_seed(0)
    rows = torch.randn(1, 400, 8, dtype=F64) * torch.linspace(0.2, 3, 8)
    rows[0, :50] = 0.0
    rule = Rule(0.02, 0.0, gain=True)
    D = torch.zeros(1, 8, 8, dtype=F64)
    for _ in range(200):
        D = rule.next_D(D, rule.direction(rows, D), gain(rows, D))
    assert bool(D.isfinite().all()), "rows of zeros gave NaN"
    ratio = gain(rows, D).item()
    assert abs(ratio - 1) < 0.02, f"|x| / |R x| settles at {ratio}"


@pytest.mark.parametrize(
    "options", [{}, {"gain": True}, {"structure": "channel"}, {"structure": "block", "block_size": 9}]
)
def test_preserve_function(options):
    """At learning rate 0 the net computes the same after updates of R that are not small; without it, it does not."""
    x, y = batches(1)[0]
    for preserve in (True, False):
        model = net()
        before = model(x)
        method = DecorrelatedBP(decor_lr=0.05, kappa=0.3, sample_fraction=1.0, preserve_function=preserve, **options)
        estimator = method.bind(model, cross_entropy)
        for _ in range(4):
            estimator.backward(x, y)
        moved = (model(x) - before).abs().max().item()
        assert moved < 1e-12 if preserve else moved > 1e-4, f"preserve_function={preserve}: output moved by {moved}"
        assert max(row["rms_D"] for row in estimator.report()) > 1e-3, "R did not move"


def test_layers_of_equal_size_are_updated_together_and_alike():
    torch.manual_seed(0)
    sizes = [(1, 5, 4), (2, 5, 4), (1, 20, 4), (1, 5, 6), (3, 20, 4)]
    rows = [torch.randn(s, dtype=F64) for s in sizes]
    Ds = [0.2 * torch.randn(m, f, f, dtype=F64) for m, _, f in sizes]
    rule = Rule(0.1, 0.2)
    for got, r, D in zip(directions(rule, rows, Ds), rows, Ds, strict=True):
        torch.testing.assert_close(got, update_direction(r, D, 0.8, 0.2), rtol=1e-13, atol=1e-14)


def test_interval_of_the_accumulation_keeps_R_still_within_a_step():
    """Micro-batches of one optimizer step meet one R, and their gradients add up to those of the whole batch."""
    x, y = batches(1)[0]
    micro, whole = net(), net()
    a = DecorrelatedBP(decor_lr=0.05, interval=3).bind(micro, cross_entropy)
    b = DecorrelatedBP(decor_lr=0.05).bind(whole, cross_entropy)
    for part in range(3):
        before = decorrelation_of(micro[0]).D
        a.backward(x[2 * part : 2 * part + 2], y[2 * part : 2 * part + 2])
        moved = decorrelation_of(micro[0]).D is not before
        assert moved == (part == 2), f"R moved at micro-batch {part}: {moved}"
    b.backward(x, y)
    for p, q in zip(micro.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p.grad / 3, q.grad, rtol=1e-11, atol=1e-13)


# --- which layers -----------------------------------------------------------------------------------------------


def test_choice_of_layers():
    def chosen(layers):
        return list(DecorrelatedBP(layers=layers).bind(net(), cross_entropy).layers)

    assert chosen("all") == ["0", "2", "4", "6"]
    assert chosen("conv") == ["0", "2"]
    assert chosen("linear") == ["4", "6"]
    assert chosen("^[26]$") == ["2", "6"]
    with pytest.raises(TypeError, match=r"no Linear or Conv2d layer chosen by layers = 'x' with at most 4608"):
        chosen("x")
    with pytest.raises(ValueError, match=r"layers = '\[': must be all, conv, linear or a regular expression"):
        chosen("[")


class _Own(nn.Linear):
    def forward(self, x):
        return super().forward(x + 1)


def test_a_subclass_with_a_forward_of_its_own_stays_plain_with_a_warning():
    model = nn.Sequential(_Own(3, 3), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match=r"leaves 1 layer\(s\) with an unknown forward plain: 0 \(_Own\)"):
        assert list(DecorrelatedBP().bind(model, cross_entropy).layers) == ["1"]


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (5, 6)])
@pytest.mark.parametrize("settings", [dict(stride=2), dict(stride=1, dilation=2), dict(stride=(3, 2)), dict(groups=2)])
def test_timm_same_padding(size, settings):
    """The rows times the weight are the layer's own output, also of a bound layer, whose class has another name."""
    from timm.layers import Conv2dSame

    torch.manual_seed(0)
    layer = Conv2dSame(4, 6, (3, 5), bias=False, dtype=F64, **settings)
    x = torch.randn(2, 4, *size, dtype=F64)
    for bound in (False, True):
        if bound:
            DecorrelatedBP().bind(nn.Sequential(layer), cross_entropy)
        rows, out = input_rows(layer, x), layer(x)
        y = torch.einsum("gnf,gof->gno", rows, layer.weight.reshape(layer.groups, -1, rows.shape[-1]))
        y = y.unflatten(1, (2, -1)).permute(1, 0, 3, 2).reshape(out.shape)
        torch.testing.assert_close(y, out, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame"])
def test_timm_standardised_convolutions_train_and_fold(name):
    import timm.layers

    torch.manual_seed(0)
    kind = getattr(timm.layers, name)
    settings = {"padding": "same"} if name.endswith("Same") else {"padding": 1}
    model = nn.Sequential(kind(2, 4, 3, **settings), nn.Flatten(), nn.Linear(144, 3))
    plain = copy.deepcopy(model)
    x = batches(1, torch.float32)[0][0]
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=0)
    estimator = DecorrelatedBP(decor_lr=0.01, sample_fraction=1.0).bind(model, cross_entropy)
    assert torch.equal(model(x), plain(x)), "D = 0 changes the output"
    train(estimator, torch.optim.SGD(model.parameters(), 0.05), batches(3, torch.float32))
    assert bool(decorrelation_of(model[0]).D.any()), "R did not move"
    before = model(x)
    estimator.finalize()
    assert torch.equal(model(x), before), "folding changes the output"
    assert list(model.state_dict()) == list(plain.state_dict())


def test_fused_attention_projection_is_one_layer():
    from timm.layers import Attention

    torch.manual_seed(0)
    model = nn.Sequential(Attention(8, num_heads=2), nn.Flatten(), nn.Linear(24, 3)).double()
    estimator = DecorrelatedBP(decor_lr=0.1, kappa=0.2, sample_fraction=1.0).bind(model, cross_entropy)
    assert list(estimator.layers) == ["0.qkv", "0.proj", "2"]
    x = torch.randn(4, 3, 8, dtype=F64)
    estimator.backward(x, torch.tensor([0, 1, 2, 0]))
    want = -0.1 * update_direction(x.reshape(1, -1, 8), torch.zeros(1, 8, 8, dtype=F64), 0.8, 0.2)
    torch.testing.assert_close(decorrelation_of(model[0].qkv).D, want, rtol=1e-12, atol=1e-13)


def test_inputs_by_keyword_are_seen_and_forgotten_sizes_are_not_drawn():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(input=self.layer(input=x))

    model = Net()
    estimator = DecorrelatedBP(decor_lr=0.1).bind(model, cross_entropy)
    for size in (5, 7, 9):
        estimator.backward(torch.randn(size, 3), torch.zeros(size, dtype=torch.int64))
    assert bool(decorrelation_of(model.layer).D.any())
    assert estimator.totals == {9}, f"rows that are drawn for: {estimator.totals}"


def test_max_features_bounds_the_matrices_not_the_input():
    model = nn.Sequential(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 2))
    bound = DecorrelatedBP(structure="block", block_size=10, max_features=16).bind(model, cross_entropy)
    assert list(bound.layers) == ["0", "2"]


class _Reads(nn.Module):
    """Reads a layer's weight without calling the layer, as BEiT's attention does."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.called(nn.functional.linear(x, self.read.weight))


def test_a_layer_that_is_never_called_is_reported_once():
    model = _Reads()
    estimator = DecorrelatedBP().bind(model, cross_entropy)
    estimator.backward(torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0]))
    with pytest.warns(UserWarning, match=r"1 layer\(s\) were never called as modules and stay plain .*: read$"):
        estimator.metrics()
    estimator.metrics()
    assert not decorrelation_of(model.read).D.any()
    assert [row["rows"] for row in estimator.report()] == [0, 1]


# --- precision, copies, compile, ranks --------------------------------------------------------------------------


def test_low_precision_models_learn_R_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3)).to(torch.bfloat16)
    estimator = DecorrelatedBP(decor_lr=1e-6, sample_fraction=1.0).bind(model, cross_entropy)
    x, y = torch.randn(50, 6).to(torch.bfloat16), torch.randint(3, (50,))
    for _ in range(3):
        estimator.backward(x, y)
    D = decorrelation_of(model[0]).D
    assert D.dtype == torch.float32
    rows = x.float()[None]
    want = torch.zeros(1, 6, 6)
    for _ in range(3):
        want = want - 1e-6 * update_direction(rows, want, 0.99, 0.01)
    torch.testing.assert_close(D, want, rtol=1e-4, atol=1e-12)
    for cast in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float16)):
        assert decorrelation_of(cast(copy.deepcopy(model))[0]).D.dtype == torch.float32, "the master was cast"
    assert decorrelation_of(copy.deepcopy(model).double()[0]).D.dtype == F64


@pytest.mark.parametrize("options", [{}, {"preserve_function": True, "gain": True}])
def test_a_batch_that_overflows_moves_nothing(options):
    model = net()
    estimator = DecorrelatedBP(decor_lr=0.01, sample_fraction=1.0, **options).bind(model, cross_entropy)
    data = batches(3)
    estimator.backward(*data[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    estimator.backward(torch.full_like(data[1][0], float("inf")), data[1][1])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), f"{name} moved"
    estimator.backward(*data[2])
    assert not torch.equal(decorrelation_of(model[0]).D, before["0.parametrizations.weight.0.D"]), "R learns no more"


def test_autocast_updates_R_in_full_precision():
    moved = []
    for enabled in (True, False):
        model = net(torch.float32)
        estimator = DecorrelatedBP(decor_lr=0.01, sample_fraction=1.0, layers="conv").bind(model, cross_entropy)
        for x, y in batches(3, torch.float32):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                estimator.backward(x, y)
        moved.append(decorrelation_of(model[0]).D)  # the first layer's input is the same in both
    assert moved[0].dtype == torch.float32
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-5, atol=1e-7)


def test_a_moving_average_averages_the_applied_weights():
    model, plain = net(), net()
    estimator = DecorrelatedBP(decor_lr=0.05, sample_fraction=1.0).bind(model, cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    average, weights = {}, []
    for t, batch in enumerate(batches(4)):
        train(estimator, optimizer, [batch])
        state = plain_state_dict(model)
        weights.append(model[0].weight.detach().clone())
        average = {k: v.clone() if t == 0 else average[k] + (v - average[k]) / (t + 1) for k, v in state.items()}
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(average)
    torch.testing.assert_close(plain[0].weight.data, torch.stack(weights).mean(0), rtol=1e-12, atol=1e-14)
    plain.load_state_dict(state)
    x = batches(1)[0][0]
    want = model(x)
    torch.testing.assert_close(plain(x), want, rtol=1e-13, atol=1e-14)
    assert list(estimator.finalize().state_dict()) == list(net().state_dict())


def test_pretrained_weights_load_before_bind():
    source, model = net(seed=3), net()
    model.load_state_dict(source.state_dict())
    x = batches(1)[0][0]
    DecorrelatedBP().bind(model, cross_entropy)
    assert torch.equal(model(x), source(x))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_model_equals_eager_without_recompiling():
    import torch._dynamo
    from torch._dynamo.backends.registry import lookup_backend

    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    eager, compiled = net(torch.float32), net(torch.float32)
    data = batches(8, torch.float32)
    method = DecorrelatedBP(decor_lr=0.01, kappa=0.1, sample_fraction=0.5)
    torch.manual_seed(0)
    a = method.bind(eager, cross_entropy)
    torch.manual_seed(0)
    b = method.bind(compiled, cross_entropy)
    compiled.compile(backend=counting)
    want = train(a, torch.optim.SGD(eager.parameters(), 0.1), data)
    optimizer = torch.optim.SGD(compiled.parameters(), 0.1)
    got = train(b, optimizer, data[:3])
    early = len(graphs)
    got += train(b, optimizer, data[3:])
    assert len(graphs) == early, f"{len(graphs) - early} more graphs after three steps"
    torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(R_of(compiled[0]), R_of(eager[0]), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.slow
def test_ranks_share_one_update(tmp_path):
    """Two ranks with half a batch each end where one process with the whole batch ends: gradients and R."""
    script = Path(decorrelation_ranks.__file__)
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), str(tmp_path / "store"), str(tmp_path)], cwd=script.parent)
        for rank in range(2)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0], "a rank failed"
    states = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    alone = decorrelation_ranks.train(decorrelation_ranks.model())
    for key, want in alone.items():
        assert torch.equal(states[0][key], states[1][key]), f"{key} differs between the ranks"
        torch.testing.assert_close(states[0][key], want, rtol=1e-10, atol=1e-12, msg=f"{key} differs from one process")


def test_refused_combinations_say_why():
    for method, message in {
        DecorrelatedBP(inner=DDG(processes=True)): r"^DecorrelatedBP on DDG\(processes=True\): its matrices would",
        DecorrelatedBP(preserve_function=True, inner=DDG()): r"^DecorrelatedBP\(preserve_function=True\) on DDG: it wo",
    }.items():
        with pytest.raises(TypeError, match=message):
            method.bind(net(), cross_entropy)
    with pytest.raises(ValueError, match=r"structure = 'diagonal': must be one of full, block, channel"):
        DecorrelatedBP(structure="diagonal")
    with pytest.raises(ValueError, match=r"rule = 'other': must be one of standard, normalized"):
        DecorrelatedBP(rule="other")


@pytest.mark.parametrize(
    "settings",
    [{"structure": "block", "block_size": 9}, {"structure": "channel"}, {"rule": "normalized"}, {"center": True}],
)
def test_exact_setting_is_backprop_to_the_bit(settings):
    ours, plain = net(), net()
    method = DecorrelatedBP(**settings).exact(ours)
    data = batches(4)
    got = train(method.bind(ours, cross_entropy), torch.optim.SGD(ours.parameters(), 0.1), data)
    want = train(Backprop().bind(plain, cross_entropy), torch.optim.SGD(plain.parameters(), 0.1), data)
    assert got == want
