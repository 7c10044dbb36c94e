"""At the exact setting every method's loss trajectory is backprop's, to 1e-9 in float64, on own and timm nets."""

import pytest
import torch

from fastbp import DDG, Backprop, DecorrelatedBP, HighwayBP, LayerDropBack
from fastbp.testing import _Suite, sgd, small_batch, small_net

METHODS = [
    Backprop(),
    LayerDropBack(),
    DecorrelatedBP(),
    HighwayBP(),
    HighwayBP(gamma=0.2),
    DDG(modules=2),
    DecorrelatedBP(inner=LayerDropBack(inner=DDG(modules=2))),
]


def timm_resnet():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=4, in_chans=1, stem_width=4, channels=(4, 8, 8, 8)).double()


def timm_vit():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    size = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=4, in_chans=1, drop_path_rate=0.1, **size).double()


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("make_model", [small_net, timm_resnet, timm_vit])
def test_exact_trajectory_is_backprops(method, make_model):
    batch = small_batch if make_model is not timm_resnet else wide_batch
    _Suite(method, sgd, make_model, batch).exact_is_backprop()


@pytest.mark.slow
@pytest.mark.parametrize("method", [DecorrelatedBP(decor_lr=1e-3), LayerDropBack(), HighwayBP(2), DDG()], ids=str)
def test_timm_vit_resumes_and_finalizes(method):
    suite = _Suite(method, sgd, timm_vit, small_batch)
    for check in (suite.resumes, suite.evaluation_leaves_no_trace, suite.finalizes, suite.keeps_frozen):
        check()


def wide_batch(index, size):
    """Images of 32x32, so that the last stage of a ResNet still has more than one value per channel."""
    x, y = small_batch(index, size)
    return torch.nn.functional.interpolate(x, scale_factor=4), y
