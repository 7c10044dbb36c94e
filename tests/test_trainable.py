"""MethodTrainable: Tune's own save-and-restore check, exact resuming, and whose seconds are whose."""

import contextlib
import dataclasses
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ray.tune.utils.util import validate_save_restore

from broken_methods import Nan
from fastbp import DDG, Backprop, LayerDropBack
from fastbp.config import RunConfig, Task
from fastbp.recipe import Recipe
from fastbp.record import EpochRecord, RunRecord
from sweeps.cluster import ray_session
from trainables.method_trainable import MethodTrainable
from trainables.stage_actors import RayWorkers

TASK = Task(model="mlp", model_args={"depth": 4, "width": 8}, data_args={"limit": 128})


def config_of(method=None, epochs=6, **more):
    run = RunConfig(task=TASK, recipe=Recipe(epochs=epochs), method=method or Backprop())
    return {"run": run.to_dict(), "exclusive": False, "threads": 1, "device": "cpu", "attempt": 0, **more}


@pytest.fixture
def trainable(tmp_path, monkeypatch):
    """A Trainable in this process; Ray is asked for its address only."""
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr("ray.tune.trainable.trainable.DEFAULT_STORAGE_PATH", str(tmp_path / "ray"))
    made = []

    def make(config):
        made.append(MethodTrainable(config))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def numbers(results):
    """What a run's results say, without times."""
    out = []
    for result in results:
        record = result["record"]
        out.append({k: v for k, v in record.items() if not k.endswith("_seconds")})
    return out


