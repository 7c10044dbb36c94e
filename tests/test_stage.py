"""One process per module against the simulator, bit for bit; what happens when a process fails."""

import dataclasses
import multiprocessing
import os
import signal
import tempfile
import time

import pytest
import torch
import torch.distributed as dist

from fastbp import DDG
from fastbp.config import RunConfig, Task
from fastbp.recipe import Recipe
from fastbp.record import EpochRecord, RunRecord
from fastbp.run import Run
from fastbp.stage import Link
from fastbp.stage_workers import LocalWorkers, StageError, StageWorker
from fastbp.staged import StagedRun, merged, open_run, stages
from rank_processes import results_of_ranks
from slow_data_ranks import LOADING
from stage_ranks import cases, data, first_epoch, train
from test_ddg import conv_net, cross_entropy

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch is built without distributed")
RANKS = 4


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What every rank got in every case: rank -> name -> (losses, state dict of the whole model)."""
    return results_of_ranks("stage_ranks.py", RANKS, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
def test_processes_equal_the_simulator_to_the_bit(ranks, name, tmp_path):  # T3, T11, T15, T17
    method, kind, _ = cases()[name]
    want_losses, want = train(method, kind, None, data(), first=first_epoch(name))
    for rank, results in enumerate(ranks):
        if name not in results:
            continue
        losses, state = results[name]
        assert torch.equal(losses, want_losses), f"rank {rank}: losses {losses}, the simulator's {want_losses}"
        different = [key for key, value in want.items() if not torch.equal(state[key], value)]
        assert not different, f"rank {rank}: {different} differ from the simulator's"


def config(**settings):
    return RunConfig(Task(data_args={"limit": 192}), Recipe(epochs=3), DDG(**{"modules": 2, "cuts": (2,)} | settings))


@pytest.fixture(scope="module")
def one_process():
    """The records of the same run in one process."""
    torch.set_num_threads(1)
    run = Run(config(), device="cpu", threads=1)
    return [run.train_epoch() for _ in range(3)], run.end()


@pytest.mark.long
@pytest.mark.slow
def test_a_staged_run_has_the_records_of_one_process_and_resumes_exactly(one_process):
    epochs, end = one_process
    run = open_run(config(processes=True), device="cpu", threads=1)
    assert isinstance(run, StagedRun)
    start = run.start_record()
    assert (start.workers, start.status) == (2, "running")
    got = [run.train_epoch(), run.train_epoch()]
    state = run.state_dict()
    run.clock.add("report_blocked", 5.0)
    got.append(run.train_epoch())
    assert got[-1].report_blocked_seconds >= 5.0, "what happens outside the workers is not counted"
    last = run.end()
    assert run.done
    assert run.state_dict()["ranks"][1]["epoch"] == 3, "a run that ended can still be saved"
    run.close()
    same = ("examples", "steps", "train_loss", "val_accuracy", "val_loss", "test_accuracy", "flops_executed", "lr")
    for ours, theirs in zip(got, epochs, strict=True):
        different = {name: (getattr(ours, name), getattr(theirs, name)) for name in same}
        different = {name: pair for name, pair in different.items() if pair[0] != pair[1]}
        assert not different, f"epoch {ours.epoch}: staged and in one process {different}"
    assert last.test_accuracy == end.test_accuracy
    assert last.train_seconds > 0

    again = open_run(config(processes=True), device="cpu", threads=1, attempt=1)
    again.load_state_dict(state)
    epoch = again.train_epoch()
    assert (epoch.epoch, epoch.train_loss, epoch.test_accuracy) == (2, epochs[2].train_loss, epochs[2].test_accuracy)
    assert again.end().resumed
    again.close()


@pytest.mark.slow
def test_a_dead_stage_fails_the_run_and_leaves_no_process():
    run = open_run(config(processes=True), device="cpu", threads=1)
    workers = run.workers
    assert isinstance(workers, LocalWorkers)
    run.start_record()
    run.train_epoch()
    processes = list(workers._processes)
    os.kill(processes[1].pid, signal.SIGKILL)
    with pytest.raises(
        StageError, match=r"^stage \d (died|failed|is gone).*all stages were ended, start again from the"
    ):
        run.train_epoch()
    alive = [process.name for process in processes if process.is_alive()]
    assert not alive, f"still running: {alive}"
    record = run.end("failed", "a stage died")
    got = (record.status, record.reason, record.epochs_done, record.workers)
    assert got == ("failed", "a stage died", 1, 2), f"the record of what was trained: {got}"
    assert record.examples > 0
    assert record.ended_at


def hold(pipe):
    time.sleep(600)


def silent_workers():
    """Two processes that never answer, as `LocalWorkers` holds them."""
    workers = LocalWorkers.__new__(LocalWorkers)
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(2)]
    workers._folder = tempfile.TemporaryDirectory()
    workers._pipes, workers._senders = [ours for ours, _ in pairs], []
    workers._processes = [context.Process(target=hold, args=(theirs,), daemon=True) for _, theirs in pairs]
    for process in workers._processes:
        process.start()
    return workers, [theirs for _, theirs in pairs]


@pytest.mark.parametrize("answered", [0, 1])
def test_a_stage_that_does_not_answer_ends_the_run_and_is_named(monkeypatch, answered):
    monkeypatch.setattr("fastbp.stage_workers.ANSWER_SECONDS", 0.2)
    workers, theirs = silent_workers()
    for pipe in theirs[:answered]:
        pipe.send((True, None))
    with pytest.raises(StageError, match=rf"^stage {answered} did not answer within 0\.2 s; all stages were ended"):
        workers.call("train_epoch")
    assert not any(process.is_alive() for process in workers._processes)


def test_a_stage_that_does_not_read_ends_the_run_too(monkeypatch):
    monkeypatch.setattr("fastbp.stage_workers.STATE_SECONDS", 0.2)
    workers, theirs = silent_workers()
    for pipe in theirs:
        pipe.close()
    with pytest.raises(StageError, match=r"^stage 0 did not answer within 0\.2 s; all stages were ended"):
        workers.call("load_state_dict", [bytes(2**22)] * 2)
    assert not any(process.is_alive() for process in workers._processes)
    assert not any(sender.is_alive() for sender in workers._senders)


@pytest.mark.slow
def test_ranks_wait_for_each_others_data_as_long_as_it_takes(tmp_path):
    (first, done), (second, _) = results_of_ranks("slow_data_ranks.py", 2, tmp_path)
    assert done
    assert first < second, "waiting for the neighbour is no setup of this stage"
    assert second >= LOADING, "loading is setup"


def test_a_stage_without_the_gpu_it_wants_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    wanted = {"device": "cuda"}
    with pytest.raises(
        ValueError, match=r"^DDG\.processes = True: its stages are to use cuda, but torch .* sees no GPU"
    ):
        StageWorker(0, 2, f"file://{tmp_path}/group", config(processes=True).to_dict(), wanted, 1.0)
    with pytest.raises(ValueError, match=r"^DDG\.processes = True: 2 modules need 2 GPUs, this machine has 0"):
        open_run(config(processes=True), **wanted)


def test_a_stage_that_cannot_start_says_why():
    wrong = dataclasses.replace(config(processes=True), task=Task(data="folder:/no/such/folder"))
    with pytest.raises(StageError, match=r"^stage \d failed: .*no/such/folder"):
        open_run(wrong, device="cpu", threads=1)


def test_without_a_group_the_user_is_told_what_to_do():
    with pytest.raises(ValueError, match=r"^DDG\.processes = True: needs a torch\.distributed group of 2 ranks"):
        DDG(processes=True).bind(conv_net(), cross_entropy)


def test_stages_of_a_method():
    assert [stages(DDG(modules=3)), stages(DDG(modules=3, processes=True)), stages(DDG(modules=1, processes=True))] == [
        1,
        3,
        1,
    ]


def test_merged_records():
    a = EpochRecord(train_seconds=2.0, eval_seconds=1.0, flops_executed=10.0, energy_joules=None, peak_memory_bytes=4)
    b = EpochRecord(train_seconds=3.0, eval_seconds=0.5, flops_executed=20.0, energy_joules=7.0, peak_memory_bytes=5)
    both = merged([a, b])
    got = (both.train_seconds, both.eval_seconds, both.flops_executed, both.energy_joules, both.peak_memory_bytes)
    assert got == (3.0, 1.0, 30.0, None, 9), f"slowest seconds, summed FLOPs and memory, unknown energy: {got}"
    assert merged([RunRecord(compile_seconds=None), RunRecord(compile_seconds=None)]).compile_seconds is None


class _Asked:
    """Workers that say what a rank with this many threads would."""

    def __init__(self, threads, kind="cpu"):
        self.device = {"type": kind, "threads": threads}

    def call(self, name, *args):
        return [RunRecord(device=self.device), RunRecord(device=self.device)]

    def close(self):
        pass


@pytest.mark.parametrize(
    ("given", "each", "kind", "want"), [(1, 1, "cpu", 2), (2, 1, "cpu", 1), (4, 2, "cpu", 1), (4, 2, "cuda", 2)]
)
def test_the_record_says_how_many_devices_and_compares_with_as_many_threads(given, each, kind, want):
    record = StagedRun(config(processes=True), _Asked(each, kind), given).start_record()
    got = (record.workers, record.device["threads"])
    assert got == (want, given), f"two processes of {each} threads for a run that was given {given}: {got}"


def holding():
    """A link that holds what it is to send, as over nccl, so that it needs no group."""
    link = Link(1, torch.device("cpu"))
    link.fused = True
    return link


def test_sends_are_held_on_gpus_whatever_the_group_is_called(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda: "undefined")  # of a group that was made without a name
    assert Link(1, torch.device("cuda", 0)).fused
    assert not Link(1, torch.device("cpu")).fused


@pytest.mark.parametrize(
    ("later", "said"),
    [
        (torch.zeros(4, 3, 8, 8), r"float32 \(4, 3, 8, 8\)"),
        (torch.zeros(4, 3, 8), r"float32 \(4, 3, 8\)"),
        (torch.zeros(4, 3, 6, 6, dtype=torch.bfloat16), r"bfloat16 \(4, 3, 6, 6\)"),
    ],
)
def test_an_activation_that_changes_its_shape_or_type_is_named(later, said):
    link = holding()
    link.push(("activation", 4), torch.zeros(4, 3, 6, 6))
    link.push(("activation", 2), torch.zeros(2, 3, 8, 8))  # another number of examples is told anew
    change = rf"the activation of 4 examples changed from float32 \(4, 3, 6, 6\) to {said}, which its receiver cannot"
    with pytest.raises(ValueError, match=rf"^DDG\.processes = True: {change} know; pad to one size, or set processes"):
        link.push(("activation", 4), later)


def test_a_tensor_goes_in_the_layout_that_its_receiver_knows():
    link, x = holding(), torch.randn(2, 3, 4, 5)
    link.push(("activation", 2), x.to(memory_format=torch.channels_last))
    link.push(("activation", 2), x)
    _, first, second = link.held
    assert torch.equal(second, x)
    assert second.stride() == first.stride()


@pytest.mark.parametrize("tensor", [torch.zeros(2, dtype=torch.complex64), torch.zeros([1] * 8)])
def test_a_tensor_that_no_header_can_describe_is_named(tensor):
    kind = str(tensor.dtype).removeprefix("torch.")
    message = (
        rf"^DDG\.processes = True: the activation is {kind} \(.*\), but between processes only float32, .* in up to 7"
    )
    with pytest.raises(ValueError, match=message):
        holding().push(("activation", len(tensor)), tensor)
