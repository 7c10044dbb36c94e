"""Own nets: shapes, structure, gradients, and a start that is a pure function of the seed."""

import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastbp import HighwayBP
from fastbp.chain import Add, Chain, Residual, ShortcutAdd, has_residual_path
from fastbp.layers import ChannelsToColumns, ColumnsToChannels, SelfAttention, SubsamplePad
from fastbp.models import make_model
from fastbp.nets import NETS
from fastbp.recurrent import Recurrent
from fastbp.views import as_chain

IMAGE, TEXT, CLASSES = (1, 8, 8), (12,), 10


def shape_for(name):
    return TEXT if name == "gpt_tiny" else IMAGE


def batch(name, n=4):
    generator = torch.Generator().manual_seed(0)
    if name == "gpt_tiny":
        tokens = torch.randint(CLASSES, (n, TEXT[0] + 1), generator=generator)
        return tokens[:, :-1], tokens[:, 1:]
    return torch.randn(n, *IMAGE, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


def loss_of(out, y):
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


@pytest.mark.parametrize("name", NETS)
def test_forward_and_backward_reach_every_parameter(name):
    model = make_model(name, shape_for(name), CLASSES, {}, seed=0)
    if name in ("gru", "lstm"):
        assert isinstance(model, Recurrent)
    else:
        assert isinstance(model, Chain)
        assert as_chain(model) is model
    x, y = batch(name)
    out = model(x)
    assert out.shape == (*y.shape, CLASSES), f"{name} returned {tuple(out.shape)}"
    loss = loss_of(out, y)
    assert 0.5 < loss.item() < 6.0, f"{name} starts at loss {loss.item():.2f}, chance is {torch.tensor(10.0).log():.2f}"
    loss.backward()
    for key, p in model.named_parameters():
        assert p.grad is not None, f"{key} got no gradient"
        assert p.grad.isfinite().all(), f"{key} got a non-finite gradient"
        assert p.grad.any(), f"{key} got a zero gradient"


@pytest.mark.parametrize("name", ["resnet_tiny", "mlp", "vit_tiny", "gpt_tiny"])
def test_a_batch_can_be_learned(name):
    model = make_model(name, shape_for(name), CLASSES, {}, seed=0)
    x, y = batch(name, n=16)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0], f"{name}: loss {losses[0]:.2f} became {losses[-1]:.2f}"


@pytest.mark.parametrize("name", [*NETS, "timm:resnet10t", "tests.test_nets:noisy"])
def test_start_is_a_pure_function_of_the_seed(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "tests.test_nets", sys.modules[__name__])
    if name.startswith("timm"):
        pytest.importorskip("timm")

    def weights(seed):
        return torch.cat(
            [p.detach().flatten() for p in make_model(name, shape_for(name), CLASSES, {}, seed).parameters()]
        )

    before = torch.get_rng_state()
    first = weights(3)
    assert torch.equal(torch.get_rng_state(), before), "making a model moved the caller's generator"
    torch.rand(5)
    assert torch.equal(weights(3), first), "the same seed gave other weights"
    assert not torch.equal(weights(4), first), "another seed gave the same weights"


def noisy(input_shape, classes, *, scale=1.0):
    size = torch.Size(input_shape).numel()
    net = nn.Sequential(nn.Flatten(), nn.Linear(size, classes))
    nn.init.normal_(net[1].weight, std=scale)
    return net


def listed(input_shape, classes):
    return [input_shape, classes]


def test_a_function_of_the_users_is_called_with_shape_classes_and_arguments(monkeypatch):
    monkeypatch.setitem(sys.modules, "users_module", sys.modules[__name__])
    model = make_model("users_module:noisy", IMAGE, 7, {"scale": 0.0}, seed=0)
    assert model(torch.ones(2, *IMAGE)).shape == (2, 7)
    assert not model[1].weight.any(), "the argument was not passed on"
    with pytest.raises(TypeError, match=r"returned a list, not an nn\.Module"):
        make_model("users_module:listed", IMAGE, 7, {}, seed=0)


@pytest.mark.parametrize(
    ("depth", "parameters"),
    # He et al. 2015, table 6, give 0.27, 0.46, 0.85 and 1.7 million for 3x32x32 and 10 classes
    [(20, 0.27e6), (32, 0.46e6), (56, 0.85e6), (110, 1.7e6)],
)
def test_cifar_resnets_have_the_papers_size_and_stages(depth, parameters):
    model = make_model(f"resnet{depth}", (3, 32, 32), 10, {}, seed=0)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / parameters - 1) < 0.025, f"{count} parameters, the paper has {parameters:.0f}"
    assert len([m for m in model.modules() if isinstance(m, nn.Conv2d)]) == depth - 1, (
        "depth counts the convolutions and one Linear"
    )
    merges = [type(block.merge) for block in model.residuals()]
    n = (depth - 2) // 6
    assert len(merges) == 3 * n
    assert [i for i, merge in enumerate(merges) if merge is ShortcutAdd] == [n, 2 * n], "stages begin elsewhere"
    assert all(has_residual_path(block) for block in model.residuals())
    assert not list(model.residuals()[n].merge.parameters()), "shortcut A has no parameters"
    conv = model.residuals()[-1].branch[2].weight  # 64 -> 64, 3x3: variance 2 / (9 * 64)
    assert conv.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    if depth == 20:
        sizes, h = [], model.stem(torch.zeros(1, 3, 32, 32))
        for block in model.blocks:
            h = block(h)
            sizes.append(tuple(h.shape[1:]))
        assert sizes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3