@pytest.mark.slow
def test_tune_finds_that_it_saves_and_restores(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ray_session():
        assert validate_save_restore(MethodTrainable, config=config_of(LayerDropBack(every_epochs=2)))


def test_results_carry_records_that_can_be_written(trainable):
    one = trainable(config_of(epochs=2, exclusive=True, attempt=3))
    first, last = one.step(), one.step()
    assert ("start" in first, "end" in first, first["done"]) == (True, False, False), f"first is {sorted(first)}"
    assert ("start" in last, "end" in last, last["done"]) == (False, True, True), f"last is {sorted(last)}"
    start, end, epoch = RunRecord(**first["start"]), RunRecord(**last["end"]), EpochRecord(**last["record"])
    assert (start.status, end.status) == ("running", "finished"), f"{start.status}, {end.status}"
    assert (end.attempt, end.exclusive, end.device["threads"]) == (3, True, 1), f"end is {end}"
    assert end.train_seconds == epoch.train_seconds == last["train_seconds"], "three values of one time"
    assert end.val_accuracy == last["val_accuracy"], "the objective is not the record's accuracy"


def test_a_measured_run_beside_busy_programs_was_not_alone(trainable, monkeypatch):
    monkeypatch.setattr("trainables.method_trainable.OtherPrograms.remark", lambda self: "the processor is shared: 2")
    one = trainable(config_of(epochs=1, exclusive=True)).step()
    assert (one["end"]["exclusive"], one["end"]["reason"]) == (False, "the processor is shared: 2")
    nan = trainable(config_of(Nan(), epochs=1, exclusive=True)).step()["end"]
    assert (nan["status"], nan["exclusive"]) == ("diverged", False)
    assert nan["reason"].startswith("training loss"), "the reason is why it diverged"
    assert trainable(config_of(epochs=1)).step()["end"]["reason"] == "", "a search trial has neighbours by design"


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the machine does not count processor time")
def test_the_work_of_a_runs_stages_is_no_neighbours(trainable, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with ray_session():
        one = trainable(config_of(DDG(modules=2, processes=True), epochs=1, exclusive=True))
        end = one.step()["end"]
        assert one._others is not None
        assert one._others.seconds > 0, "nobody watched"
        used = one._process_seconds()
        assert used is not None
        assert used > time.process_time() + 0.2, "the stages, which have loaded torch, used nothing"
        assert (end["exclusive"], end["reason"]) == (True, ""), end
        one.run.close()
        deadline = time.monotonic() + 30
        while (left := one._process_seconds()) is not None and time.monotonic() < deadline:
            time.sleep(0.05)  # Ray ends actors in its own time
        assert left is None, "of stages that are gone"


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the machine does not count processor time")
@pytest.mark.parametrize(
    ("device", "used", "reason"),
    [
        ("cpu", 5.0, ""),
        ("cpu", None, "the processor was not watched: the run has several processes"),
        ("cuda", 5.0, "the GPUs were not watched: the run has several processes"),
    ],
)
def test_a_run_of_stages_says_where_nobody_watched(trainable, monkeypatch, device, used, reason):
    class Stages(RayWorkers):
        def __init__(self, *_):
            pass

        def process_seconds(self):
            return used

        def close(self, **_):
            pass

    monkeypatch.setattr("trainables.method_trainable.RayWorkers", Stages)
    monkeypatch.setattr("trainables.method_trainable.get_current_placement_group", lambda: None)
    one = trainable(config_of(DDG(modules=2, processes=True), exclusive=True, device=device))
    monkeypatch.setattr(one.run, "end", lambda: RunRecord(exclusive=True))
    with one._others.watched() if one._others else contextlib.nullcontext():
        time.sleep(0.01)
    end = one._end()
    assert (end["exclusive"], end["reason"]) == (True, reason)


def test_a_gpu_that_nobody_watched_is_the_reason_of_a_run(trainable, monkeypatch):
    monkeypatch.setattr("trainables.method_trainable.unwatched", lambda device: "the GPU was not watched: why")
    one = trainable(config_of(epochs=1, exclusive=True)).step()["end"]
    assert one["exclusive"] is True
    assert one["reason"] == "", "the processor was watched"
    monkeypatch.setattr("trainables.method_trainable.OtherPrograms", lambda **_: None)
    one = trainable(config_of(epochs=1, exclusive=True)).step()["end"]
    assert (one["exclusive"], one["reason"]) == (True, "the GPU was not watched: why")


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the machine does not count processor time")
def test_a_program_that_works_during_a_run_is_seen_and_the_run_itself_is_not(trainable, monkeypatch):
    """Twice the cores of busy processes; the counters are the machine's own."""
    monkeypatch.delenv("FASTBP_FAKE_QUIET")
    spin = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(spin) for _ in range(2 * len(os.sched_getaffinity(0)))]
    try:
        one = trainable(config_of(epochs=1, exclusive=True))
        assert one._others is not None
        found = one.step()["end"]
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert found["exclusive"] is False, found
    assert found["reason"].startswith("the processor is shared: other programs kept "), found["reason"]


def test_a_measured_run_is_looked_after_at_every_epoch(trainable, monkeypatch):
    one = trainable(config_of(epochs=3, exclusive=True))
    one.step()

    def shared(device):
        raise RuntimeError(f"{device} came into use")

    monkeypatch.setattr("trainables.method_trainable.check_alone", shared)
    with pytest.raises(RuntimeError, match="cpu came into use"):
        one.step()


@pytest.mark.parametrize("method", [LayerDropBack(every_epochs=2), DDG(modules=2)], ids=["ldb", "ddg in flight"])
def test_resuming_changes_no_number(trainable, tmp_path, method):
    whole = trainable(config_of(method))
    expected = [whole.step() for _ in range(6)]
    first = trainable(config_of(method))
    results = [first.step() for _ in range(3)]
    first.save_checkpoint(str(tmp_path))
    second = trainable(config_of(method, checkpoints=[str(tmp_path / "run.pt")]))
    results += [second.step() for _ in range(3)]
    assert numbers(results) == numbers(expected), "a resumed run has other numbers"
    assert results[-1]["end"]["resumed"] is True, "a resumed run does not say so"
    for name, value in whole.run.estimator.model.state_dict().items():
        assert torch.equal(value, second.run.estimator.model.state_dict()[name]), f"{name} differs after resuming"


def test_a_torn_and_a_poisoned_state_give_way_to_an_older_one(trainable, tmp_path):
    one, states = trainable(config_of()), []
    for name in ("old", "torn"):
        one.step()
        (tmp_path / name).mkdir()
        one.save_checkpoint(str(tmp_path / name))
        states.insert(0, tmp_path / name / "run.pt")
    torn = states[0].read_bytes()
    states[0].write_bytes(torn[: len(torn) // 2])  # as a process leaves it that is killed while it copies
    (tmp_path / "bad").mkdir()
    states.insert(0, tmp_path / "bad" / "run.pt")
    states[0].write_bytes(pickle.dumps(Poison(tmp_path / "executed"), protocol=2))
    second = trainable(config_of(attempt=1, checkpoints=[str(path) for path in states]))
    assert not (tmp_path / "executed").exists(), "a pickle was executed"
    assert (second.run.epoch, second.run.resumed) == (1, True), f"epoch {second.run.epoch}"
    reason = second.step()["start"]["reason"]
    assert reason.startswith(f"saved state unusable: {states[0]} (UnpicklingError: "), reason
    assert reason.endswith("; it continues from epoch 1"), reason
    third = trainable(config_of(attempt=1, checkpoints=[str(path) for path in states[:2]]))
    assert (third.run.epoch, third.run.resumed) == (0, False)
    assert third.step()["start"]["reason"].endswith("; it starts anew")


class Poison:
    """Unpickled, it writes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_waiting_between_steps_is_report_blocked_and_not_training(trainable, tmp_path):
    one = trainable(config_of(epochs=3))
    before = one.step()["record"]
    time.sleep(0.3)
    trained = one.run.clock.seconds.train_seconds
    assert trained == before["train_seconds"], f"training went from {before['train_seconds']} to {trained} s asleep"
    after = one.step()["record"]
    assert 0.3 <= after["report_blocked_seconds"] < 0.3 + 0.2, f"blocked {after['report_blocked_seconds']} s"


def test_a_checkpoint_has_a_segment_of_its_own(trainable, tmp_path, monkeypatch):
    one = trainable(config_of(epochs=3))
    one.step()
    real = torch.save
    monkeypatch.setattr(torch, "save", lambda *a, **k: (time.sleep(0.3), real(*a, **k)))
    one.save_checkpoint(str(tmp_path))
    record = one.step()["record"]
    assert record["checkpoint_seconds"] >= 0.3, f"checkpoint took {record['checkpoint_seconds']} s"
    assert record["report_blocked_seconds"] < 0.2, f"it was counted as blocked too: {record['report_blocked_seconds']}"


def test_an_actor_is_used_again_as_if_it_were_new(trainable):
    used = trainable(config_of(LayerDropBack()))
    used.step()
    assert used.reset_config(config_of(DDG(modules=2), epochs=2)) is True
    fresh = trainable(config_of(DDG(modules=2), epochs=2))
    results = [[one.step(), one.step()] for one in (used, fresh)]
    assert numbers(results[0]) == numbers(results[1]), "the earlier run left a trace"
    assert "start" in results[0][0], "a reused actor sends no start record"


def test_a_diverging_run_ends_as_diverged(trainable):
    recipe = Recipe(epochs=5, lr=1e30, momentum=0.0, nesterov=False)
    config = config_of() | {"run": dataclasses.replace(RunConfig(task=TASK), recipe=recipe).to_dict()}
    one = trainable(config)
    results = [one.step()]
    while not results[-1]["done"]:
        results.append(one.step())
    assert results[-1]["end"]["status"] == "diverged", f"end is {results[-1]['end']['status']}"
    assert results[-1]["end"]["reason"], "diverged without a reason"
