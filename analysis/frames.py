"""The few operations on frames that the tables share, with types where pandas leaves them open."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd


def cells(frame: pd.DataFrame, by: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], pd.DataFrame]]:
    """Rows with equal values in the columns `by`: the values and the rows, sorted by the values."""
    for key, part in frame.groupby(list(by), sort=True):
        yield (key if isinstance(key, tuple) else (key,)), pd.DataFrame(part)


def where(frame: pd.DataFrame, mask: Any) -> pd.DataFrame:
    """The rows for which the mask is true."""
    return frame.loc[np.asarray(mask, dtype=bool)]


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dictionaries."""
    names = [str(name) for name in frame.columns]
    return [dict(zip(names, row, strict=True)) for row in zip(*(frame[name].tolist() for name in names), strict=True)]


def count(mask: Any) -> int:
    """How many are true."""
    return int(np.count_nonzero(np.asarray(mask, dtype=bool)))


def known(values: Iterable[Any]) -> np.ndarray:
    """(n,) mask of the values that are numbers."""
    plain = values if isinstance(values, pd.Series | np.ndarray) else list(values)
    return ~np.isnan(np.asarray(plain, dtype=float))
