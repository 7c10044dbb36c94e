"""Whatever the records say, as long as each line is a record, the report is made and has no raw unknowns."""

import json
import random
import re

import pytest

from analysis_records import TASK, bp, dbp, epoch_lines, ldb, report_of, run_line, sweep_line

METHODS = [("bp", "baseline", bp()), ("ldb", "method", ldb()), ("ldb", "control", ldb(0.0)), ("dbp", "method", dbp())]
METHODS += [("both", "method", dbp() | {"inner": ldb()}), ("ldb", "method", ldb(0.9))]


def odd_sweep(case):
    """Runs of which a part is missing, unfinished, constant, timeless, or without accuracy."""
    chance = random.Random(case)
    chosen = chance.sample(METHODS, chance.randint(1, len(METHODS)))
    lines = [sweep_line(targets=chance.choice([[], [0.5], [0.2, 1.0]]))]
    spread = chance.choice([0.0, 0.01, 1.0])
    for data in ("digits", "cifar10")[: chance.randint(1, 2)]:
        for seed in range(chance.randint(1, 5)):
            for arm, role, method in chosen:
                if chance.random() < 0.1:
                    continue
                accuracy = min(max(chance.gauss(0.7, spread), 0.0), 1.0)
                if chance.random() < 0.1:
                    accuracy = None
                status = chance.choice(["finished"] * 8 + ["failed", "diverged", "stopped", "running"])
                run = run_line(
                    arm=arm, role=role, method=method, seed=seed, status=status, task=TASK | {"data": data},
                    phase=chance.choice(["measure"] * 5 + ["search"]), val_accuracy=accuracy, test_accuracy=accuracy,
                    train_seconds=chance.choice([None, 0.0, 1e-9, 1e9] + [10 * (1 + spread * chance.random())] * 12),
                    steps=chance.choice([None, 64, 64]), exclusive=chance.random() < 0.9,
                )  # fmt: skip
                lines += [*(epoch_lines(run) if chance.random() < 0.9 else []), run]
    return [*lines, run_line(seed=99)] if len(lines) == 1 else lines


@pytest.mark.parametrize("case", [*range(8), *(pytest.param(i, marks=pytest.mark.long) for i in range(8, 20))])
def test_odd_records_make_a_report(tmp_path, case):
    contents = report_of(tmp_path, odd_sweep(case))
    text = contents["report.md"].decode()
    found = re.search(r"\bnan\b|\binf\b|\bNone\b", text)
    assert not found, f"a raw unknown in the text: {text[max(found.start() - 80, 0) : found.end() + 40]!r}"
    for name, content in contents.items():
        if name.endswith(".json"):
            json.loads(content)
