"""What a sweep reads back from its records: which results hold, and which runs run again."""

from dataclasses import replace

import pytest

from fastbp.record import RunRecord
from sweeps.ledger import Ledger

DEVICE = {"type": "cpu", "name": "Test CPU"}


def ended(key, **changes):
    record = RunRecord(run_key=key, phase="measure", status="finished", exclusive=True, device=dict(DEVICE))
    return replace(record, **changes)


def test_contaminated_are_the_finished_measured_runs_that_were_not_alone():
    ledger = Ledger.of(
        [
            ended("alone"),
            ended("shared", exclusive=False),
            ended("ablated", exclusive=False, phase="ablate"),
            ended("searched", exclusive=False, phase="search"),
            ended("diverged", exclusive=False, status="diverged"),
        ]
    )
    assert [record.run_key for record in ledger.contaminated] == ["shared", "ablated"]
    assert ledger.spoiled == {"alone", "shared", "ablated", "diverged"}, "one block each, but for the search"
    assert all(ledger.done(key) for key in ledger.runs), "none of them runs again unasked"


def test_a_block_is_measured_again_as_a_whole():
    runs = [ended("a", block=0), ended("b", block=0, exclusive=False), ended("c", block=1), ended("d", block=0)]
    ledger = Ledger.of([*runs[:3], replace(runs[3], status="failed"), ended("e", block=0, phase="ablate")])
    assert ledger.spoiled == {"a", "b"}, "what failed runs again anyway"


@pytest.mark.parametrize(("status", "done"), [("running", False), ("failed", False), ("finished", True)])
def test_a_run_that_is_measured_again_is_done_when_it_has_a_result(status, done):
    ledger = Ledger.of([ended("shared", exclusive=False), ended("alone")])
    ledger.again = {"shared"}
    assert ledger.done("shared") is None
    assert ledger.done("alone") is not None
    second = ended("shared", attempt=1, status=status)
    ledger.add(second)
    assert (ledger.done("shared") is second) == done
    assert (Ledger.of([ended("shared", exclusive=False), second]).done("shared") is not None) == done, (
        "the next start leaves it as it is"
    )
    assert ledger.attempts["shared"] == 2


def test_runs_that_are_equal_there_share_task_device_and_software():
    ledger = Ledger.of([ended("a"), ended("b"), ended("c", device=DEVICE | {"name": "another"})])
    a, b, c = (ledger.runs[key].device for key in "abc")
    assert a is b
    assert c["name"] == "another"
