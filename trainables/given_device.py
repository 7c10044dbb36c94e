"""The device that a process which Ray gave one is to use."""

from __future__ import annotations

import os
import platform

import torch


def device_for(wanted: str) -> str:
    """The torch device of a trial that was given a device of this kind.

    Raises:
        RuntimeError: Ray gave the trial a GPU that torch cannot use. With FASTBP_FAKE_GPU=1 in the environment the CPU
            stands for it: for tests of scheduling on machines without one.
    """
    if wanted != "cuda" or torch.cuda.is_available():
        return wanted
    if os.environ.get("FASTBP_FAKE_GPU") == "1":
        return "cpu"
    raise RuntimeError(
        f"Ray gave this run a GPU of node {platform.node()}, but torch {torch.__version__} there sees none: install "
        "there a CUDA build of torch and a driver that fits it, or set `gpus: 0`"
    )
