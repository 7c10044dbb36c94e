"""What the weight of a Linear or Conv2d layer sees: which layers can be read, and their inputs as rows."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

Layer = nn.Linear | nn.Conv2d

# Subclasses that apply `weight` to the input of the module, after padding it or after standardising the weight.
_TIMM = ("Conv2dSame", "StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame", "Linear")


def readable_layers(
    model: nn.Module, *, choose: str, max_features: int, width: Callable[[Layer], int], who: str
) -> dict[str, Layer]:
    """The Linear and Conv2d layers whose input is what their weight multiplies, by path in the model.

    Left out: frozen weights, weights shared between layers or already parametrized, the projections of
    `nn.MultiheadAttention` (their weights are read without a call); and, with one warning that lists them, layers
    wider than `max_features` and subclasses with an unknown forward, which may see another input than the layer's.

    Args:
        choose: `all`, `conv`, `linear`, or a regular expression that is searched for in a layer's path.
        max_features: the widest that is let in.
        width: how wide a layer is, such as `features`.
        who: named in the messages.

    Raises:
        TypeError: no layer is left.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    uncalled = {
        id(part) for module in model.modules() if isinstance(module, nn.MultiheadAttention) for part in module.modules()
    }
    layers: dict[str, Layer] = {}
    wide: list[str] = []
    odd: list[str] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or id(layer) in uncalled or parametrize.is_parametrized(layer):
            continue
        if not layer.weight.requires_grad or uses[id(layer.weight)] > 1 or not _chosen(path, layer, choose):
            continue
        if not _is_known(layer):
            odd.append(f"{path} ({type(layer).__name__})")
        elif width(layer) > max_features:
            wide.append(f"{path} ({width(layer)})")
        else:
            layers[path] = layer
    if not layers:
        raise TypeError(
            f"{who}: {type(model).__name__} has no Linear or Conv2d layer "
            + ("" if choose == "all" else f"chosen by layers = {choose!r} ")
            + f"with at most {max_features} input features that is called as a module; "
            f"raise max_features{'' if choose == 'all' else ', choose other layers'} or use another model"
        )
    if wide:
        _warn(f"{who} leaves {len(wide)} layer(s) with more than max_features = {max_features} input features", wide)
    if odd:
        _warn(f"{who} leaves {len(odd)} layer(s) with an unknown forward", odd)
    return layers


def features(layer: Layer) -> int:
    """F: the number of inputs that one output of the layer sees (per group of a convolution)."""
    return layer.weight[0].numel()


def groups_of(layer: Layer) -> int:
    """The groups of a convolution; 1 for a linear layer."""
    return layer.groups if isinstance(layer, nn.Conv2d) else 1


def input_rows(layer: Layer, x: Tensor) -> Tensor:
    """What the weight of a layer sees of an input, one row per token or patch: shape (G, n, F).

    Args:
        layer: Linear (G = 1) or Conv2d (G = groups).
        x: input of the layer: (..., F) for Linear, (N, C, H, W) or (C, H, W) for Conv2d.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    if x.dim() == 3:
        x = x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(x, _padding(layer, x), mode=mode)
    patches = functional.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)  # type: ignore[arg-type]
    return patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


def channel_rows(layer: Layer, x: Tensor) -> Tensor:
    """The channels of every position of an input, without padding: shape (G, n, C / G)."""
    if isinstance(layer, nn.Linear):
        return input_rows(layer, x)
    if x.dim() == 3:
        x = x.unsqueeze(0)
    return x.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 4, 2).flatten(1, 3)


def _chosen(path: str, layer: Layer, choose: str) -> bool:
    kinds = {"all": True, "conv": isinstance(layer, nn.Conv2d), "linear": isinstance(layer, nn.Linear)}
    return kinds[choose] if choose in kinds else re.search(choose, path) is not None


def _is_known(layer: Layer) -> bool:
    kind = type(layer)
    if kind.forward in (nn.Linear.forward, nn.Conv2d.forward):
        return True
    return kind.__module__.startswith("timm.") and kind.__name__ in _TIMM


def _padding(layer: nn.Conv2d, x: Tensor) -> list[int]:
    """Zeros (or copies) around an image: left, right, top, bottom."""
    same = any(kind.__name__ == "Conv2dSame" for kind in type(layer).__mro__)  # parametrized classes are derived
    if not (same or getattr(layer, "same_pad", False)):
        return list(layer._reversed_padding_repeated_twice)
    around: list[int] = []  # of the images themselves, as TensorFlow pads them: the odd one to the right and bottom
    for size, kernel, stride, dilation in reversed(
        list(zip(x.shape[2:], layer.kernel_size, layer.stride, layer.dilation, strict=True))
    ):
        total = max(0, (-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size)
        around += [total // 2, total - total // 2]
    return around


def _warn(what: str, layers: list[str]) -> None:
    warnings.warn(f"{what} plain: {', '.join(layers)}", stacklevel=4)
