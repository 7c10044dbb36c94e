"""`as_chain`: somebody else's model seen as a `Chain`, without changing the model.

A view is a new module whose parts *are* the model's own submodules and parameters: it computes the same
numbers in the same order, its gradients land in the model's parameters, and hooks on the model's layers fire
once per forward. Hooks on the model itself or on its containers (a block, a stage) do not fire, as the view
calls what is inside them. Nothing in a view works in place on a block's input or output, whatever the model
does there.

A view sees the layers that the model has when it is made: replace a classifier first, then call `as_chain`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from fastbp.chain import Chain, Replace, Residual, transition
from fastbp.recurrent import Recurrent
from fastbp.view_parts import INSTEAD, class_of, is_a, refuse, refuse_wrapped
from fastbp.views_timm import TIMM_VIEWS
from fastbp.views_torch import TORCH_VIEWS

_VIEWS = TORCH_VIEWS | TIMM_VIEWS
_PASSING = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout2d,
)  # may hand on their input's memory


def as_chain(model: nn.Module) -> Chain:
    """The Chain view of a model; a `Chain` is returned as it is.

    Accepted: `Chain`; `nn.Sequential`, where plain children before the first `Residual` become the stem,
    those after the last one the head, those between them transitions (nested Sequentials and Chains that hold a
    `Residual`, and nn.TransformerEncoder, are unrolled; where there is none at all, every child becomes a block
    without residual path; an expensive layer between others is one as `Residual(layer, Replace())`);
    nn.TransformerEncoder; ResNet with BasicBlock or Bottleneck, VisionTransformer, SwinTransformer and ConvNeXt of
    torchvision and timm, and timm's ResNetV2 and VisionTransformerDistilled. Attention and MLP are two blocks;
    what changes the shape between stages is a transition, unless it is the shortcut of a block.

    Raises:
        TypeError: another class (subclasses included, as their forward may differ), a variant that a view does not
            reproduce, or a model in DistributedDataParallel, DataParallel or torch.compile; the message says what to
            pass instead.
        ValueError: an empty `nn.Sequential`.
    """
    if is_a(model, Chain):
        return model  # type: ignore[return-value]
    if is_a(model, nn.Sequential):
        return _sequential(model)
    if isinstance(model, Recurrent):
        raise TypeError(
            f"as_chain cannot see a {class_of(model)} as a chain: all steps of a recurrent layer share its weights; "
            "train it with Backprop or HighwayBP"
        )
    view = _VIEWS.get(class_of(model))
    if view is None:
        past = f"as_chain cannot see into a {class_of(model)}: HighwayBP and DDG call the blocks themselves, past it"
        refuse_wrapped(model, past, "plain model")
        raise TypeError(f"as_chain cannot see into a {class_of(model)}: {INSTEAD}")
    if any(getattr(module, "grad_checkpointing", False) for module in model.modules()):
        refuse(model, "gradient checkpointing is on; call model.set_grad_checkpointing(False)")
    return view(model)


def _sequential(model: nn.Module) -> Chain:
    steps = list(_steps(model))
    at = [i for i, step in enumerate(steps) if isinstance(step, Residual)]
    if not at:
        return Chain(nn.Identity(), [Residual(_keeping(step), Replace()) for step in steps], nn.Identity())
    stem, middle, head = steps[: at[0]], steps[at[0] : at[-1] + 1], steps[at[-1] + 1 :]
    blocks = [step if isinstance(step, Residual) else transition(_keeping(step)) for step in middle]
    return Chain(_run(stem), blocks, _keeping(_run(head)))


def _steps(module: nn.Module, outermost: bool = True) -> Iterator[nn.Module]:
    """The steps of a Sequential in order; what is nested is taken apart where it holds blocks."""
    inside: Iterable[nn.Module] | None = None
    if outermost or (not isinstance(module, Residual) and any(_holds_blocks(m) for m in module.modules())):
        if type(module) is nn.TransformerEncoder:
            module = as_chain(module)
        if isinstance(module, Chain) and is_a(module, Chain):
            inside = (module.stem, *module.blocks, module.head)
        elif isinstance(module, nn.Sequential) and is_a(module, nn.Sequential):
            inside = module
    if inside is None:
        yield module
    else:
        for child in inside:
            yield from _steps(child, outermost=False)


def _holds_blocks(module: nn.Module) -> bool:
    return isinstance(module, Residual) or type(module) is nn.TransformerEncoder


def _run(steps: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*steps) if steps else nn.Identity()


def _keeping(step: nn.Module) -> nn.Module:
    """The step, on a copy of its input where it begins in place (`nn.ReLU(inplace=True)`)."""
    for leaf in (m for m in step.modules() if not any(m.children())):
        if getattr(leaf, "inplace", False):
            return _OnCopy(step)
        if not isinstance(leaf, _PASSING):
            break
    return step


class _OnCopy(nn.Module):
    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x.clone())
