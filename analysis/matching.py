"""Which arm of one sweep is which arm of another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from analysis import labels
from analysis.load import Results
from analysis.measured import Arm, Group, measured_groups


@dataclass(frozen=True, eq=False)
class Place:
    """An arm and where it was measured; `task` and `title` are those of its group.

    Attributes:
        part: `measure` or `ablate`, the part of the sweep whose run or cell it is.
    """

    arm: Arm
    group: Group
    task: str
    title: str
    part: str = "measure"

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.task, self.part, self.arm.arm, self.arm.role


def places(results: Results) -> list[Place]:
    """All arms that were measured and all cells of ablations, of every task and kind of hardware."""
    out = []
    for group in measured_groups(results, allow_mixed=True):
        for part, own in (("measure", group), ("ablate", group.ablated)):
            title, task = labels.task_label(group.task, full=True), labels.canonical(group.task)
            out += [Place(arm, own, task, title, part) for arm in own.arms] if own else []
    return out


def matched(
    first: Sequence[Place], second: Sequence[Place]
) -> tuple[list[tuple[Place, Place]], list[tuple[str, Place]]]:
    """Arms of equal task, part, name and role; of several the most alike first: hardware, settings, then order.

    Returns:
        The pairs, and what is left as ("A" or "B", arm).
    """
    pairs: list[tuple[Place, Place]] = []
    left, right = list(first), list(second)
    for alike in (_same_everything, _same_settings, _same_hardware, lambda a, b: a.key == b.key):
        for a in list(left):
            b = next((b for b in right if alike(a, b)), None)
            if b is not None:
                pairs.append((a, b))
                left.remove(a)
                right.remove(b)
    order = {id(place): i for i, place in enumerate(first)}
    pairs.sort(key=lambda pair: order[id(pair[0])])
    return pairs, [*(("A", p) for p in left), *(("B", p) for p in right)]


def _same_hardware(a: Place, b: Place) -> bool:
    return a.key == b.key and a.group.hardware == b.group.hardware


def _same_settings(a: Place, b: Place) -> bool:
    return a.key == b.key and labels.canonical(a.arm.values) == labels.canonical(b.arm.values)


def _same_everything(a: Place, b: Place) -> bool:
    return _same_hardware(a, b) and _same_settings(a, b)
