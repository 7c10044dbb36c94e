"""Learning curves of single runs as plain arrays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray


@dataclass(frozen=True)
class LearningCurve:
    """One run: (epochs,) cumulative training seconds and validation accuracies, NaN where not evaluated."""

    seconds: NDArray[np.float64]
    accuracy: NDArray[np.float64]

    @property
    def end(self) -> float:
        """Training seconds until the run's last epoch; 0 without one."""
        known = self.seconds[~np.isnan(self.seconds)]
        return float(known[-1]) if known.size else 0.0


def learning_curves(epochs: pd.DataFrame, run_keys: Iterable[str]) -> dict[str, LearningCurve]:
    """Curves of the runs that have epochs, by run key.

    Args:
        epochs: sorted by run key and epoch.
    """
    wanted, keys = epochs_of(epochs, run_keys)
    if wanted.empty:
        return {}
    codes = keys.codes
    starts = np.flatnonzero(np.diff(codes, prepend=-1))
    seconds = np.split(wanted["train_seconds"].to_numpy(dtype=float), starts[1:])
    accuracy = np.split(wanted["val_accuracy"].to_numpy(dtype=float), starts[1:])
    return {
        str(keys.categories[codes[i]]): LearningCurve(s, a) for i, s, a in zip(starts, seconds, accuracy, strict=True)
    }


def epochs_of(epochs: pd.DataFrame, run_keys: Iterable[str]) -> tuple[pd.DataFrame, pd.Categorical]:
    """The epochs of some runs, and their run keys, without a look at the other rows.

    Args:
        epochs: sorted by run key and epoch.
    """
    keys = pd.Categorical(epochs["run_key"])
    runs = np.unique(keys.categories.get_indexer(pd.Index(list(dict.fromkeys(run_keys)), dtype="str")))
    ends = (np.searchsorted(keys.codes, runs[runs >= 0], side) for side in ("left", "right"))
    pieces = [np.arange(first, last) for first, last in zip(*ends, strict=True)]
    rows = np.concatenate([np.empty(0, dtype=int), *pieces])
    return epochs.iloc[rows], keys[rows]
