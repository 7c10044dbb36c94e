"""Knobs: searchable fields, declared once as `name: Annotated[type, domain] = default` on a frozen dataclass.

`search_space` reads them, through `inner` with dotted names; `set_knobs` writes them back. A domain is where a search
looks, not what is legal: legality is checked by the dataclass itself.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")


@dataclass(frozen=True)
class Uniform:
    """Real numbers, uniform in [low, high]."""

    low: float
    high: float


@dataclass(frozen=True)
class LogUniform:
    """Positive real numbers, uniform in the logarithm, in [low, high]."""

    low: float
    high: float


@dataclass(frozen=True)
class IntRange:
    """Whole numbers from low to high, both included."""

    low: int
    high: int


@dataclass(frozen=True)
class Choice:
    """One of a few values."""

    values: tuple[Any, ...]


Domain = Uniform | LogUniform | IntRange | Choice
_DOMAINS = (Uniform, LogUniform, IntRange, Choice)


def domains(kind: type) -> dict[str, Domain]:
    """The knobs declared on one dataclass: field name to domain, in field order."""
    out: dict[str, Domain] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is Annotated:
            domain = next((a for a in get_args(hint)[1:] if isinstance(a, _DOMAINS)), None)
            if domain is not None:
                out[name] = domain
    return out


def search_space(value: Any) -> dict[str, Domain]:
    """All knobs of a method or recipe, those of wrapped methods with dotted names.

    >>> from fastbp import DDG, LayerDropBack
    >>> sorted(search_space(LayerDropBack(inner=DDG())))[:3]
    ['batch_scale', 'drop_rate', 'every_epochs']
    """
    space = domains(type(value))
    inner = getattr(value, "inner", None)
    if is_dataclass(inner):
        space |= {f"inner.{name}": domain for name, domain in search_space(inner).items()}
    return space


def set_knobs(value: T, settings: dict[str, Any]) -> T:
    """A copy of a method or recipe with some fields replaced; dotted names reach into `inner`.

    Raises:
        ValueError: a name is not a field; the message has the nearest valid name.
    """
    own, nested = {}, {}
    names = [f.name for f in fields(value)]  # type: ignore[arg-type]
    for name, setting in settings.items():
        head, _, rest = name.partition(".")
        if head not in names:
            raise ValueError(f"{type(value).__name__} has no field {head!r}{nearest(head, names)}")
        if rest:
            nested.setdefault(head, {})[rest] = setting
        else:
            own[head] = setting
    for head, rest in nested.items():
        own[head] = set_knobs(own.get(head, getattr(value, head)), rest)
    return replace(value, **own)  # type: ignore[type-var]


def coerce_fields(value: Any) -> None:
    """Check a frozen dataclass's plain fields against their declared types; whole numbers become float where asked.

    Raises:
        TypeError: a field has the wrong type; the message names the class, the field and the value.
        ValueError: a number is not finite.
    """
    for name, hint in get_type_hints(type(value)).items():
        got = getattr(value, name)
        where = f"{type(value).__name__}.{name} = {got!r}"
        if hint is float:
            if isinstance(got, bool) or not isinstance(got, int | float):
                raise TypeError(f"{where}: expected a number")
            if not math.isfinite(got):
                raise ValueError(f"{where}: must be finite")
            object.__setattr__(value, name, float(got))
        elif hint is int and (isinstance(got, bool) or not isinstance(got, int)):
            raise TypeError(f"{where}: expected a whole number")
        elif hint is bool and not isinstance(got, bool):
            raise TypeError(f"{where}: expected true or false")
        elif hint is str and not isinstance(got, str):
            raise TypeError(f"{where}: expected a string")


def require(value: Any, name: str, ok: bool, rule: str) -> None:
    """Refuse an impossible field in one sentence.

    Raises:
        ValueError: `ok` is false; the message names class, field, value and rule.
    """
    if not ok:
        raise ValueError(f"{type(value).__name__}.{name} = {getattr(value, name)!r}: {rule}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """A suffix for an error message: the nearest valid name, or nothing.

    >>> nearest("drop_rat", ["drop_rate", "seed"])
    '; did you mean drop_rate?'
    """
    match = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""
