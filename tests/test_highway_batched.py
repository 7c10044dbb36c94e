"""Blocks of equal structure run as one call: the same gradients as one by one, and a loop for all that is not known."""

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastbp import Chain, DecorrelatedBP, HighwayBP, LayerDropBack, Residual
from fastbp.alike import alike_blocks
from fastbp.chain import AddReLU, Replace
from fastbp.layers import MeanTokens, PatchEmbedding, SelfAttention
from fastbp.nets import gpt_tiny, mlp, resnet_tiny, vit_tiny
from fastbp.testing import check_method
from fastbp.views import as_chain
from test_chain import torchvision_vit


def timm_vit(**more):
    timm = pytest.importorskip("timm")
    size = {"img_size": 16, "patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **size | more)


def mixed():
    """Two kinds of equal blocks with others between them: another merge, another width, no residual path."""
    kinds = [
        lambda: Residual(nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Identity())),
        lambda: Residual(nn.Sequential(nn.LayerNorm(6, bias=False), nn.Linear(6, 4), nn.SiLU(), nn.Linear(4, 6))),
        lambda: Residual(nn.Linear(6, 6), AddReLU()),
        lambda: Residual(nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 6))),
        lambda: Residual(nn.Sequential(nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6)), Replace()),
    ]
    order = [0, 1, 2, 0, 1, 3, 4, 1, 0]
    return Chain(nn.Sequential(nn.Flatten(), nn.Linear(48, 6)), [kinds[i]() for i in order], nn.Linear(6, 5))


def torch_encoder(**layer):
    """Attention over the first axis of each sample, or over the second."""
    sizes = {"d_model": 8, "nhead": 2, "dim_feedforward": 12, "dropout": 0.0, "norm_first": True}
    stack = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes | layer), 3, enable_nested_tensor=False)
    for p in stack.parameters():  # its layers are copies of one
        p.data += 0.1 * torch.randn_like(p)
    return nn.Sequential(PatchEmbedding(3, 16, 16, 8, 8), stack, MeanTokens(), nn.Linear(8, 5))


NETS = {
    "torch encoder": torch_encoder,
    "torch encoder, batch first": lambda: torch_encoder(batch_first=True, activation=nn.GELU(), bias=False),
    "torchvision vit": lambda: torchvision_vit(image_size=16),
    "mlp": lambda: mlp((3, 4, 4), 5, depth=4, width=8),
    "vit": lambda: vit_tiny((3, 4, 4), 5, patch=2, dim=8, depth=3, heads=2),
    "timm vit": timm_vit,
    "timm vit scaled": lambda: timm_vit(qk_norm=True, init_values=0.3, scale_attn_norm=True, scale_mlp_norm=True),
    "mixed": mixed,
}
GROUPS = {
    "torch encoder": [(0, 2, 4), (1, 3, 5)],
    "torch encoder, batch first": [(0, 2, 4), (1, 3, 5)],
    "torchvision vit": [(0, 2), (1, 3)],
    "mlp": [(0, 1, 2, 3)],
    "vit": [(0, 2, 4), (1, 3, 5)],
    "timm vit": [(0, 2), (1, 3)],
    "timm vit scaled": [(0, 2), (1, 3)],
    "mixed": [(0, 3, 8), (1, 4, 7)],
}


def net_and_batch(name):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(4)
        model = NETS[name]().double()
        for p in model.parameters():
            p.data += 0.1 * torch.randn_like(p)  # layer norms and biases start alike
        side = {"mlp": 4, "vit": 4, "mixed": 4}.get(name, 16)
        return model, torch.randn(3, 3, side, side, dtype=torch.float64), torch.tensor([0, 2, 1])


def gradients(model, x, y, method, loss_fn=cross_entropy):
    model = copy.deepcopy(model)
    estimator = method.bind(model, loss_fn)
    estimator.start_epoch(2)
    torch.manual_seed(5)
    loss = estimator.backward(x, y)
    return loss, {name: p.grad for name, p in model.named_parameters()}, model


def assert_same(a, b, tolerance=1e-10):
    least = 1e-3 * max(grad.norm() for grad in b.values() if grad is not None)  # what a batch norm cancels is rounding
    for name, grad in a.items():
        assert (grad is None) == (b[name] is None), name
        if grad is not None:
            error = (grad - b[name]).norm() / b[name].norm().clamp_min(least)
            assert error <= tolerance, f"{name} differs by {error:.3g}"


@pytest.mark.parametrize("name", NETS)
def test_groups(name):
    chain = as_chain(net_and_batch(name)[0])
    assert [together.members for together in alike_blocks(chain.residuals())] == GROUPS[name]


