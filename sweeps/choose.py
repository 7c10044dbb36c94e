"""Which settings of a searched arm are measured: the most accurate one, then others off the trade-off's front."""

from __future__ import annotations

from collections.abc import Iterable

from fastbp.record import RunRecord


def chosen_trials(trials: Iterable[RunRecord], most: int) -> list[RunRecord]:
    """The trials whose settings are to be measured, at most `most`, the most accurate first.

    Each further one adds the largest area to what those before it dominate in (validation accuracy, FLOPs), from
    accuracy 0 and the dearest trial's FLOPs; so every one is on the front of the finished trials. Trials that did
    not finish, or whose FLOPs are unknown, are no candidates for a further one.
    """
    finished = [r for r in trials if r.status == "finished" and r.val_accuracy is not None]
    first = min(finished, key=lambda r: (-_accuracy(r), *_ties(r, most)), default=None)
    chosen = [] if first is None else [first]
    candidates = [r for r in finished if r.flops_executed is not None]
    limit = max((_flops(r) for r in candidates), default=0.0)
    while chosen and len(chosen) < most:
        before = dominated_area(chosen, limit)
        gains = [(dominated_area([*chosen, r], limit) - before, r) for r in candidates]
        gain, best = max(gains, key=lambda pair: pair[0], default=(0.0, None))
        if best is None or gain <= 1e-12 * limit:
            break
        chosen.append(best)
    return chosen


def dominated_area(trials: list[RunRecord], limit: float) -> float:
    """Area between accuracy 0 and the best accuracy to be had for at most so many FLOPs, up to `limit` FLOPs."""
    points = sorted((_flops(r), _accuracy(r)) for r in trials if r.flops_executed is not None)
    area, best = 0.0, 0.0
    for (flops, accuracy), (following, _) in zip(points, [*points[1:], (limit, 0.0)], strict=True):
        best = max(best, accuracy)
        area += best * (following - flops)
    return area


def _ties(record: RunRecord, most: int) -> tuple[float, ...]:
    """Equal accuracies: fewer examples first, where costs count the cheaper; then the earlier trial."""
    return (record.examples, _flops(record)) if most > 1 else (record.examples,)


def _accuracy(record: RunRecord) -> float:
    return record.val_accuracy or 0.0


def _flops(record: RunRecord) -> float:
    return record.flops_executed or 0.0
