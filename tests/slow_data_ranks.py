"""What the ranks of tests/test_stage.py run: the second one loads its data for longer than ranks wait for another."""

import sys
import time
from pathlib import Path
from unittest import mock

import torch

from fastbp import DDG, config
from fastbp.config import RunConfig, Task
from fastbp.recipe import Recipe
from fastbp.stage_workers import StageWorker

PATIENCE, LOADING = 5.0, 7.0  # seconds
TASK = Task(model="mlp", model_args={"depth": 2, "width": 8}, data_args={"limit": 64})


def main(rank, folder):
    load = config.load_dataset

    def slowly(*args, **settings):
        time.sleep(LOADING * rank)
        return load(*args, **settings)

    chosen = RunConfig(TASK, Recipe(epochs=1), DDG(modules=2, cuts=(1,), processes=True)).to_dict()
    options = {"device": "cpu", "threads": 1}
    with mock.patch.object(config, "load_dataset", slowly):
        worker = StageWorker(rank, 2, f"file://{folder / 'group'}", chosen, options, PATIENCE)
    record, done = worker.train_epoch()
    torch.save((record.setup_seconds, done), folder / f"rank{rank}.pt")
    worker.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
