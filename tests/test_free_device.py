"""A measured run's device is its own: other processes on a GPU are refused, on the processor they are counted."""

import contextlib
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from trainables import free_device
from trainables.free_device import OtherPrograms, check_alone, spare_cores, unwatched, wait_until_free


@pytest.fixture
def gpu(monkeypatch):
    """An NVML whose first device runs the processes in the list."""
    pids = []
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetComputeRunningProcesses=lambda _: [SimpleNamespace(pid=pid) for pid in pids],
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="a-b"))
    return pids


def test_a_gpu_with_other_processes_is_refused(gpu):
    wait_until_free(torch.device("cuda"), seconds=0)
    gpu.append(os.getpid())
    wait_until_free(torch.device("cuda"), seconds=0)
    gpu.append(4711)
    with pytest.raises(RuntimeError, match=r"cuda is in use by 1 other process\(es\), ids 4711: .* end them"):
        wait_until_free(torch.device("cuda"), seconds=0)


def test_who_comes_during_a_run_is_found_whatever_id_we_have_there(gpu):
    check_alone(torch.device("cuda"))
    gpu.append(1)  # this process, as the machine outside of a container counts
    check_alone(torch.device("cuda"))
    gpu.append(4711)
    with pytest.raises(RuntimeError, match=r"cuda came into use by 1 other process\(es\) .* 1, 4711: its seconds"):
        check_alone(torch.device("cuda"))


def test_the_process_of_the_run_before_is_waited_for(gpu, monkeypatch):
    gpu.append(4711)
    monkeypatch.setattr(free_device.time, "sleep", lambda _: gpu.clear())
    wait_until_free(torch.device("cuda"), seconds=60)


def test_without_nvml_nothing_is_known_and_nothing_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    wait_until_free(torch.device("cuda"), seconds=0)
    wait_until_free(torch.device("cpu"), seconds=0)
    assert unwatched(torch.device("cuda")) == "the GPU was not watched: nvidia-ml-py is not installed"
    assert unwatched(torch.device("cpu")) == ""


def test_a_driver_that_lists_no_processes_is_said(gpu, monkeypatch):
    assert unwatched(torch.device("cuda")) == ""
    monkeypatch.delattr(sys.modules["pynvml"], "nvmlDeviceGetComputeRunningProcesses")
    assert unwatched(torch.device("cuda")) == "the GPU was not watched: its driver does not list its processes"


@pytest.mark.parametrize(
    ("cores", "threads", "spare"), [(2, 1, 0.5), (2, 2, 0.5), (3, 1, 1.0), (4, 4, 0.5), (16, 1, 14.0), (16, 15, 0.5)]
)
def test_others_may_have_what_a_run_leaves(monkeypatch, cores, threads, spare):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert spare_cores(threads) == spare


def test_a_browser_beside_a_run_of_one_thread_is_no_neighbour_where_cores_are_left(machine, monkeypatch):
    stat, passes = machine
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for threads, said in ((1, False), (2, True)):  # two cores to spare, one core to spare
        others = OtherPrograms(stat, threads)
        with others.watched():
            passes(10.0, others=1.0, far=0.5, own=1.0)
        assert bool(others.remark()) is said, others.remark()


def test_the_seconds_of_a_runs_other_processes_are_its_own(machine):
    stat, passes = machine
    for each, said in ((15.0, ""), (None, ""), (0.0, "the processor is shared")):
        own = iter([0.0, each])
        others = OtherPrograms(stat, own=lambda own=own: next(own))
        with others.watched():
            passes(10.0, others=1.5)
        if each is None:
            assert others.seconds == 0, "an unknown share was counted"
        else:
            assert others.remark()[:23] == said, others.remark()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Two cores of ours among four: a function that lets seconds pass in which others and we work on them."""
    monkeypatch.delenv("FASTBP_FAKE_QUIET", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    stat, now, ticks = tmp_path / "stat", {"wall": 100.0, "own": 7.0, "ours": 0.0, "far": 0.0}, os.sysconf("SC_CLK_TCK")
    monkeypatch.setattr(free_device.time, "monotonic", lambda: now["wall"])
    monkeypatch.setattr(free_device.time, "process_time", lambda: now["own"])

    def passes(seconds, others=0.0, own=0.0, far=0.0):
        """`others`, `own` and `far`: cores kept busy by other programs here, by us, and on cores that are not ours."""
        now["wall"], now["own"] = now["wall"] + seconds, now["own"] + own * seconds
        now["ours"], now["far"] = now["ours"] + (others + own) * seconds, now["far"] + far * seconds
        half, waited = round(now["ours"] * ticks / 2), round(100 * now["wall"])
        each = [f"cpu{i} {half} 0 50 {waited} 9{waited} 0 0 0 0 0" for i in (0, 1)]
        each += [f"cpu{i} {round(now['far'] * ticks / 2)} 0 50 {waited} 10 0 0 0 0 0" for i in (2, 3)]
        stat.write_text("\n".join([f"cpu {10**9} 0 0 0 0 0 0 0 0 0", *each, "intr 1 2 3", "ctxt 4"]) + "\n")

    passes(0.0)
    monkeypatch.setattr(free_device.time, "sleep", passes)
    return stat, passes


@pytest.mark.parametrize(
    ("spans", "cores"),
    [
        ([(10.0, {"own": 2.0})], None),  # what we do ourselves is no neighbour
        ([(10.0, {"others": 0.4, "own": 1.0})], None),
        ([(10.0, {"others": 1.5, "own": 0.5})], "1.5"),
        ([(10.0, {"far": 2.0, "own": 1.0})], None),  # on cores that this process may not use
        ([(1.0, {"others": 2.0}), (9.0, {})], None),  # 0.2 of a core over the run
        ([(1.0, {"others": 2.0}), (1.0, {"others": 0.2})], "1.1"),
        ([(0.06, {"others": 2.0})], "0.6"),  # and then 0.14 s of quiet
        ([(0.01, {"others": 2.0})], None),
        ([], None),
    ],
)
def test_others_are_counted_over_what_was_watched_alone(machine, spans, cores):
    stat, passes = machine
    others = OtherPrograms(stat)
    for seconds, work in spans:
        with others.watched():
            passes(seconds, **work)
        passes(100.0, others=2.0)  # nobody watches
    found = others.remark()
    if cores is None:
        assert found == "", found
    else:
        assert found == f"the processor is shared: other programs kept {cores} of 2 cores busy meanwhile"


def test_where_nobody_counts_nothing_is_remarked(machine, tmp_path):
    _, passes = machine
    others = OtherPrograms(tmp_path / "none")
    with others.watched():
        passes(10.0, others=2.0)
    assert others.remark() == "", "an unknown load was remarked"


def test_a_failing_run_is_watched_too(machine):
    stat, passes = machine
    others = OtherPrograms(stat)
    with contextlib.suppress(KeyError), others.watched():
        passes(10.0, others=2.0)
        raise KeyError
    assert others.remark() != ""
