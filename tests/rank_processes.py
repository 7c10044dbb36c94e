"""Processes that form one `torch.distributed` group for a test."""

import os
import subprocess
import sys
from pathlib import Path

import torch


def results_of_ranks(script: str, count: int, folder: Path) -> list:
    """What every rank of a script beside this file saved as `rankN.pt`, called with its rank and the folder."""
    path = Path(__file__).with_name(script)
    places = f"{path.parent}{os.pathsep}{path.parents[1]}"  # fastbp need not be installed
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": places}
    processes = [
        subprocess.Popen([sys.executable, str(path), str(rank), str(folder)], env=env, stderr=subprocess.PIPE)
        for rank in range(count)
    ]
    errors = [process.communicate(timeout=240)[1].decode() for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(count)]
