"""Any model by name, as a pure function of the seed: of `fastbp.nets`, timm, torchvision or the user's own."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from fastbp.knobs import nearest
from fastbp.nets import NETS, image_shape


def make_model(
    name: str, input_shape: tuple[int, ...], classes: int, args: dict[str, Any] | None = None, seed: int = 0
) -> nn.Module:
    """A model by name, on the CPU, its initial weights a pure function of the seed.

    The caller's random generators stay as they are.

    Args:
        name: a key of `NETS`, `timm:NAME`, `torchvision:NAME`, or `package.module:function` for a function of
            the user's, called as `function(input_shape, classes, **args)`.
        input_shape: one example's shape, `(channels, height, width)` or `(tokens,)`.
        classes: number of logits, or vocabulary size.
        args: further keyword arguments of the net.
        seed: of torch's CPU generator while the model is built.

    Raises:
        ValueError: unknown name or argument, or an impossible value; the message has the nearest valid name.
        ImportError: timm or torchvision is needed and not installed.
        TypeError: the user's function returned something else than a module.
    """
    make = _maker(name, tuple(input_shape), classes, dict(args or {}))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the caller's GPUs too
        model = make()
    if not isinstance(model, nn.Module):
        raise TypeError(f"model {name!r} returned a {type(model).__name__}, not an nn.Module")
    return model


def _maker(name: str, input_shape: tuple[int, ...], classes: int, args: dict[str, Any]) -> Callable[[], Any]:
    library, colon, rest = name.partition(":")
    if not colon:
        if name not in NETS:
            forms = "timm:NAME, torchvision:NAME or package.module:function"
            raise ValueError(f"no model {name!r}{nearest(name, NETS)}; known: {', '.join(NETS)}, {forms}")
        _check_args(name, NETS[name], args)
        return partial(NETS[name], input_shape, classes, **args)
    if library in ("timm", "torchvision"):
        channels = image_shape(input_shape, name)[0]
        try:
            package = importlib.import_module("timm" if library == "timm" else "torchvision.models")
        except ImportError as error:
            raise ImportError(f"model {name!r} needs {library}: pip install fastbp[vision]") from error
        known = package.list_models()
        if rest.partition(".")[0] not in known:
            raise ValueError(f"{library} has no model {rest!r}{nearest(rest, known)}")
        if library == "timm":
            return partial(package.create_model, rest, num_classes=classes, in_chans=channels, **args)
        if channels != 3:
            raise ValueError(f"{name}: torchvision's models take 3 channels, the data has {channels}; use timm:{rest}")
        return partial(package.get_model, rest, num_classes=classes, **args)
    try:
        function = getattr(importlib.import_module(library), rest)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model {name!r} cannot be imported: {error}") from error
    return partial(function, input_shape, classes, **args)


def _check_args(name: str, net: Callable[..., Any], args: dict[str, Any]) -> None:
    fixed = net.keywords if isinstance(net, partial) else {}
    parameters = inspect.signature(net).parameters.values()
    valid = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in fixed]
    for key in args:
        if key not in valid:
            hint = f"{nearest(key, valid)}; known: {', '.join(valid)}"
            raise ValueError(f"model {name} has no argument {key!r}{hint}")
