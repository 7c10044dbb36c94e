"""What the views of several libraries share: class names, refusals, the post-activation block."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn

from fastbp.chain import AddReLU, Residual, ShortcutAdd
from fastbp.units import wrappings

INSTEAD = (
    "pass a fastbp.Chain, an nn.Sequential of fastbp.Residual blocks or with an nn.TransformerEncoder, or a plain "
    "ResNet, VisionTransformer, SwinTransformer or ConvNeXt of torchvision or timm, or timm's ResNetV2 or "
    "VisionTransformerDistilled"
)


def is_a(model: Any, kind: type[nn.Module]) -> bool:
    """Whether the model runs `kind`'s own forward; subclasses that only construct differently count."""
    return isinstance(model, kind) and type(model).forward is kind.forward


def class_of(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def kind_of(model: Any, block: Any, module: str, *classes: str) -> str:
    """The block's class name, which must be one of those of the library.

    Raises:
        TypeError: it is another one.
    """
    if class_of(block) not in [f"{module}.{name}" for name in classes]:
        refuse(model, f"its blocks are {class_of(block)}, only {' and '.join(classes)} of {module} are supported")
    return type(block).__name__


def refuse(model: Any, why: str) -> NoReturn:
    raise TypeError(f"as_chain cannot reproduce this {class_of(model)}: {why}, or {INSTEAD}")


def post_activation(model: Any, branch: list[nn.Module], shortcut: nn.Module | None, last: nn.Module) -> Residual:
    """One block `relu(shortcut(x) + branch(x))`, its last activation out of place."""
    if type(last) is not nn.ReLU:
        refuse(model, f"its blocks end in {type(last).__name__}, only ReLU is supported")
    merge = AddReLU() if shortcut is None else ShortcutAdd(shortcut, relu=True)
    return Residual(nn.Sequential(*branch), merge)


class FirstToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def refuse_wrapped(model: nn.Module, past: str, plain: str) -> None:
    """Raises TypeError for a wrapper whose own work would be passed by in silence; others are let through.

    Args:
        model: that may be one.
        past: how a sentence begins that says so.
        plain: what to pass instead.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise TypeError(
            f"{past}, so that it would average no gradients, whether it is there before `bind` or comes after; pass "
            f"the {plain} (its `.module`) and all-reduce every p.grad after `backward`"
        )
    if isinstance(model, nn.DataParallel):
        raise TypeError(f"{past}, so that it would split no batch; pass the {plain} (its `.module`)")
    if len(list(wrappings(model))) > 1:
        raise TypeError(f"{past}, so that nothing would be compiled; pass the {plain} that torch.compile was given")
