"""A benchmark whose claim does not hold ends with one sentence and a code that is not 0, once its figures are kept."""

import contextlib
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import binom

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def script(monkeypatch, tmp_path):
    """Imports a benchmark; it writes into the test's folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def make(name):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--out", str(tmp_path / "out.json")])
        return importlib.import_module(name)

    return make


@pytest.mark.parametrize(
    ("figures", "least", "said"),
    [
        ({"a": 1.0, "b": 2.0}, "", None),
        ({"a": 1.01, "b": 2.0}, "", "x: 1 of 2 claims do not hold: a is 1.01, at most 1 is claimed; see there"),
        ({"a": math.nan, "b": 3.0}, "", "2 of 2 claims do not hold: a is nan, at most 1 is claimed, b is 3.00, at"),
        ({"a": 1.0, "b": 2.0}, "ab", None),
        ({"a": 1.0, "b": 1.99}, "ab", "1 of 2 claims do not hold: b is 1.99, at least 2 is claimed"),
        ({"a": 0.5, "b": 1.99}, "b", "1 of 2 claims do not hold: b is 1.99, at least 2 is claimed"),
    ],
)
def test_judging(script, capsys, figures, least, said):
    judge = script("benchmark").judge
    if said is None:
        judge("x", figures, {"a": 1.0, "b": 2.0}, "there", least=least)
        assert capsys.readouterr().out.count(": holds, ") == 2
        return
    with pytest.raises(SystemExit) as ended:
        judge("x", figures, {"a": 1.0, "b": 2.0}, "there", least=least)
    assert said in str(ended.value)
    assert "does not hold" in capsys.readouterr().out


@pytest.mark.parametrize(("ours", "said"), [(1.05, None), (1.2, "fresh is 1.200, at most 1.1 is claimed")])
def test_a_sweep_that_is_too_slow_ends_the_benchmark_with_one(script, monkeypatch, tmp_path, ours, said):
    benchmark = script("sweep_overhead")
    seconds = dict(zip(benchmark.VARIANTS, ([1.0], [ours], [0.8], [0.9]), strict=True))
    monkeypatch.setattr(benchmark, "per_trial", lambda *_: seconds)
    found = {"trials": 10, "seconds": 1.0, "every": 1, "mib": [1.0, 1.0], "mib_per_1000": 0.0, "bare_mib_per_1000": 0.0}
    monkeypatch.setattr(benchmark, "memory", lambda _: found)
    monkeypatch.setattr(benchmark, "ray_session", contextlib.nullcontext)
    check_end(benchmark, said, tmp_path / "out.json")


@pytest.mark.parametrize(("ratio", "said"), [(25.0, None), (19.9, "http is 19.9, at least 20 is claimed")])
def test_mlflow_that_blocks_too_long_ends_the_benchmark_with_one(script, monkeypatch, tmp_path, ratio, said):
    benchmark = script("mlflow_overhead")
    result = {kind: {"blocked_mean_s": 1.0} for kind in ("bare", "ours", "ray")}
    row = {"store": "http", "ratio": ratio, "low": ratio, "high": ratio, "per_result": result}
    monkeypatch.setattr(benchmark, "compare", lambda store, *_: row | {"store": store})
    monkeypatch.setattr(benchmark, "ray_session", contextlib.nullcontext)
    monkeypatch.setattr(benchmark, "server", lambda folder: contextlib.nullcontext("http://h"))
    check_end(benchmark, said, tmp_path / "out.json")


@pytest.mark.parametrize(("ratio", "said"), [(1.02, None), (1.0201, "mlp is 1.0201, at most 1.02 is claimed")])
def test_a_loop_that_is_too_slow_ends_the_benchmark_with_one(script, monkeypatch, tmp_path, ratio, said):
    benchmark = script("loop_overhead")
    monkeypatch.setattr(
        benchmark,
        "measure",
        lambda model, *_: {"model": model, "step_ms": 1.0, "ratio": ratio, "low": 1.0, "high": 1.0},
    )
    check_end(benchmark, said, tmp_path / "out.json")


def test_the_interval_of_a_median_covers_it(script):
    interval = script("benchmark").median_interval
    assert interval([4.0, 1.0, 3.0, 2.0]) == (2.5, 1.0, 4.0), "too few for 95 %: the range"
    for n in range(6, 60):
        _, low, high = interval([float(i) for i in range(n)])
        assert low + high == n - 1, "as many values left out on one side as on the other"
        outside = [2 * binom.cdf(left_out, n, 0.5) for left_out in (low, low + 1)]
        assert outside[0] <= 0.05 < outside[1], f"{n} values: [{low}, {high}] covers {1 - outside[0]:.3f}"


def check_end(benchmark, said, out):
    if said is None:
        benchmark.main()
    else:
        with pytest.raises(SystemExit) as ended:
            benchmark.main()
        assert said in str(ended.value)
        assert len(str(ended.value).splitlines()) == 1
    assert json.loads(out.read_text()), "the figures are lost"


@pytest.mark.parametrize(("name", "flags"), [("highway_rnn", ["--cpu"]), ("highway_deep", ["--cpu"])])
def test_the_record_names_the_device_that_was_measured(script, monkeypatch, tmp_path, name, flags):
    """Which is not the GPU of the machine where the CPU was asked for."""
    benchmark = script(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="GPU", uuid="", total_memory=1)
    )
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 1)
    monkeypatch.setattr(benchmark, "measure", lambda *_: {})
    monkeypatch.setattr(benchmark, "show", lambda _: None, raising=False)
    monkeypatch.setattr(benchmark, "win_map", lambda _: [], raising=False)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--quick", *flags])
    benchmark.main()
    assert json.loads((tmp_path / "out.json").read_text())["device"]["type"] == "cpu"


@pytest.mark.parametrize("name", ["highway_deep", "highway_rnn", "ldb_saving"])
def test_what_was_measured_is_kept_when_the_next_fails(script, monkeypatch, tmp_path, name):
    benchmark, calls = script(name), []

    def measure(*_):
        calls.append(name)
        if len(calls) == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return []

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "show", lambda _: None, raising=False)
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--quick", "--cpu"])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        benchmark.main()
    assert json.loads((tmp_path / "out.json").read_text())["device"]["type"] == "cpu"
