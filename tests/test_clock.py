"""train_seconds is training alone: by a fake clock exactly, by the real one within 1 %."""

import statistics
import time

import pytest
import torch

from fastbp import DDG
from fastbp.clock import Clock
from fastbp.config import RunConfig, Task
from fastbp.recipe import Recipe
from fastbp.run import Run, evaluate
from timed_methods import Sleeps


class FakeTime:
    """A clock that moves only when told; every synchronisation is noted."""

    def __init__(self):
        self.seconds = 0.0
        self.synchronized = 0

    def now(self):
        return self.seconds

    def synchronize(self):
        self.synchronized += 1


def test_segments_add_up_and_synchronise_at_both_edges():
    fake = FakeTime()
    clock = Clock(now=fake.now, synchronize=fake.synchronize)
    for spent in (2.0, 3.0):
        with clock.segment("train"):
            fake.seconds += spent
        fake.seconds += 100.0  # nobody's
        with clock.segment("eval"):
            fake.seconds += 7.0
    assert (clock.seconds.train_seconds, clock.seconds.eval_seconds) == (5.0, 14.0)
    assert fake.synchronized == 8, f"4 segments synchronised {fake.synchronized} times"
    assert clock.seconds.compile_seconds is None, "an unknown time must not be 0"


def test_a_segment_that_raises_is_still_counted_and_closed():
    fake = FakeTime()
    clock = Clock(now=fake.now, synchronize=fake.synchronize)

    def failing_step():
        with clock.segment("train"):
            fake.seconds += 1.0
            raise KeyError

    with pytest.raises(KeyError):
        failing_step()
    with clock.segment("eval"):
        fake.seconds += 1.0
    assert (clock.seconds.train_seconds, clock.seconds.eval_seconds) == (1.0, 1.0)


def test_misuse_is_refused():
    clock = Clock()
    with (
        pytest.raises(RuntimeError, match="'eval' opened inside 'train'"),
        clock.segment("train"),
        clock.segment("eval"),
    ):
        pass
    with pytest.raises(ValueError, match="unknown clock segment 'trian'"), clock.segment("trian"):
        pass
    with pytest.raises(ValueError, match="not monotonic"):
        clock.add("eval", -1.0)


class TickingData:
    """A data set whose every training batch costs 1 fake second and every evaluation batch 10."""

    def __init__(self, data, fake):
        self.data, self.fake = data, fake

    def __getattr__(self, name):
        return getattr(self.data, name)

    def batches(self, *args, **kwargs):
        for batch in self.data.batches(*args, **kwargs):
            self.fake.seconds += 1.0
            yield batch

    def eval_batches(self, *args, **kwargs):
        for batch in self.data.eval_batches(*args, **kwargs):
            self.fake.seconds += 10.0
            yield batch


def fake_run(**recipe):
    fake = FakeTime()
    config = RunConfig(Task("synthetic", "mlp", data_args={"n": 100}), Recipe(epochs=4, lr=0.01, **recipe), DDG())
    run = Run(config, clock=Clock(now=fake.now, synchronize=fake.synchronize))
    run.data = TickingData(run.data, fake)
    while not run.done:
        run.train_epoch()
        with run.clock.segment("checkpoint"):
            fake.seconds += 50.0
        fake.seconds += 1000.0  # a slow driver, a slow logger
    return run.end()


def test_evaluation_checkpoints_and_drivers_do_not_move_train_seconds():
    often, rarely = fake_run(eval_every_epochs=1), fake_run(eval_every_epochs=4)
    batches = often.steps
    assert often.train_seconds == rarely.train_seconds == batches
    assert often.eval_seconds > rarely.eval_seconds > 0
    assert often.checkpoint_seconds == 200.0


@pytest.mark.slow
def test_known_train_seconds_do_not_move_by_one_percent(tmp_path):
    """Steps that sleep make the training time known: doubled evaluation, pauses and saving add nothing to it.

    Every second epoch is disturbed. What train_seconds hold beyond the sleep that was may differ by less than 1 % of an
    epoch, by the least of each kind: a busy machine adds to some epochs, a leak between segments to every one.
    """
    task = Task("synthetic", "mlp", data_args={"n": 160}, model_args={"depth": 2, "width": 8})
    recipe = Recipe(epochs=24, batch_size=32, lr=0.01)
    run = Run(RunConfig(task, recipe, Sleeps(seconds=0.05)))
    epochs, beyond = [], {True: [], False: []}
    while not run.done:
        train, slept = run.clock.seconds.train_seconds, run.estimator.slept
        disturbed = run.epoch % 2 == 1
        run.train_epoch()
        if disturbed:
            with run.clock.segment("eval"):
                evaluate(run.estimator.model, run.data, "val", recipe)
            with run.clock.segment("checkpoint"):
                torch.save(torch.zeros(5_000_000), tmp_path / "large.pt")
            time.sleep(0.1)
        epochs.append(run.clock.seconds.train_seconds - train)
        beyond[disturbed].append(epochs[-1] - (run.estimator.slept - slept))
    assert min(beyond[True] + beyond[False]) > 0, "an epoch took less time than its steps slept"
    moved = (min(beyond[True]) - min(beyond[False])) / statistics.median(epochs)
    assert abs(moved) < 0.01, f"train_seconds moved by {moved:+.2%}"


@pytest.mark.long
@pytest.mark.slow
def test_real_train_seconds_do_not_move(tmp_path):
    """More evaluation, a sleeping driver and larger checkpoints between epochs move train_seconds by less than 1 %.

    Two equal runs, one of them disturbed, epoch against epoch in turn. The machine is shared and noisy, so the test
    fails only where the 99 % interval of the median ratio (order statistics) lies wholly beyond 1 %.
    """
    task = Task("synthetic", "mlp", data_args={"n": 4096}, model_args={"width": 256})
    recipe = Recipe(epochs=200, batch_size=256, lr=0.01, schedule="constant")
    plain, disturbed = (Run(RunConfig(task, recipe, seed=s)) for s in (0, 0))
    ratios = []
    payload = torch.zeros(50_000_000 // 4)
    for run in (plain, disturbed):
        run.train_epoch()
    for i in range(40):
        order = [plain, disturbed] if i % 2 else [disturbed, plain]
        spent = {}
        for run in order:
            before = run.clock.seconds.train_seconds
            run.train_epoch()
            spent[id(run)] = run.clock.seconds.train_seconds - before
            if run is disturbed:
                with run.clock.segment("eval"):
                    evaluate(run.estimator.model, run.data, "test", recipe)
                with run.clock.segment("checkpoint"):
                    torch.save(payload, tmp_path / "large.pt")
                time.sleep(0.01)
        ratios.append(spent[id(disturbed)] / spent[id(plain)])
    ratios.sort()
    low, high = ratios[11], ratios[-12]  # 99 % for the median of 40
    print(f"disturbed / plain: median {ratios[20]:.4f}, 99 % interval {low:.4f} to {high:.4f}")
    assert low < 1.01, f"train_seconds rose by more than 1 %: the median ratio is in {low:.4f} to {high:.4f}"
    assert high > 0.99, f"train_seconds fell by more than 1 %: the median ratio is in {low:.4f} to {high:.4f}"
