"""Names that people read: methods, settings, tasks, devices; and one colour per method family."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Style:
    """How a method family is drawn everywhere: colour on light and on dark ground, matplotlib marker."""

    light: str
    dark: str
    marker: str


# Okabe-Ito hues, which stay apart under the common colour-vision deficiencies, lightened for dark ground.
_FIXED = {
    "bp": Style("#3d4450", "#d5dae2", "s"),
    "ldb": Style("#0068a8", "#5db8f0", "o"),
    "dbp": Style("#c24e00", "#ff8f4a", "^"),
    "highway": Style("#00805e", "#2ec99c", "D"),
    "ddg": Style("#a8408a", "#e592c4", "v"),
    "dbp+ldb": Style("#8a6400", "#f0c04a", "P"),
    "ldb+dbp": Style("#5b4bb5", "#a99cf5", "X"),
    "dbp+highway": Style("#a01c3a", "#f2718d", "<"),
    "ldb+highway": Style("#4c7a12", "#a5d65a", ">"),
    "dbp+ddg": Style("#1d7a8a", "#63cfe0", "p"),
    "ldb+ddg": Style("#7d5a4a", "#cfa692", "h"),
    "dbp+ldb+highway": Style("#2f3fa0", "#8fa0ff", "*"),
    "ldb+dbp+highway": Style("#5f6100", "#d2d65a", "d"),
    "dbp+ldb+ddg": Style("#1f5c2e", "#7fd08f", "8"),
    "ldb+dbp+ddg": Style("#7a2fa8", "#cf97f2", "H"),
}
_OTHERS = tuple(_FIXED.values())[5:]


def family(method: dict[str, Any]) -> str:
    """A combination without its settings, outermost first: `dbp+ldb`; plain backprop is `bp`."""
    names: list[str] = []
    part: Any = method
    while isinstance(part, dict) and part:
        names.append(str(part.get("method") or "unknown"))
        part = part.get("inner")
    if len(names) > 1 and names[-1] == "bp":
        names.pop()
    return "+".join(names) or "unknown"


def styles(families: Iterable[str]) -> dict[str, Style]:
    """One style per family, the same in every report: fixed for the five methods and their combinations.

    That of any other follows from its name alone: hue and marker apart, so that two of them seldom look alike.
    """
    return _FIXED | {name: _named(name) for name in sorted(set(families) - set(_FIXED))}


def _named(name: str) -> Style:
    number = zlib.crc32(name.encode("utf-8", "replace"))
    hue, marker = _OTHERS[number % len(_OTHERS)], _OTHERS[number // len(_OTHERS) % len(_OTHERS)]
    return Style(hue.light, hue.dark, marker.marker)


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings with dotted names.

    >>> flatten({"method": "ldb", "inner": {"method": "bp"}})
    {'method': 'ldb', 'inner.method': 'bp'}
    """
    out: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            out |= flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def settings(method: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """All settings of a run by dotted name, the recipe's with the prefix `recipe.`; without method names."""
    flat = {k: v for k, v in flatten(method).items() if k.rpartition(".")[2] != "method"}
    return flat | {f"recipe.{k}": v for k, v in flatten(recipe).items()}


def varying(all_settings: Iterable[dict[str, Any]]) -> list[str]:
    """Names whose value is not the same in all, in order of first appearance."""
    items = list(all_settings)
    names = dict.fromkeys(name for item in items for name in item)
    return [n for n in names if len({canonical(item.get(n)) for item in items}) > 1]


def label(family_name: str, values: dict[str, Any], show: Iterable[str]) -> str:
    """A short label such as `ldb(drop_rate=0.5) lr=0.1`, with the settings named in `show`."""
    wanted = [n for n in show if n in values]
    own = ", ".join(f"{n}={plain(values[n])}" for n in wanted if not n.startswith("recipe."))
    recipe = ", ".join(f"{n.removeprefix('recipe.')}={plain(values[n])}" for n in wanted if n.startswith("recipe."))
    return (f"{family_name}({own})" if own else family_name) + (f" {recipe}" if recipe else "")


def plain(value: Any) -> str:
    """A setting's value, numbers to four significant digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else canonical(value)


def shortened(name: str, length: int = 60) -> str:
    """A name for where there is little room: a long one without its middle."""
    return name if len(name) <= length else f"{name[: length // 2]}…{name[-(length // 2 - 1) :]}"


def canonical(value: Any) -> str:
    """JSON independent of key order."""
    return _ENCODER.encode(value)


_ENCODER = json.JSONEncoder(sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def task_label(task: dict[str, Any], *, full: bool = False) -> str:
    """Data and model, with their arguments if `full`."""
    text = f"{plain(task.get('data', 'unknown data'))}, {plain(task.get('model', 'unknown model'))}"
    rest = {k: v for k, v in flatten(task).items() if k not in ("data", "model") and v not in ({}, None)}
    return text + (f" ({', '.join(f'{k}={plain(v)}' for k, v in rest.items())})" if full and rest else "")


def stratum(device: dict[str, Any], software: dict[str, Any]) -> str:
    """Hardware and software that must agree before seconds are compared."""
    name = shortened(" ".join(str(device.get("name") or device.get("type") or "unknown device").split()))
    kind = str(device.get("type") or "unknown")
    threads = device.get("threads")
    text = name if kind.lower() in name.lower() else f"{name} ({kind})"
    text += f", {threads} thread{'' if threads == 1 else 's'}" if threads is not None else ""
    text += f", torch {software.get('torch') or 'of unknown version'}"
    text += f", CUDA {software['cuda']}" if software.get("cuda") else ""
    text += f", cuDNN {_cudnn(software['cudnn'])}" if software.get("cudnn") else ""
    if software.get("matmul_precision") not in (None, "highest"):  # torch's defaults go without saying
        text += f", {software['matmul_precision']} matmul precision"
    if software.get("cudnn_tf32") is False and kind.lower() != "cpu":
        text += ", no TF32 in cuDNN"
    text += ", cuDNN benchmark" if software.get("cudnn_benchmark") else ""
    return text + (", deterministic" if software.get("deterministic") else "")


def _cudnn(version: Any) -> str:
    """torch's number of the version as people write it.

    >>> _cudnn(91002), _cudnn(8902)
    ('9.10.2', '8.9.2')
    """
    if not isinstance(version, int) or version < 1000:
        return plain(version)
    thousand = 10_000 if version >= 90_000 else 1000
    return f"{version // thousand}.{version % thousand // 100}.{version % 100}"
