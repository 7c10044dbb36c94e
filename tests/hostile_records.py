"""Records that no sweep should write: `DEGENERATE` are still read, `REFUSED` are not."""

import json

from analysis_records import epoch_lines, run_line, search_lines, sweep_line, synthetic, with_run, write

LONG = "arm-" + "x" * 5000
SPECIALS = r'\&%$#_{}~^|*`[]<>"' + "'"


def every(change, lines=None):
    """The synthetic sweep with every record changed."""
    return [change(dict(line)) for line in lines or synthetic(3)]


def renamed(name, lines=None):
    return every(lambda line: line | {"arm": name} if line.get("arm") == "ldb" else line, lines)


def with_unknown(line):
    """Every number that may be null is null, NaN where JSON is stretched."""
    whole = ("attempt", "seed", "epoch", "schema_version", "search_trials", "measure_cells")
    return {k: float("nan") if isinstance(v, float) else None if _is_count(k, v, whole) else v for k, v in line.items()}


def _is_count(key, value, whole):
    return isinstance(value, int) and not isinstance(value, bool) and key not in whole


DEGENERATE = {
    "all failed": with_run(synthetic(3), lambda r: True, status="failed", reason="out of memory", val_accuracy=None),
    "one seed": synthetic(1),
    "one run": [run_line()],
    "constant accuracy": with_run(synthetic(3), lambda r: True, val_accuracy=0.5, test_accuracy=0.5),
    "all unknown": every(with_unknown),
    "infinite times": with_run(synthetic(3), lambda r: r["arm"] == "ldb", train_seconds=float("inf")),
    "all times infinite": with_run(synthetic(3), lambda r: True, train_seconds=float("inf")),
    "huge times": with_run(synthetic(3), lambda r: r["arm"] == "ldb", train_seconds=1e14),
    "absurd times": with_run(synthetic(3), lambda r: r["arm"] == "ldb", train_seconds=1e300),
    "a number of 400 digits": with_run(synthetic(3), lambda r: r["arm"] == "ldb", flops_executed=10**400),
    "tiny times": with_run(synthetic(3), lambda r: r["arm"] == "ldb", train_seconds=5e-324),
    "zero times": with_run(synthetic(3), lambda r: True, train_seconds=0.0),
    "unicode": renamed("模型 é😀\u202egnirts\u2028"),
    "half a character": renamed("\ud83d and \x00 and \x1b[31m"),
    "empty name": renamed(""),
    "blank name": renamed(" "),
    "very long name": renamed(LONG),
    "special characters": renamed(SPECIALS),
    "long task": every(lambda r: r | {"task": {"data": LONG, "model": SPECIALS}} if r["kind"] == "run" else r),
    "odd settings": every(lambda r: r | {"method": {"method": None, "inner": [1], "a.b": {}}} if "method" in r else r),
    "odd recipes": every(lambda r: r | {"recipe": {"epochs": "many", "": {"": [None]}}} if "recipe" in r else r),
    "duplicated lines": [line for line in synthetic(3) for _ in range(2)],
    "runs without epochs": [line for line in synthetic(3) if line["kind"] != "epoch"],
    "epochs without accuracy": every(lambda r: r | {"val_accuracy": None} if r["kind"] == "epoch" else r),
    "equal times of epochs": every(lambda r: r | {"train_seconds": 1.0} if r["kind"] == "epoch" else r),
    "times that fall": every(lambda r: r | {"train_seconds": 9.0 - r["epoch"]} if r["kind"] == "epoch" else r),
    "unknown columns": every(lambda r: r | {"new": {"a": [1]}}),
    "no sweep record": [line for line in synthetic(3) if line["kind"] != "sweep"],
    "a sweep that planned nothing": [sweep_line(arms=None, seeds=None, targets=None), *synthetic(3)[1:]],
    "seeds far apart": with_run(synthetic(3), lambda r: r["seed"] == 2, seed=2**53),
    "negative seeds": every(lambda r: r | {"seed": -r["seed"]} if r["kind"] == "run" else r),
    "only search": search_lines(),
    "only running": [run_line(status="running")],
    "odd devices": every(lambda r: r | {"device": {"name": 7, "threads": []}} if "device" in r else r),
}


REFUSED = {
    "an empty file": ("", "no run in the records"),
    "blank lines": ("\n \n\t\n", "no run in the records"),
    "only a sweep": ([sweep_line()], "no run in the records"),
    "only epochs": (epoch_lines(run_line()), "no run in the records"),
    "a negative time": (
        [run_line(), run_line(seed=1, train_seconds=-0.5)],
        ":2: train_seconds is -0.5, expected a time",
    ),
    "a negative time of an epoch": (
        [run_line(), *[e | {"train_seconds": -1} for e in epoch_lines(run_line())]],
        ":2: train_seconds is -1, expected a time",
    ),
    "text for a number": ([run_line(val_accuracy="0.9")], ":1: val_accuracy is '0.9', expected a number"),
    "text for an epoch's number": (
        [run_line(), epoch_lines(run_line())[0] | {"train_seconds": "1"}],
        ":2: train_seconds is '1', expected a number",
    ),
    "a list for a number": ([run_line(train_seconds=[1])], r":1: train_seconds is [1], expected a number"),
    "an epoch without key": ([run_line(), epoch_lines(run_line())[0] | {"run_key": None}], ":2: run_key is None"),
    "a number for a name": ([run_line(arm=7)], ":1: arm is 7, expected str"),
    "an attempt beyond all numbers": ([run_line(attempt=1e300)], ":1: attempt is 1e+300, expected a whole number"),
    "a seed of 400 digits": ([run_line(seed=10**400, run_key="k")], ":1: seed is inf, expected a whole number"),
    "settings nested a thousand deep": (
        [json.dumps(run_line()).replace('"recipe": {', '"recipe": {"a": ' + "[" * 500 + "]" * 500 + ",") + "\n"],
        ":1: recipe is nested more than 30 deep",
    ),
    "two records on one line": (
        [json.dumps(run_line()) + "," + json.dumps(run_line(seed=1)) + "\n", run_line(seed=2)],
        ":1: not a line of JSON",
    ),
    "bytes that are no text": (b'{"kind": "run"\xff}\n{}\n', ":1: not a line of JSON"),
    "an image": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), ":1: not a line of JSON"),
    "a damaged gzip": (b"\x1f\x8b\x08\x00 not gzip at all", "the compressed file is damaged"),
    "targets in percent": ([sweep_line(targets=[90.0]), run_line()], ":1: targets has 90.0, expected fractions"),
    "a plan of -1 trials": ([sweep_line(search_trials=-1), run_line()], ":1: search_trials is -1"),
    "a newer schema": ([run_line(schema_version=7)], "schema_version is 7, but this version"),
    "no schema": ([run_line(schema_version=None)], ":1: schema_version is None, expected a whole number"),
    "another program's JSON": (['{"a": 1}\n'], ":1: record of kind None; expected run, epoch or sweep"),
    "a kind that is no name": ([run_line(kind=[])], ":1: record of kind []"),
}


def degenerate_file(path, case):
    """The records of a degenerate case as a file."""
    return write(path, [json.dumps(line) + "\n" for line in DEGENERATE[case]])


def refused_file(path, case):
    """The content of a refused case as a file, and the part of the message that says why."""
    content, message = REFUSED[case]
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(path, content)
    return path, message
