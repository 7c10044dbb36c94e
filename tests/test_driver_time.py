"""A slow driver moves no training time: in a real Tune experiment, with a callback that sleeps."""

import os
import time

import pytest
from ray import tune

from fastbp.config import RunConfig, Task
from fastbp.recipe import Recipe
from fastbp.record import RunRecord
from sweeps.cluster import ray_session
from trainables.method_trainable import MethodTrainable

PAUSE_SECONDS = 0.5
EPOCHS = 3


class SlowDriver(tune.Callback):
    """Sleeps whenever a result arrives, as a slow logger would."""

    def on_trial_result(self, iteration, trials, trial, result, **info):
        time.sleep(PAUSE_SECONDS)


def measured(callbacks, folder, name):
    """The end record of one run whose steps are sleeps of 0.2 s."""
    from timed_methods import Sleeps

    task = Task(model="mlp", model_args={"depth": 2, "width": 8}, data_args={"limit": 128})
    config = RunConfig(task, Recipe(epochs=EPOCHS, batch_size=64, lr=0.01), Sleeps(seconds=0.2))
    tuner = tune.Tuner(
        tune.with_resources(MethodTrainable, {"CPU": 1}),
        param_space={"run": config.to_dict(), "exclusive": True, "threads": 1, "device": "cpu", "attempt": 0},
        run_config=tune.RunConfig(name=name, storage_path=str(folder), callbacks=callbacks, verbose=0),
    )
    (result,) = tuner.fit()
    assert result.error is None, result.error
    return RunRecord(**result.metrics["end"])


@pytest.mark.long
@pytest.mark.slow
def test_a_sleeping_callback_does_not_move_train_seconds(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))  # workers import the method from here
    with ray_session():
        plains, slows = [], []
        for attempt in range(
            4
        ):  # a busy machine wakes sleepers late at times; a leak of the callback's sleep is always
            plains.append(measured([], tmp_path, f"plain{attempt}"))
            slows.append(measured([SlowDriver()], tmp_path, f"slowed{attempt}"))
            plain, slowed = (min(ends, key=lambda end: end.train_seconds) for ends in (plains, slows))
            moved = slowed.train_seconds / plain.train_seconds - 1
            if abs(moved) < 0.01:
                break
    assert plain.train_seconds > EPOCHS * 2 * 0.2, f"train_seconds {plain.train_seconds} is less than the steps slept"
    assert abs(moved) < 0.01, f"a sleeping callback moved train_seconds by {moved:+.2%}"
    blocked = slowed.report_blocked_seconds
    assert blocked >= (EPOCHS - 1) * PAUSE_SECONDS, f"only {blocked:.2f} s of the waiting were noticed"
