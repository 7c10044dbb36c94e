"""Sweeps drawn from a known truth, as the groups that the analysis makes of records."""

import numpy as np
import pandas as pd

from analysis.measured import Arm, Group


def aa_group(random, n, methods, seeds=None):
    """A baseline and methods that are the baseline, with effects common to a seed.

    Args:
        n: seeds per arm, 0 to n - 1 unless `seeds` names them.
    """
    clock, luck = random.normal(0, 0.02, n), random.normal(0, 0.01, n)
    arms = []
    for i in range(methods + 1):
        frame = pd.DataFrame(
            {
                "train_seconds": 10 * np.exp(clock + random.normal(0, 0.02, n)),
                "test_accuracy": 0.9 + luck + random.normal(0, 0.004, n),
                "val_accuracy": np.full(n, 0.9),
                "run_key": [random.bytes(8).hex() for _ in range(n)],
            },
            index=pd.Index(range(n) if seeds is None else seeds, name="seed", dtype="int64"),
        )
        role = "method" if i else "baseline"
        frame["status"] = "finished"
        arms.append(Arm(f"arm{i}", "aa", f"arm{i}", role, "bp", "bp", {}, frame, frame))
    return Group("A/A", "simulated", "group1", tuple(arms))
