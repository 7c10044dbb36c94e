"""Highway-BP on other people's models: backprop at full iterations, whatever a block is made of."""

import copy

import pytest
import torch
from torch.nn import functional as F

from fastbp import DDG, HighwayBP
from fastbp.chain import Through
from fastbp.views import as_chain
from test_chain import MODELS, batch, build

FAMILIES = [
    "timm resnet18 drop",
    "timm resnext",
    "timm vit drop",
    "timm deit distilled",
    "timm resnetv2_18",
    "timm resnetv2_50",
    "timm resnetv2 post",
    "timm resnetv2 gn",
    "timm swin padded",
    "timm convnext",
    "timm convnextv2",
    "torchvision resnet18",
    "torchvision vit drop",
    "torchvision swin",
    "torchvision swin v2",
    "torchvision convnext",
    "encoder post-LN",
    "encoder pre-LN",
]


def test_every_new_family_is_here():
    assert set(FAMILIES) <= set(MODELS)


@pytest.mark.parametrize("name", FAMILIES)
def test_full_iterations_are_backprop(name):
    """Gradients, batch statistics and random numbers of one training step."""
    model = build(name).train()
    plain = copy.deepcopy(model)
    x, y = batch()
    torch.manual_seed(11)
    want = F.cross_entropy(plain(x), y)
    want.backward()
    after = torch.rand(())
    blocks = len(as_chain(model).blocks)
    for gamma in (0.0, 0.3):
        method = HighwayBP(iterations=blocks, gamma=gamma)
        twin = copy.deepcopy(model)
        torch.manual_seed(11)
        loss = method.bind(twin, F.cross_entropy).backward(x, y)
        assert torch.equal(loss, want.detach()), f"loss {loss}, backprop's {want}"
        assert torch.equal(torch.rand(()), after), "other random numbers were drawn"
        whole = sum(p.grad.square().sum() for p in plain.parameters() if p.grad is not None).sqrt()
        for (key, p), q in zip(plain.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), key
            if p.grad is not None:
                error = (p.grad - q.grad).norm() / p.grad.norm().clamp_min(1e-6 * whole)
                assert error < 1e-8, f"gamma={gamma}: {key} is {error:.3g} from backprop"
        for (key, a), b in zip(plain.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(a, b), f"buffer {key} is not backprop's"


@pytest.mark.parametrize("name", ["timm deit distilled", "timm swin", "torchvision convnext", "encoder post-LN"])
def test_fewer_iterations_point_the_same_way(name):
    """The cosine to the gradient of the blocks is positive from the first round on, and rises to one."""
    model = build(name).eval()
    x, y = batch()
    grads = []
    for k in (0, 2, 50):
        model.zero_grad()
        HighwayBP(iterations=k).bind(model, F.cross_entropy).backward(x, y)
        chain = as_chain(model)
        grads.append(torch.cat([p.grad.flatten() for p in chain.blocks.parameters()]))
    cosines = [F.cosine_similarity(g, grads[-1], dim=0).item() for g in grads]
    assert 0 < cosines[0] < cosines[1] < 1 + 1e-9, f"cosines at k = 0, 2, all: {cosines}"


def block_gradients(model, k):
    """Of every block of its view, with as many rounds."""
    model.zero_grad()
    HighwayBP(iterations=k).bind(model, F.cross_entropy).backward(*batch())
    return [torch.cat([p.grad.flatten() for p in block.parameters()]) for block in as_chain(model).blocks]


STAGED = [name for name in MODELS if any(kind in name for kind in ("convnext", "swin", "resnetv2_", "resnetv2 gn"))]


@pytest.mark.parametrize("name", STAGED)
def test_a_transition_between_stages_cuts_no_highway(name):
    """Every block learns from the first round on, and transitions need no round of their own to be exact."""
    model = build(name).eval()
    assert all(g.any() for g in block_gradients(model, 0)), "at k = 0, a block's gradient is zero"
    blocks = as_chain(model).residuals()
    branches = sum(type(block.merge) is not Through for block in blocks)
    assert 0 < branches < len(blocks), "this model has no transition"
    got = torch.cat(block_gradients(model, branches))
    model.zero_grad()
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    want = torch.cat([p.grad.flatten() for p in as_chain(model).blocks.parameters()])
    assert (got - want).norm() < 1e-10 * want.norm(), f"{(got - want).norm() / want.norm():.3g} from backprop"


CUT = {  # cosines at k = 0, 1 with a transition that carries no gradient past its branch
    "timm convnext": (0.53, 0.75),
    "timm convnextv2": (0.54, 0.75),
    "timm resnetv2_18": (0.25, 0.57),
    "timm resnetv2_50": (0.74, 0.83),
    "timm resnetv2 gn": (0.61, 0.82),
}


@pytest.mark.parametrize("name", CUT)
def test_blocks_before_a_transition_learn_better(name):
    model = build(name).eval()
    zero, one, exact = (torch.cat(block_gradients(model, k)) for k in (0, 1, 50))
    cosines = [F.cosine_similarity(g, exact, dim=0).item() for g in (zero, one)]
    assert cosines[0] > CUT[name][0] + 0.04, f"cosines at k = 0, 1: {cosines}, cut {CUT[name]}"
    assert cosines[1] > CUT[name][1] + 0.1, f"cosines at k = 0, 1: {cosines}, cut {CUT[name]}"


@pytest.mark.parametrize("name", ["timm swin", "timm resnetv2_18", "torchvision convnext", "encoder post-LN"])
def test_ddg_cuts_the_same_views(name):
    """The last module is never late: its first gradients are backprop's, and the loss is the model's own."""
    model = build(name).eval()
    plain = copy.deepcopy(model)
    x, y = batch()
    want = F.cross_entropy(plain(x), y)
    want.backward()
    loss = DDG(modules=2).bind(model, F.cross_entropy).backward(x, y)
    assert torch.equal(loss, want.detach())
    late = [p.grad is None for p in model.parameters()]
    assert any(late), "the first module has nothing to apply yet"
    assert not all(late), "the last module is never late"
    for (key, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        if q.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-9, atol=1e-12, msg=key)
