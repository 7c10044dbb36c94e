"""The units of LayerDropBack: which parameters share one coin, and which are the head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from fastbp.chain import Chain

_HEAD_NAMES = ("head", "heads", "fc", "classifier", "last_linear", "head_dist")


@dataclass(frozen=True)
class Unit:
    """Parameters that are dropped together; `index` is the position among all units of the model, head included."""

    index: int
    name: str
    parameters: tuple[nn.Parameter, ...]


def droppable_units(model: nn.Module, unit: str) -> list[Unit]:
    """All units of a model but the head's, in registration order.

    The order does not depend on parametrizations (a parametrized weight stands where the plain one stood), on what is
    frozen, or on the device; a tensor shared by several modules belongs to the first of them, or to the head.

    Args:
        model: any module.
        unit: `tensor`, `layer`, `block`, or `prefix` (cut between layers).

    Raises:
        ValueError: nothing would be left to drop.
    """
    head = head_parameters(model)
    groups: dict[str, list[nn.Parameter]] = {}
    seen: set[int] = set()
    for layer, name, parameter in named_parameters(model):
        if id(parameter) in seen:
            continue
        seen.add(id(parameter))
        key = {"tensor": f"{layer}.{name}".lstrip("."), "block": _block_of(model, layer)}.get(unit, layer)
        if id(parameter) in head:
            key = f"{key} (head)"
        groups.setdefault(key, []).append(parameter)
    units = [
        Unit(index, name, tuple(group))
        for index, (name, group) in enumerate(groups.items())
        if not any(id(p) in head for p in group)
    ]
    if not units:
        raise ValueError(
            f"LayerDropBack.unit = {unit!r}: {type(model).__name__} has nothing to drop outside its head; "
            "use a deeper model or another unit"
        )
    return units


def head_parameters(model: nn.Module) -> set[int]:
    """The ids of the classifier's parameters, which are never dropped.

    The head is the part that timm's `get_classifier()` names, a direct child with a usual name (head, fc,
    classifier, ...), the head of a `Chain`; otherwise, or where those own no parameter, the last module that does.
    """
    for part in _head_candidates(model):
        ids = {id(p) for p in part.parameters()}
        if ids:
            return {id(p) for p in _last_layer(part).parameters()}
    raise ValueError(f"{type(model).__name__} has no parameters")


def named_parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yields (layer name, tensor name, parameter) in registration order, seeing through parametrizations."""
    for path, module in model.named_modules(remove_duplicate=True):
        if ".parametrizations." in f".{path}.":
            continue
        if parametrize.is_parametrized(module):
            for name, stack in module.parametrizations.items():  # type: ignore[union-attr]
                for parameter in stack.parameters():
                    yield path, name, parameter
        for name, parameter in module.named_parameters(recurse=False):
            yield path, name, parameter


def _head_candidates(model: nn.Module) -> Iterator[nn.Module]:
    get_classifier = getattr(model, "get_classifier", None)
    if callable(get_classifier):
        part = get_classifier()
        if isinstance(part, nn.Module):
            yield part
    if isinstance(model, Chain):
        yield model.head
    for name, child in model.named_children():
        if name in _HEAD_NAMES:
            yield child
    yield model


def _last_layer(part: nn.Module) -> nn.Module:
    """The last module of `part` that owns parameters itself, parametrized ones included."""
    owners = [path for path, _, _ in named_parameters(part)]
    return part.get_submodule(owners[-1])


def _block_of(model: nn.Module, layer: str) -> str:
    """The path up to the first numbered component (a child of a ModuleList or Sequential), else the layer itself."""
    pieces = layer.split(".")
    number = max((i for i, piece in enumerate(pieces[:3]) if piece.isdigit()), default=None)
    return layer if number is None else ".".join(pieces[: number + 1])
