"""Stages as Ray actors, in a real sweep: the numbers of one process, and a stage that is killed in the middle."""

import contextlib
import os
import signal
import time

import pytest

from fastbp import DDG
from fastbp.config import RunConfig
from fastbp.record import EpochRecord, RunRecord
from fastbp.stage_workers import StageError
from faults import Victim, under_way
from trainables.stage_actors import RayWorkers, StageActor, stage_resources

SWEEP = """\
name: faults
task: {data: digits, model: resnet_tiny, model_args: {blocks: 4, width: 8}, data_args: {limit: 256}}
recipe: {epochs: 12, batch_size: 32, lr: 0.1}
arms:
  one: {method: ddg, modules: 2, cuts: [2]}
  two: {method: ddg, modules: 2, cuts: [2], processes: true}
  bp: {method: bp}
search: {trials: 1, checkpoint_epochs: 1, cpus: 1, gpus: 0}
measure: {seeds: [0], threads: 1, gpus: 0, controls: false}
"""
SAME = ("examples", "steps", "batch_size", "lr", "train_loss", "val_loss", "val_accuracy", "test_accuracy")


def numbers(records, phase, arm):
    """What a run's epochs say, without times: of the last attempt that reached each epoch."""
    (key,) = {r.run_key for r in records if isinstance(r, RunRecord) and (r.phase, r.arm) == (phase, arm)}
    epochs = {r.epoch: r for r in records if isinstance(r, EpochRecord) and r.run_key == key}
    return [{name: getattr(epochs[i], name) for name in SAME} for i in sorted(epochs)]


def attempts(records, phase, arm):
    return [r for r in records if isinstance(r, RunRecord) and (r.phase, r.arm) == (phase, arm)]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_with_stages_has_the_records_of_one_process_even_when_a_stage_is_killed(tmp_path):
    sweep = Victim(tmp_path, SWEEP)
    try:
        sweep.start("--no-mlflow")
        sweep.until(lambda records: any(run.arm == "two" for run in under_way(records, "search", epochs=3)))
        stages = sweep.pids("StageActor")
        assert len(stages) == 2, f"a trial of two modules has {len(stages)} stages"
        os.kill(stages[1], signal.SIGKILL)
        began = time.monotonic()
        assert sweep.wait() == 0, sweep.said
        assert time.monotonic() - began < 240, "a killed stage made the sweep wait"
        records = sweep.records()
        for phase in ("search", "measure"):
            one, two = numbers(records, phase, "one"), numbers(records, phase, "two")
            assert len(one) == 12, f"{phase}: {len(one)} epochs"
            assert two == one, f"{phase}: staged and in one process differ"
            last = [attempts(records, phase, arm)[-1] for arm in ("one", "two")]
            assert [run.workers for run in last] == [1, 2], f"{phase}: {last}"
            assert last[0].flops_executed == pytest.approx(last[1].flops_executed), "two stages do other work than one"
        hurt = attempts(records, "search", "two")
        failed = next(run for run in hurt if run.status == "failed")
        assert failed.attempt == 0, f"failed: {failed}"
        assert "stage" in failed.reason, f"the reason does not name the stage: {failed.reason}"
        assert "start again from the last checkpoint" in failed.reason, failed.reason
        assert (hurt[-1].status, hurt[-1].attempt, hurt[-1].resumed) == ("finished", 1, True), f"the retry: {hurt[-1]}"
        epochs = [r for r in records if isinstance(r, EpochRecord) and r.run_key == failed.run_key]
        by_attempt = [sum(r.attempt == attempt for r in epochs) for attempt in (0, 1)]
        assert by_attempt[0] >= 3, f"epochs of the first attempt: {by_attempt}"
        assert by_attempt[1] < 12, f"the retry did not continue from a checkpoint: {by_attempt}"
        sweep.check_nothing_runs()
    finally:
        sweep.close()


def test_a_trial_asks_for_one_bundle_per_stage():
    alone = stage_resources(RunConfig(method=DDG(modules=3)), 4.0, 0.5)
    assert alone.bundles == [{"CPU": 4.0, "GPU": 0.5}], f"in one process: {alone.bundles}"
    staged = stage_resources(RunConfig(method=DDG(modules=3, processes=True)), 6.0, 0.5)
    assert [b for b in staged.bundles if b] == [{"CPU": 2.0, "GPU": 1.0}] * 3, f"staged: {staged.bundles}"


@pytest.mark.parametrize(("fake", "given"), [("0", None), ("1", "cpu")])
def test_a_stage_whose_gpu_torch_cannot_use_says_so_or_fakes_it(monkeypatch, fake, given):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("trainables.stage_actors.StageWorker", lambda *args: args)
    monkeypatch.setenv("FASTBP_FAKE_GPU", fake)
    actor, arguments = StageActor(), (None, [], {}, 0, 2, "tcp://nowhere:1", {})
    actor.start(*arguments, {"device": "cpu", "threads": 1}, 1.0)
    actor.start(*arguments, {"device": None}, 1.0)  # whatever there is
    with contextlib.nullcontext() if given else pytest.raises(RuntimeError, match=r"^Ray gave this run a GPU of node "):
        actor.start(*arguments, {"device": "cuda"}, 1.0)
        assert actor._worker == (0, 2, "tcp://nowhere:1", {}, {"device": given}, 1.0)


@pytest.mark.slow
def test_an_actor_that_does_not_answer_ends_the_run_and_is_named(ray):
    import ray as api
    from ray.exceptions import RayActorError

    class Silent:
        def call(self, name, arguments):
            time.sleep(600 * arguments[0])

    workers = RayWorkers.__new__(RayWorkers)
    workers._actors = [api.remote(Silent).options(num_cpus=0).remote() for _ in range(2)]
    workers.call("wait", [0, 0])
    calls = [actor.call.remote("wait", [rank]) for rank, actor in enumerate(workers._actors)]
    with pytest.raises(StageError, match=r"^stage 1 did not answer within 2 s; all stages were ended, start again"):
        workers._wait(calls, 2.0)
    with pytest.raises(RayActorError):
        api.get(workers._actors[1].call.remote("wait", [0]), timeout=30)
