"""torch.compile: masks come in few variants, none is stale, and torch never gives up and runs eagerly."""

import copy

import pytest
import torch
from torch import nn

from fastbp import LayerDropBack
from test_layerdropback import dropping

timm = pytest.importorskip("timm")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # of dynamo's own reading
]
MASKS = 40


@pytest.fixture
def graphs():
    """Graphs that were compiled, and the backend that counts them; reaching the limit of recompilations fails."""
    import torch._dynamo as dynamo

    dynamo.reset()
    compiled, inner = [], dynamo.lookup_backend("aot_eager")

    def backend(graph, inputs):
        compiled.append(graph)
        return inner(graph, inputs)

    with dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield compiled, backend
    dynamo.reset()


def vit(depth):
    torch.manual_seed(0)
    settings = dict(img_size=16, patch_size=8, embed_dim=16, depth=depth, num_heads=2, num_classes=3)
    return timm.create_model("vit_tiny_patch16_224", **settings)


def equals_eager(compiled, plain, method, epochs=(2,)):
    """Gradients of MASKS steps per epoch against the same method in eager mode; returns how many masks there were."""
    ours, slow = dropping(compiled, method), dropping(plain, method)
    x, y = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 2, 0])
    masks = set()
    for epoch in epochs:
        for estimator in (ours, slow):
            estimator.start_epoch(epoch)
        for step in range(MASKS):
            compiled.zero_grad()
            plain.zero_grad()
            torch.testing.assert_close(ours.backward(x, y), slow.backward(x, y))
            for (name, a), b in zip(plain.named_parameters(), compiled.parameters(), strict=True):
                assert (a.grad is None) == (b.grad is None), f"epoch {epoch}, step {step}: {name} is masked otherwise"
                if a.grad is not None:
                    torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6, msg=f"step {step}: {name}")
            masks.add(tuple(slow.dropped) if slow.dropping else ())
    return len(masks)


def test_equal_blocks_share_four_graphs(graphs):  # I15
    compiled, backend = graphs
    plain = vit(depth=4)
    model = copy.deepcopy(plain)
    for block in model.blocks:
        block.compile(backend=backend)
    masks = equals_eager(model, plain, LayerDropBack(unit="block"))
    assert masks > 10, f"only {masks} masks"
    assert len(compiled) <= 4, f"{len(compiled)} graphs for kept or dropped blocks with or without a graph below"


def test_a_pool_of_four_makes_five_variants_of_a_compiled_model(graphs):  # I15
    compiled, backend = graphs
    plain = vit(depth=1)
    model = torch.compile(copy.deepcopy(plain), backend=backend)
    assert isinstance(model, nn.Module)
    masks = equals_eager(model, plain, LayerDropBack(pool=4), epochs=(0, 2))
    assert masks == 5, f"{masks} masks: four patterns and none"
    assert len(compiled) <= 5, f"{len(compiled)} graphs of the whole model for 5 masks"


def test_equal_blocks_under_a_cut_share_few_graphs(graphs):  # I15
    """One for a block below the cut, one with it just below, one per place inside, one for a block above: n + 2."""
    compiled, backend = graphs
    plain = vit(depth=3)
    model = copy.deepcopy(plain)
    for block in model.blocks:
        block.compile(backend=backend)
    masks = equals_eager(model, plain, LayerDropBack(unit="prefix"))
    layers = sum(any(True for _ in m.parameters(recurse=False)) for m in plain.blocks[0].modules())
    assert masks > 10, f"only {masks} cuts"
    assert len(compiled) <= layers + 2, f"{len(compiled)} graphs of blocks of {layers} layers"
