"""A measured run's device is its own: other processes on a GPU are refused, a busy processor is remarked."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch

from trainables import free_device
from trainables.free_device import busy_remark, check_alone, wait_until_free


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


@pytest.mark.parametrize(("cores", "remark"), [(0.1, ""), (1.5, "other programs keep 1.5 of")])
def test_a_busy_processor_is_remarked(tmp_path, monkeypatch, cores, remark):
    stat = tmp_path / "stat"
    stat.write_text("cpu 100 0 50 999 10 0 0 0 0 0\n")
    ticks = 100 + round(cores * os.sysconf("SC_CLK_TCK"))
    monkeypatch.setattr(free_device.time, "sleep", lambda _: stat.write_text(f"cpu {ticks} 0 50 1300 10 0 0 0 0 0\n"))
    found = busy_remark(1.0, stat)
    assert remark in found, found
    assert bool(remark) == bool(found), found
    assert busy_remark(0.0, tmp_path / "none") == "", "an unknown load was remarked"
