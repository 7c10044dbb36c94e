"""The benchmark of decorrelated backprop's overhead runs, and says what it did not measure."""

import gc
import json
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("timm")
ROOT = Path(__file__).parents[1]


@pytest.mark.long
@pytest.mark.slow
def test_the_benchmark_measures_every_candidate_and_names_what_is_missing(tmp_path):
    out = tmp_path / "dbp_overhead.json"
    command = [sys.executable, "benchmarks/dbp_overhead.py", "--quick", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    rows = {row["what"]: row for row in found["rows"]}
    assert set(rows) == {"block, p = 0.01", "channel, p = 0.01", "naive, p = 0.01"}
    assert rows["block, p = 0.01"]["matrix_mib"] > rows["channel, p = 0.01"]["matrix_mib"] > 0
    assert rows["block, p = 0.01"]["flops_overhead"] > 0
    assert "not measured: resnet50 at 224x224, batch 256 on a GPU" in done.stdout


def test_the_naive_peer_computes_the_same_net(monkeypatch):
    """Two stages, R = I: the output of the plain layer, and after an update that of the folded weight."""
    from torch import nn

    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from dbp_overhead import TwoStage

    torch.manual_seed(0)
    for layer, x in (
        (nn.Conv2d(3, 5, 3, stride=2, padding=1), torch.randn(2, 3, 8, 8)),
        (nn.Linear(6, 4), torch.randn(7, 6)),
    ):
        peer = TwoStage(layer, 1.0)
        torch.testing.assert_close(peer(x), layer(x))
        peer.update(0.05, 0.3)
        folded = (peer.W.flatten(1) @ peer.R).reshape(layer.weight.shape)
        layer.weight.data.copy_(folded)
        torch.testing.assert_close(peer(x), layer(x))


def test_the_peak_of_a_candidate_is_not_made_smaller_by_the_one_before(monkeypatch):
    """Which is in a cycle, and may go while the next one is measured."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from dbp_overhead import peak_bytes

    class Candidate:
        def __init__(self):
            self.myself = self
            alive.add(self)

        def step(self):
            pass

    alive = weakref.WeakSet()
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: len(alive))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: gc.collect())
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: len(alive))
    peaks = [peak_bytes(lambda: (Candidate().step, None), 1, torch.device("cuda")) for _ in range(3)]
    assert peaks == [1, 1, 1]


def test_candidates_that_do_not_fit_are_left_out_and_named(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from dbp_overhead import fitting, timed

    def too_large():
        if "large" in calls:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def never():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert fitting("net", {"a": lambda: 1, "b": never}) == {"a": 1}
    assert capsys.readouterr().out == "net, b: does not fit into the GPU's memory\n"
    calls = {"small": too_large, "large": too_large}
    seconds = timed("net", calls, {"small": 1, "large": 2}, 3, torch.device("cpu"))
    assert {label: len(times) for label, times in seconds.items()} == {"small": 3}
    assert list(calls) == ["small"], "rows are made of what is left"
    assert capsys.readouterr().out == "net, large: does not fit into the GPU's memory beside the others\n"
