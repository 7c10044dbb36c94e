"""What is installed beside torch, and whether it works; for the `doctor` commands."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass

OPTIONAL = {
    "torchvision": "vision",
    "timm": "vision",
    "ray": "sweep",
    "optuna": "sweep",
    "mlflow": "sweep",
    "pandas": "report",
    "moocore": "report",
    "matplotlib": "report",
}


@dataclass(frozen=True)
class Part:
    """An optional part of the installation.

    Attributes:
        name: of the package.
        extra: of ours that brings it.
        version: None where it is not installed.
        error: why it cannot be imported; empty where it can, or is not installed.
    """

    name: str
    extra: str
    version: str | None = None
    error: str = ""


def part(name: str) -> Part:
    """One of `OPTIONAL`, imported."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name == name
        return Part(name, OPTIONAL[name]) if missing else Part(name, OPTIONAL[name], _version(name), str(error))
    except Exception as error:
        return Part(name, OPTIONAL[name], _version(name), f"{type(error).__name__}: {error}")
    return Part(name, OPTIONAL[name], getattr(module, "__version__", None) or _version(name))


def torchvision_mismatch(torch: str, vision: str) -> str:
    """Why these two versions do not belong together; empty where they do.

    torchvision 0.(n + 15) is built against torch 2.n, and both carry the same build tag where both carry one
    (https://github.com/pytorch/vision#installation).

    >>> torchvision_mismatch("2.14.1+cu130", "0.29.1+cu130")
    ''
    >>> torchvision_mismatch("2.13.0", "0.29.1")
    'torchvision 0.29.1 is made for torch 2.14, and torch 2.13.0 is installed'
    >>> torchvision_mismatch("2.14.1+cpu", "0.29.1+cu130")
    'torch 2.14.1+cpu and torchvision 0.29.1+cu130 are different builds'
    """
    (major, minor), (vision_major, vision_minor) = (tuple(v.split(".")[:2]) for v in (torch, vision))
    if (major, vision_major) == ("2", "0") and int(vision_minor) != int(minor) + 15:
        return f"torchvision {vision} is made for torch 2.{int(vision_minor) - 15}, and torch {torch} is installed"
    builds = {version.partition("+")[2] for version in (torch, vision)} - {""}
    return f"torch {torch} and torchvision {vision} are different builds" if len(builds) > 1 else ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
