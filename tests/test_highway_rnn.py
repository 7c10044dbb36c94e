"""The benchmark of Highway-BP over time at a small size: that it compares what it says, and judges a GPU alone."""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("highway_rnn")


@pytest.mark.long
@pytest.mark.slow
def test_the_benchmark_times_every_candidate(tmp_path):
    out = tmp_path / "highway_rnn.json"
    command = [sys.executable, "benchmarks/highway_rnn.py", "--quick", "--cpu", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(out.read_text(encoding="utf-8"))
    assert (found["quick"], found["gpu"], found["device"]["threads"]) == (True, "not measured", 1)
    table = [(row["cell"], row["length"], row["k"]) for row in found["rows"]]
    assert table == [(cell, length, k) for cell in ("gru", "lstm") for length in (12, 24) for k in (0, 2)]
    for row in found["rows"]:
        for name in ("times_loop", "times_layer"):
            middle, low, high = row[name]
            assert 0 < low <= middle <= high, f"{name}: {row[name]}"
        assert row["loop_ms"] > 0
        assert 0.3 < row["cosine"] < 1.0001, row
        assert 0.3 < row["fpi_cosine"] < row["cosine"], row
        assert (row["fpi_ms"] is None) == (row["k"] == 0), "FPI is timed at k = 2 alone"
        assert "times_loop_graph" not in row, "there are no graphs without CUDA"
    cosines = [row["cosine"] for row in found["rows"]]
    assert all(more > less for less, more in zip(cosines[::2], cosines[1::2], strict=True)), f"k = 0, 2: {cosines}"
    assert "not measured" in done.stdout


def test_every_candidate_takes_the_gradient_it_is_timed_for(script):
    """The loop is torch's layer; as many rounds as steps are exact; fewer are not."""
    for cell in ("gru", "lstm"):
        model = script.net(cell, 8, torch.device("cpu")).double()
        x, y = script.batch(10, 3, torch.device("cpu"))
        steps = script.candidates(model, x.double(), y, (1, 10))
        exact = script.gradient(model, steps["layer"])
        for name, same in (("loop", True), ("10", True), ("1", False), ("fpi 10", True), ("fpi 1", False)):
            got = script.gradient(model, steps[name])
            assert torch.allclose(got, exact, rtol=1e-9, atol=1e-12) == same, f"{cell}: {name}"
        assert exact.numel() == sum(p.numel() for p in model.layers[0].parameters()), "the head's gradient is exact"


def test_fpi_is_truncated_backpropagation_with_a_sliding_window(script):
    """Every step's loss through the k + 1 cells that end there: its last cells in a sequence cut off before them."""
    k = 2
    for cell in ("gru", "lstm"):
        model = script.net(cell, 8, torch.device("cpu")).double()
        x, y = script.batch(7, 3, torch.device("cpu"))
        got = script.gradient(model, script.candidates(model, x.double(), y, (k,))[f"fpi {k}"])
        layer, want = model.layers[0], torch.zeros_like(got)
        h = x.double().transpose(0, 1)
        for t in range(7):
            start, state = max(0, t - k), None
            if start:
                with torch.no_grad():
                    state = layer(h[:start])[1]
            logits = model.head(layer(h[start : t + 1], state)[0][-1])
            grads = torch.autograd.grad(script.loss_of(logits[:, None], y[:, t : t + 1]) / 7, list(layer.parameters()))
            want += torch.cat([grad.flatten() for grad in grads])
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


def test_a_candidate_that_cannot_be_captured_is_left_out_with_the_reason(script, monkeypatch, capsys):
    model = script.net("gru", 8, torch.device("cpu"))
    x, y = script.batch(10, 3, torch.device("cpu"))
    steps = script.candidates(model, x, y, (1,))
    refused = {steps["layer"]: "capture", steps["1"]: "replay"}

    def capture(model, step):
        if refused.get(step) == "capture":
            raise RuntimeError("operation not permitted\nwhen a stream is capturing")
        return steps["fpi 1"] if step in refused else step

    monkeypatch.setattr(script, "capture", capture)
    found = script.with_graphs(model, steps)
    assert list(found) == [*steps, "loop graph", "fpi 1 graph"]
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "layer: left out as a CUDA graph: RuntimeError: operation not permitted"
    assert said[1].startswith("1: left out as a CUDA graph: RuntimeError: its replay's gradient is 0."), said
    assert all(p.grad is not None for p in model.parameters()), "fpi 1 came last, and was not left out"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a real capture, made to fail by having no CUDA")
def test_a_real_capture_that_fails_does_not_end_the_script(script, capsys):
    model = script.net("gru", 8, torch.device("cpu"))
    steps = script.candidates(model, *script.batch(10, 3, torch.device("cpu")), (1,))
    assert script.with_graphs(model, steps) == steps
    assert capsys.readouterr().out.count("left out as a CUDA graph") == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_graphs_take_the_gradient_of_their_step(script, cell, capsys):
    """`captured` compares them; that none is left out is what is tested."""
    device = torch.device("cuda")
    model = script.net(cell, 8, device)
    steps = script.candidates(model, *script.batch(32, 4, device), (0, 5))
    found = script.with_graphs(model, steps)
    assert len(found) == 2 * len(steps) - 1, capsys.readouterr().out


def test_graphs_are_compared_with_graphs(script):
    seconds = {"loop": [8.0], "layer": [4.0], "5": [2.0], "loop graph": [3.0], "5 graph": [1.0]}
    found = {name: ratio[0] for name, ratio in script.speedups(seconds, 5).items()}
    assert found == {"times_loop": 4.0, "times_layer": 2.0, "times_loop_graph": 3.0, "times_fastest_layer": 4.0}
    assert script.speedups(seconds, 20) == {}
    slower = {**seconds, "layer graph": [3.5], "5 graph": [2.5]}
    assert script.speedups(slower, 5)["times_fastest_layer"][0] == 1.75, "a graph only where it is faster"


def row(script, **values):
    one = {"cell": "gru", "width": 8, "length": 1024, "k": 5, "ms": 1.0, "cosine": 0.9}
    one |= {"fpi_ms": None, "fpi_cosine": 0.8}
    return one | {"times_loop": [4.0, 3.9, 4.1], "times_layer": [1.6, 1.5, 1.7]} | values


def test_figures_and_map(script):
    slow = row(script, cell="lstm", times_loop=[2.0, 1.9, 2.1], times_layer=[1.1, 0.9, 1.2])
    best = row(script, k=0, times_loop=[9.0, 8.0, 9.5], times_layer=[2.0, 1.9, 2.2])
    assert list(script.figures([row(script), best, slow], "cuda").values()) == [2.0, 2.0]
    graph = row(script, times_fastest_layer=[0.9, 0.8, 1.0])
    assert list(script.figures([graph, slow], "cuda").values()) == [2.0, 1.1], "both in their faster form"
    assert script.wins(row(script))
    assert not script.wins(graph)
    narrow = row(script, width=16, times_loop=[5.0, 4.8, 5.1])
    assert list(script.figures([best, narrow, slow], "cpu").values()) == [5.0, 1.6]
    assert all(math.isnan(figure) for figure in script.figures([best, slow], "cpu").values())
    lines = script.win_map([row(script), best, slow])
    assert lines[2].split() == ["gru", "8", "5", "(0.900)"]
    assert lines[3].split() == ["lstm", "8", "none"], "1.1 with an interval down to 0.9 is no win"
    assert "<" in script.line(best)
    assert "<" not in script.line(slow)
    assert script.fit((0, 1, 2), [3.0, 5.0, 7.0]) == pytest.approx((3.0, 2.0))


def test_a_claim_that_does_not_hold_is_one_sentence_and_the_other_devices_are_not_judged(
    script, monkeypatch, tmp_path, capsys
):
    times = {"times_loop": [2.5, 2.4, 2.6], "times_layer": [2.1, 2.0, 2.2]}
    monkeypatch.setattr(script, "measure", lambda cell, width, *_: [row(script, cell=cell, width=width, **times)])
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["highway_rnn.py", "--cpu", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert "1 of 2 claims do not hold: times the loop, GRU of 16, k = 5, L = 1024 is 2.50, at le" in str(ended.value)
    assert "claim (times torch's layer, most at least 1.5): of cuda, not measured" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(script, "environment", lambda _: {})
    monkeypatch.setattr(sys, "argv", ["highway_rnn.py", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert "1 of 2 claims do not hold: times the loop, k = 5, L = 1024, least is 2.50, at least 3" in str(ended.value)
    assert json.loads(out.read_text())["gpu"] == "measured"
