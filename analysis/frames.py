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
    return [{str(key): value for key, value in row.items()} for row in frame.to_dict("records")]


def count(mask: Any) -> int:
    """How many are true."""
    return int(np.count_nonzero(np.asarray(mask, dtype=bool)))


def known(values: Iterable[Any]) -> np.ndarray:
    """(n,) mask of the values that are numbers."""
    return ~np.isnan(np.asarray(list(values), dtype=float))
