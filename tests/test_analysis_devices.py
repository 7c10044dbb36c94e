"""Arms that trained on several devices: their cost is shown, and a win by more hardware is no plain win."""

from analysis.load import load
from analysis.measured import measured_groups
from analysis.summary import answer
from analysis_records import report_of, rows_of, run_line, sweep_line, write


def lines_of(workers):
    """Baseline at 10 s; an arm at 6 s on so many devices, None in records of before there were any."""
    ddg = {"method": "ddg", "modules": 2, "processes": True}
    lines = [sweep_line(arms=["bp", "ddg"])]
    for seed in range(5):
        for line in (
            run_line(seed=seed, train_seconds=10 + 0.01 * seed),
            run_line(arm="ddg", role="method", method=ddg, seed=seed, train_seconds=6 + 0.01 * seed),
        ):
            lines.append(line if workers is None else line | {"workers": workers if line["arm"] == "ddg" else 1})
    return lines


def comparison(tmp_path, workers):
    (group,) = measured_groups(load([write(tmp_path / "records.jsonl", lines_of(workers))]))
    (found,) = answer(group).comparisons
    return found


def test_a_win_on_twice_the_devices_is_a_trade_off_that_says_so(tmp_path):
    found = comparison(tmp_path, 2)
    assert found.verdict == "trade-off", f"faster on two devices is called {found.verdict}"
    assert "not the same hardware: 2 devices side by side against the baseline's 1, " in found.sentence
    assert "12.0 " in found.sentence, f"two devices for 6.02 s: {found.sentence}"
    assert comparison(tmp_path, 1).verdict == "wins"


def test_device_seconds_are_shown_only_where_a_run_used_several(tmp_path):
    (row,) = [row for row in rows_of(report_of(tmp_path / "two", lines_of(2)), "pareto") if row["arm"] == "ddg"]
    shown = {name: row[name] for name in row if "device" in name.lower() or "workers" in name}
    values = [float(value) for value in shown.values() if value]
    assert 2.0 in values, f"devices: {shown}"
    assert any(abs(value - 12.04) < 1e-6 for value in values), f"device-seconds: {shown}"
    for workers in (1, None):
        rows = rows_of(report_of(tmp_path / str(workers), lines_of(workers)), "pareto")
        extra = [name for name in rows[0] if "device_seconds" in name or "workers" in name]
        assert not extra, f"workers = {workers}: columns {extra}"
