"""The units of LayerDropBack: which parameters share one coin, and which are the head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

from torch import nn
from torch.nn.utils import parametrize

from fastbp.chain import Chain, Residual
from fastbp.knobs import nearest

_HEAD_NAMES = ("head", "heads", "head_dist", "heads_dist", "classifier", "classifiers", "last_linear")  # not `fc`
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Unit:
    """Parameters that are dropped together; `index` is the position among all units of the model, head included."""

    index: int
    name: str
    parameters: tuple[nn.Parameter, ...]


def droppable_units(model: nn.Module, unit: str, names: Sequence[str] = ()) -> list[Unit]:
    """All units of a model but the head's, in registration order.

    The order does not depend on parametrizations (a parametrized weight stands where the plain one stood), on what is
    frozen, on the device, or on wrapping by DistributedDataParallel and torch.compile; a tensor shared by several
    modules belongs to the first of them, or to the head.

    Args:
        model: any module.
        unit: `tensor`, `layer`, `block`, or `prefix` (cut between layers).
        names: of the head; see `head_parameters`.

    Raises:
        ValueError: nothing would be left to drop, or a name is wrong.
    """
    plain = unwrapped(model)
    head = head_parameters(plain, names)
    named = _once(named_parameters(plain))
    groups: dict[str, list[nn.Parameter]] = {}
    for key, (_, _, parameter) in zip(_keys(plain, named, unit, head), named, strict=True):
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
            f"LayerDropBack.unit = {unit!r}: {type(plain).__name__} has nothing to drop outside its head; "
            "use a deeper model or another unit"
        )
    return units


def head_parameters(model: nn.Module, names: Sequence[str] = ()) -> set[int]:
    """The ids of the parameters that are never dropped.

    By rule they are those of the classifier's last layer: of the part (or each of the parts) that timm's
    `get_classifier()` and `pretrained_cfg["classifier"]` name, of the head of a `Chain`, of the direct children with a
    usual name (head, heads, classifier, ...); otherwise, or where those own no parameter, of the whole model, in order
    of registration. Of a ModuleList or ModuleDict every member is a head.

    Args:
        model: any module.
        names: paths of submodules, all of whose parameters are taken instead of the rule's.

    Raises:
        ValueError: the model has no parameters, or no such submodule with parameters.
    """
    model = unwrapped(model)
    if names:
        return {id(p) for part in _submodules(model, names) for p in part.parameters()}
    for parts in _head_candidates(model):
        layers = [layer for part in parts for layer in _last_layers(part)]
        if layers:
            return {id(p) for layer in layers for p in layer.parameters()}
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


def wrappings(model: nn.Module) -> Iterator[nn.Module]:
    """The model, what DistributedDataParallel or torch.compile wrapped in it, and so on inwards."""
    while True:
        yield model
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:  # torch.compile's; importing its class would import the whole compiler
            model = model.get_submodule("_orig_mod")
        else:
            return


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module inside DistributedDataParallel and torch.compile."""
    return list(wrappings(model))[-1]


Named = Sequence[tuple[str, str, nn.Parameter]]


def _once(named: Iterator[tuple[str, str, nn.Parameter]]) -> Named:
    """Every parameter at the first of its places."""
    first: dict[int, tuple[str, str, nn.Parameter]] = {}
    for entry in named:
        first.setdefault(id(entry[2]), entry)
    return list(first.values())


def _keys(model: nn.Module, named: Named, unit: str, head: set[int]) -> list[str]:
    """For every parameter the name of its unit."""
    if unit == "tensor":
        keys = [f"{layer}.{name}".lstrip(".") for layer, name, _ in named]
    elif unit == "block":
        keys = _timm_blocks(model, named, head) or [_block_of(model, layer) for layer, _, _ in named]
    else:
        keys = [layer for layer, _, _ in named]
    return [_plain(key) for key in keys]