def test_shortcut_a_subsamples_and_pads():
    x = torch.arange(2 * 5 * 5.0).view(1, 2, 5, 5)
    out = SubsamplePad(2, 4)(x)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2])
    assert out.shape == (1, 4, 3, 3)
    assert not out[:, 2:].any(), "new channels are zero"


@pytest.mark.parametrize("causal", [False, True])
def test_attention_equals_the_formula(causal):
    torch.manual_seed(0)
    attention = SelfAttention(6, 2, causal=causal).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    q, k, v = attention.qkv(x).split(6, dim=-1)
    heads = []
    for h in range(2):
        part = slice(3 * h, 3 * h + 3)
        scores = q[..., part] @ k[..., part].mT / 3**0.5
        if causal:
            scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[..., part])
    want = attention.out(torch.cat(heads, -1))
    torch.testing.assert_close(attention(x), want, rtol=1e-12, atol=1e-12)


def test_gpt_sees_no_future_and_takes_shorter_texts():
    model = make_model("gpt_tiny", TEXT, CLASSES, {"depth": 2}, seed=0).eval()
    x, _ = batch("gpt_tiny")
    changed = x.clone()
    changed[:, 7:] = (changed[:, 7:] + 1) % CLASSES
    torch.testing.assert_close(model(x)[:, :7], model(changed)[:, :7])
    assert not torch.allclose(model(x)[:, 7:], model(changed)[:, 7:]), "the model ignores its input"
    torch.testing.assert_close(model(x[:, :5]), model(x)[:, :5])


def test_transformers_split_layers_into_two_blocks():
    for name in ("vit_tiny", "gpt_tiny"):
        blocks = make_model(name, shape_for(name), CLASSES, {"depth": 3}, seed=0).residuals()
        assert [type(block.merge) for block in blocks] == [Add] * 6, f"{name}: three layers are six sublayers"


def test_vit_patch_defaults_and_divides():
    tokens = lambda **args: make_model("vit_tiny", args.pop("shape"), 10, args, seed=0).stem.position.shape[1]  # noqa: E731
    assert tokens(shape=(1, 8, 8)) == 16
    assert tokens(shape=(3, 32, 32)) == 64
    assert tokens(shape=(3, 32, 16), patch=8) == 8


@pytest.mark.parametrize(
    ("name", "shape", "args", "message"),
    [
        ("resnet_tin", IMAGE, {}, "no model 'resnet_tin'; did you mean resnet_tiny.; known: .*timm:NAME"),
        ("mlp", IMAGE, {"dept": 2}, "model mlp has no argument 'dept'; did you mean depth"),
        ("resnet20", IMAGE, {"depth": 38}, "model resnet20 has no argument 'depth'"),
        ("mlp", IMAGE, {"depth": 0}, "depth = 0: must be a whole number of at least 1"),
        ("resnet_tiny", IMAGE, {"width": 2.5}, "width = 2.5: must be a whole number"),
        (
            "resnet_tiny",
            TEXT,
            {},
            r"resnet_tiny: input_shape must be \(channels, height, width\), got \(12,\)",
        ),
        ("resnet20", (64,), {}, r"resnet20: input_shape must be \(channels, height, width\)"),
        ("gpt_tiny", IMAGE, {}, r"gpt_tiny: input_shape must be \(tokens,\), got \(1, 8, 8\)"),
        ("vit_tiny", (1, 9, 9), {}, "9x9 image does not divide into patches of 2"),
        ("vit_tiny", IMAGE, {"heads": 5}, "dim 64 is not a multiple of heads 5"),
        ("fastbp.nets:resnet_tin", IMAGE, {}, "model 'fastbp.nets:resnet_tin' cannot be imported"),
        ("no_such_module:make", IMAGE, {}, "'no_such_module:make' cannot be imported: No module named"),
    ],
)
def test_wrong_names_and_values_are_named(name, shape, args, message):
    with pytest.raises(ValueError, match=message):
        make_model(name, shape, CLASSES, args, seed=0)