@pytest.mark.parametrize("settings", [{}, {"gamma": 0.2}, {"combination": "min_residual", "gamma": 0.1}], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_equals_the_loop(name, settings):
    model, x, y = net_and_batch(name)
    for k in (0, 1, 2, 9):
        method = HighwayBP(iterations=k, **settings)
        loss, want, _ = gradients(model, x, y, method)
        got_loss, got, _ = gradients(model, x, y, replace(method, batched=True))
        assert torch.equal(loss, got_loss), "the forward is not the model's own"
        assert_same(got, want)


def test_gpt_with_a_loss_per_token_equals_the_loop():
    model = gpt_tiny((6,), 7, dim=8, depth=2, heads=2).double()
    x = torch.randint(7, (3, 6))
    loss_fn = lambda out, y: cross_entropy(out.flatten(0, 1), y.flatten())  # noqa: E731
    _, want, _ = gradients(model, x, x.roll(1), HighwayBP(iterations=2, gamma=0.1), loss_fn)
    _, got, _ = gradients(model, x, x.roll(1), HighwayBP(iterations=2, gamma=0.1, batched=True), loss_fn)
    assert_same(got, want)


def equal_blocks():
    torch.manual_seed(0)
    return mlp((1, 8, 8), 4, depth=4, width=16).double()


def test_method_conforms():
    check_method(HighwayBP(iterations=2, gamma=0.1, batched=True), make_model=equal_blocks)


class Kept:
    """What autograd saved: it lives as long as the graph that needs it."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()


def test_no_blocks_intermediates_outlive_its_forward():
    """The first axis of hidden features is the batch in a block alone, the blocks in branches that run as one."""
    model = vit_tiny((3, 4, 4), 5, patch=2, dim=8, depth=2, heads=2).double()
    x, y = torch.randn(3, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 2, 1])
    saved, axes = weakref.WeakSet(), []
    hidden = lambda: {len(k.tensor) for k in saved if k.tensor.dim() > 2 and k.tensor.shape[-1] == 16}  # noqa: E731
    model.head.register_forward_pre_hook(lambda m, args: axes.append(hidden()))

    def keep(tensor):
        saved.add(kept := Kept(tensor))
        return kept

    for batched in (False, True):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
            HighwayBP(iterations=1, batched=batched).bind(model, cross_entropy).backward(x, y)
    assert axes == [{3}, {2}], f"first axes of hidden features alive after the forward, alone and batched: {axes}"


@pytest.mark.parametrize(
    "change",
    [
        lambda net: nn.utils.parametrizations.weight_norm(net.blocks[1].branch[1]),
        lambda net: net.blocks[1].branch[2].register_forward_hook(lambda m, args, out: 2 * out),
        lambda net: net.blocks[1].branch.register_full_backward_hook(lambda m, before, after: None),
        lambda net: net.blocks[1].branch.append(nn.Dropout(0.3)),
        lambda net: net.blocks[1].branch.__setitem__(2, nn.ReLU(inplace=True)),
        lambda net: net.blocks[1].branch.__setitem__(2, nn.PReLU()),
        lambda net: net.blocks[1].branch.__setitem__(0, nn.LayerNorm(8, eps=0.1)),
    ],
    ids=["parametrized", "hook", "backward hook", "dropout", "in place", "unknown layer", "other eps"],
)
def test_a_changed_block_runs_by_itself(change):
    model, x, y = net_and_batch("mlp")
    change(model)
    model.double()
    assert [together.members for together in alike_blocks(model.residuals())] == [(0, 2, 3)]
    _, want, _ = gradients(model, x, y, HighwayBP(iterations=2))
    _, got, _ = gradients(model, x, y, HighwayBP(iterations=2, batched=True))
    assert_same(got, want)


def test_attention_differs_by_heads_and_mask():
    def blocks(**other):
        parts = [SelfAttention(4, 2, causal=True), SelfAttention(4, **{"heads": 2, "causal": True} | other)]
        return [Residual(nn.Sequential(part)) for part in parts]

    assert len(alike_blocks(blocks())) == 1
    assert not alike_blocks(blocks(heads=1))
    assert not alike_blocks(blocks(causal=False))


def test_convolutions_dropout_and_single_blocks_loop():
    assert alike_blocks(resnet_tiny((1, 8, 8), 3).residuals()) == []
    assert alike_blocks([Residual(nn.Sequential(nn.Dropout(0.1), nn.Linear(2, 2))) for _ in range(3)]) == []
    assert len(alike_blocks([Residual(nn.Sequential(nn.Dropout(0.0), nn.Linear(2, 2))) for _ in range(3)])) == 1
    assert alike_blocks([Residual(nn.Linear(2, 2)), Residual(nn.Linear(2, 2, bias=False))]) == []
    assert alike_blocks([Residual(nn.Linear(2, 2), Replace()), Residual(nn.Linear(2, 2), Replace())]) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: resnet_tiny((3, 4, 4), 5),
        lambda: torch_encoder(dropout=0.1),
        lambda: torch_encoder(norm_first=False),
        lambda: gpt_tiny((6,), 7, dim=8, depth=2, heads=2, norm="post"),
        lambda: Chain(nn.Identity(), [Residual(nn.Linear(2, 2)), Residual(nn.Tanh())], nn.Identity()),
    ],
)
def test_batched_without_equal_blocks_is_refused(make):
    model = make()
    rule = (
        rf"^HighwayBP\.batched = True: no two blocks of this {type(model).__name__} can run as one call: .*; omit it$"
    )
    with pytest.raises(ValueError, match=rule):
        HighwayBP(batched=True).bind(model, cross_entropy)
    HighwayBP().bind(model, cross_entropy)


def test_torch_attention_with_more_than_one_matrix_loops():
    def blocks(**other):
        encoder = torch_encoder()[1]
        for layer in encoder.layers:
            layer.self_attn = nn.MultiheadAttention(8, 2, **other)
        return as_chain(encoder).residuals()[::2]

    assert alike_blocks(blocks())
    for other in ({"kdim": 4}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"dropout": 0.1}):
        assert not alike_blocks(blocks(**other)), other


def test_equal_blocks_on_states_of_other_shapes_loop():
    """Element-wise branches are alike whatever the width of what they get."""
    blocks = [Residual(nn.Tanh()), Residual(nn.Linear(4, 3), Replace()), Residual(nn.Tanh())]
    model = Chain(nn.Identity(), blocks, nn.Identity()).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    assert [t.members for t in alike_blocks(model.residuals())] == [(0, 2)]
    _, want, _ = gradients(model, x, y, HighwayBP(iterations=2))
    _, got, _ = gradients(model, x, y, HighwayBP(iterations=2, batched=True))
    assert_same(got, want)


@pytest.mark.parametrize("wrapper", [LayerDropBack(unit="layer"), LayerDropBack(unit="prefix"), DecorrelatedBP()])
def test_under_a_wrapper_equals_the_loop(wrapper):
    model, x, y = net_and_batch("mlp")
    _, want, _ = gradients(model, x, y, replace(wrapper, inner=HighwayBP(iterations=2)))
    _, got, bound = gradients(model, x, y, replace(wrapper, inner=HighwayBP(iterations=2, batched=True)))
    assert_same(got, want)
    if isinstance(wrapper, LayerDropBack):
        assert any(grad is None for grad in got.values()), "nothing was dropped"
        assert alike_blocks(bound.residuals()), "the layers are plain again"
    else:
        assert not alike_blocks(bound.residuals()), "parametrized layers must loop"


def test_frozen_and_shared_weights():
    model, x, y = net_and_batch("mlp")
    model.blocks[2].branch[3].weight = model.blocks[0].branch[3].weight  # shared by two blocks
    for name in ("blocks.1.branch.1.weight", "blocks.0.branch.0.bias"):
        model.get_parameter(name).requires_grad_(False)
    _, want, _ = gradients(model, x, y, HighwayBP(iterations=2))
    _, got, _ = gradients(model, x, y, HighwayBP(iterations=2, batched=True))
    assert want["blocks.1.branch.1.weight"] is None
    assert_same(got, want)


def test_bfloat16_autocast_is_near_the_loop():
    torch.manual_seed(0)
    model = vit_tiny((3, 8, 8), 5, patch=4, dim=16, depth=3, heads=2)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 5
    with torch.autocast("cpu", torch.bfloat16):
        _, want, _ = gradients(model, x, y, HighwayBP(iterations=2))
        _, got, _ = gradients(model, x, y, HighwayBP(iterations=2, batched=True))
    for name, grad in want.items():
        cosine = torch.nn.functional.cosine_similarity(grad.flatten(), got[name].flatten(), dim=0)
        assert cosine > 0.99, f"{name}: cosine {cosine:.4f}"


def test_a_weight_shared_with_the_head_learns_under_autocast():
    """A cast that autocast cached without a graph would leave the head's share out."""
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8, bias=False)) for _ in range(2)]
    model = Chain(nn.Linear(4, 8), [Residual(branch) for branch in branches], nn.Linear(8, 8, bias=False))
    model.head.weight = branches[0][1].weight
    x, y = torch.randn(16, 4), torch.arange(16) % 8
    with torch.autocast("cpu", torch.bfloat16):
        _, want, _ = gradients(model, x, y, HighwayBP(iterations=1))
        _, got, _ = gradients(model, x, y, HighwayBP(iterations=1, batched=True))
    for name, grad in want.items():
        assert (got[name] - grad).norm() < 0.05 * grad.norm(), f"{name}: {got[name].norm()} instead of {grad.norm()}"