def _timm_blocks(model: nn.Module, named: Named, head: set[int]) -> list[str] | None:
    """For every parameter its block as timm groups them for layer-wise learning rates; None for other models."""
    matcher = getattr(model, "group_matcher", None)
    if not callable(matcher):
        return None
    try:
        from timm.models import group_parameters
    except ImportError:
        return None
    grouped = group_parameters(model, matcher(coarse=False), return_values=True)
    if len(grouped) < 2:
        return None
    group_of = {id(p): number for number, parameters in grouped.items() for p in parameters}
    paths: dict[int, list[list[str]]] = {}
    for layer, name, parameter in named:
        if id(parameter) not in head:
            paths.setdefault(group_of[id(parameter)], []).append(_plain(layer or name).split("."))
    names = {number: _name(members) for number, members in paths.items()}
    return [names.get(group_of[id(parameter)], layer) for layer, _, parameter in named]


def _name(paths: list[list[str]]) -> str:
    """What a group of layers is called: the common start of those under one child, such as `blocks.11 + norm`."""
    starts: dict[tuple[str, ...], list[list[str]]] = {}
    for path in paths:
        starts.setdefault(tuple(path[:2]), []).append(path)
    return " + ".join(".".join(_common(same)) for same in starts.values())


def _common(paths: list[list[str]]) -> list[str]:
    """The longest common start."""
    return [pieces[0] for pieces in takewhile(lambda pieces: len(set(pieces)) == 1, zip(*paths, strict=False))]


def _block_of(model: nn.Module, layer: str) -> str:
    """The block of a layer: its deepest ancestor with layers of its own that stands in a container, else itself.

    A container is a Sequential, ModuleList or ModuleDict; the branch of a `Residual` is not looked into.
    """
    found, module = layer, model
    pieces = layer.split(".") if layer else []
    for depth, piece in enumerate(pieces, start=1):
        parent, module = module, module.get_submodule(piece)
        if isinstance(parent, _CONTAINERS) and _has_layers(module):
            found = ".".join(pieces[:depth])
            if isinstance(module, Residual):
                break
    return found


def _has_layers(module: nn.Module) -> bool:
    """Whether a module is more than one layer and more than a container."""
    if isinstance(module, _CONTAINERS):
        return False
    inside = (child for name, child in module.named_children() if name != "parametrizations")
    return any(True for child in inside for _ in child.parameters())


def _plain(path: str) -> str:
    """The path without the levels that torch.compile inserts."""
    return ".".join(piece for piece in path.split(".") if piece != "_orig_mod")


def _submodules(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The submodules of these paths, through the levels that torch.compile inserts."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path and ".parametrizations." not in f".{path}." and any(True for _ in module.parameters()):
            found.setdefault(_plain(path), module)
    for name in names:
        if name not in found:
            raise ValueError(
                f"LayerDropBack.head = {tuple(names)!r}: {type(model).__name__} has no submodule {name!r} "
                f"with parameters{nearest(name, found)}"
            )
    return [found[name] for name in names]


def _head_candidates(model: nn.Module) -> Iterator[list[nn.Module]]:
    yield _timm_classifiers(model)
    if isinstance(model, Chain):
        yield [model.head]
    yield [child for name, child in model.named_children() if name in _HEAD_NAMES]
    yield [model]


def _timm_classifiers(model: nn.Module) -> list[nn.Module]:
    """What timm calls the classifier; its two ways to say it are complete only together (RepViT has two in one)."""
    get_classifier = getattr(model, "get_classifier", None)
    part = get_classifier() if callable(get_classifier) else None
    parts = list(part) if isinstance(part, tuple | list) else [part]
    config = getattr(model, "pretrained_cfg", None)
    paths = config.get("classifier") if isinstance(config, dict) else None
    modules = dict(model.named_modules())
    parts += [modules.get(path) for path in ([paths] if isinstance(paths, str) else paths or ())]
    return [part for part in parts if isinstance(part, nn.Module)]


def _last_layers(part: nn.Module) -> list[nn.Module]:
    """The last module of `part` that owns parameters itself, parametrized ones included; of a list, of each member."""
    part = unwrapped(part)
    if isinstance(part, nn.ModuleList | nn.ModuleDict):
        return [layer for member in part.children() for layer in _last_layers(member)]
    owners = [path for path, _, _ in named_parameters(part)]
    return [part.get_submodule(owners[-1])] if owners else []