def test_timm_and_torchvision_by_name():
    pytest.importorskip("timm")
    pytest.importorskip("torchvision")
    model = make_model("timm:resnet10t", (1, 32, 32), 7, {"drop_rate": 0.1}, seed=0)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)
    assert model.drop_rate == 0.1
    model = make_model("torchvision:resnet18", (3, 32, 32), 7, {"zero_init_residual": True}, seed=0)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match="timm has no model 'resnet19'; did you mean resnet"):
        make_model("timm:resnet19", (3, 32, 32), 7, {}, seed=0)
    with pytest.raises(ValueError, match="torchvision has no model 'resnet19'; did you mean resnet"):
        make_model("torchvision:resnet19", (3, 32, 32), 7, {}, seed=0)
    with pytest.raises(ValueError, match="take 3 channels, the data has 1; use timm:resnet18"):
        make_model("torchvision:resnet18", IMAGE, 7, {}, seed=0)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_missing_libraries_name_the_extra(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, f"{library}.models", None)
    with pytest.raises(ImportError, match=rf"{library}:resnet18' needs {library}: pip install fastbp\[vision\]"):
        make_model(f"{library}:resnet18", (3, 32, 32), 7, {}, seed=0)


def test_columns_become_channels_and_come_back():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    low = ColumnsToChannels(2)(x)
    assert low.shape == (2, 6, 4, 4)
    for j in (0, 1):
        want = (x[:, :, 0::2, j::2] + x[:, :, 1::2, j::2]) / 2
        torch.testing.assert_close(low[:, 3 * j : 3 * (j + 1)], want)
    torch.testing.assert_close(ColumnsToChannels(2)(low), ColumnsToChannels(4)(x))
    for s in (2, 4):
        y = torch.randn(2, 3 * s, 8 // s, 8 // s, generator=generator, dtype=torch.float64)
        down, up = ColumnsToChannels(s), ChannelsToColumns(s)
        torch.testing.assert_close(down(up(y)), y)
        torch.testing.assert_close((down(x) * y).sum(), (x * up(y)).sum() / s)


def test_a_full_stream_is_the_net_that_downsamples_in_its_skip():
    net = make_model("resnet20", (3, 8, 8), CLASSES, {"width": 4, "stream": "full"}, seed=0).double()
    assert all(type(block.merge) is Add for block in net.residuals())
    body, before = [], 1
    for i, block in enumerate(net.residuals()):
        layers = [m for m in block.branch if not isinstance(m, ColumnsToChannels | ChannelsToColumns)]
        factor = 2 ** (i // 3)
        halves = [ColumnsToChannels(2)] if factor != before else []
        merge = ShortcutAdd(ColumnsToChannels(2), relu=False) if halves else Add()
        body.append(Residual(nn.Sequential(*halves, *layers), merge))
        before = factor
    same = Chain(net.stem, body, net.head[1:])
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])
    found = []
    for model in (net, same):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        found.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    net.zero_grad()
    HighwayBP(iterations=9).bind(net, F.cross_entropy).backward(x, y)
    for p, want in zip(net.parameters(), found[0], strict=True):
        torch.testing.assert_close(p.grad, want)


@pytest.mark.parametrize("stream", ["stages", "full"])
def test_a_post_activation_resnet_is_the_papers(stream):
    torch.manual_seed(0)
    net = make_model("resnet20", (3, 8, 8), CLASSES, {"width": 4, "stream": stream, "activation": "post"}).double()
    layers = iter([m for m in net.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.Linear)])
    x, y = torch.randn(4, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 2, 0])

    def normed(h):
        h = next(layers)(h)
        return next(layers)(h)

    h = normed(x).relu()
    for i in range(9):
        s, full = 2 ** (i // 3), stream == "full"
        z = normed(normed(ColumnsToChannels(s)(h) if full else h).relu())
        if full:
            z = ChannelsToColumns(s)(z)
        elif z.shape != h.shape:
            h = torch.cat([h[:, :, ::2, ::2], torch.zeros_like(h[:, :, ::2, ::2])], 1)
        h = (h + z).relu()
    h = ColumnsToChannels(4)(h) if stream == "full" else h
    logits = next(layers)(h.mean((2, 3)))
    assert next(layers, None) is None
    torch.testing.assert_close(net(x), logits)
    F.cross_entropy(logits, y).backward()
    exact = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    HighwayBP(iterations=9).bind(net, F.cross_entropy).backward(x, y)
    for p, want in zip(net.parameters(), exact, strict=True):
        torch.testing.assert_close(p.grad, want)


def test_a_full_stream_refuses_what_it_cannot_halve_twice():
    with pytest.raises(ValueError, match=r"^resnet20: stream = 'full' needs height and width in multiples of 4, got 6"):
        make_model("resnet20", (3, 6, 8), CLASSES, {"stream": "full"})
    with pytest.raises(ValueError, match=r"^resnet20: stream = 'half': must be stages or full$"):
        make_model("resnet20", (3, 8, 8), CLASSES, {"stream": "half"})
    with pytest.raises(ValueError, match=r"^resnet20: activation = 'relu': must be pre or post$"):
        make_model("resnet20", (3, 8, 8), CLASSES, {"activation": "relu"})
