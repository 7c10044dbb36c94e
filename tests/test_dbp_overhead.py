"""The benchmark of decorrelated backprop's overhead runs, and says what it did not measure."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
    import torch
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
