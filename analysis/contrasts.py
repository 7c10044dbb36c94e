"""Main effects and two-factor interactions of a factorial design by least squares on its coded matrix.

A factor with k levels has k - 1 columns in sum coding: its first level is -1 in all of them, each other level 1 in
its own; with two levels that is the usual -1, +1. An effect is a contrast of the coefficients: that of a two-level
factor is twice its coefficient, an interaction four times, the difference of two differences.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Step = tuple[int, int]  # a factor and one of its levels, against the factor's first


@dataclass(frozen=True, eq=False)
class Model:
    """Intercept, main effects and two-factor interactions.

    Attributes:
        matrix: (cells, columns) of distinct columns.
        effects: the steps of an effect, one for a main effect and two for an interaction, to its contrast (columns,).
        aliases: the first of several effects that the design cannot tell apart, to the others.
    """

    matrix: NDArray[np.float64]
    effects: dict[tuple[Step, ...], NDArray[np.float64]]
    aliases: dict[tuple[Step, ...], list[tuple[Step, ...]]]


def sum_coding(levels: int) -> NDArray[np.float64]:
    """(levels, levels - 1) code of each level.

    >>> sum_coding(2).tolist(), sum_coding(3).tolist()
    ([[-1.0], [1.0]], [[-1.0, -1.0], [1.0, 0.0], [0.0, 1.0]])
    """
    return np.vstack([-np.ones(levels - 1), np.eye(levels - 1)])


def model(cells: NDArray[np.int_], levels: Sequence[int]) -> Model:
    """The model of a planned design.

    Args:
        cells: (cells, factors) number of each factor's level.
        levels: how many levels each factor has.
    """
    codes = [sum_coding(count) for count in levels]
    columns = [np.ones(len(cells))]
    places: dict[tuple[Step, ...], list[tuple[int, float]]] = {}
    aliases: dict[tuple[Step, ...], list[tuple[Step, ...]]] = {}
    first: dict[int, tuple[Step, ...]] = {}  # column to the effect that brought it
    factors = range(len(levels))
    for chosen in [*itertools.combinations(factors, 1), *itertools.combinations(factors, 2)]:
        found = []
        for at in itertools.product(*(range(levels[f] - 1) for f in chosen)):
            column = np.prod([codes[f][cells[:, f], j] for f, j in zip(chosen, at, strict=True)], axis=0)
            same = next((i for i, other in enumerate(columns) if np.array_equal(column, other)), len(columns))
            if same == len(columns):
                columns.append(column)
            found.append(same)
        for steps in itertools.product(*(range(1, levels[f]) for f in chosen)):
            name = tuple(zip(chosen, steps, strict=True))
            weights = np.ones(1)
            for f, level in name:
                weights = np.kron(weights, codes[f][level] - codes[f][0])
            if len(found) == 1 and found[0] in first:
                aliases.setdefault(first[found[0]], []).append(name)
            elif found != [0]:
                first[found[0]] = name
                places[name] = list(zip(found, weights, strict=True))
    matrix = np.column_stack(columns)
    effects = {}
    for name, terms in places.items():
        effects[name] = np.zeros(matrix.shape[1])
        for column, weight in terms:
            effects[name][column] += weight
    return Model(matrix, effects, aliases)


def estimates(made: Model, outcomes: NDArray[np.float64]) -> dict[tuple[Step, ...], NDArray[np.float64]]:
    """Every effect within each seed; NaN where the cells that the seed has do not determine it.

    Args:
        outcomes: (cells, seeds), NaN where a run is missing.

    Returns:
        the steps of an effect to its (seeds,) estimates.
    """
    out = {name: np.full(outcomes.shape[1], np.nan) for name in made.effects}
    solved: dict[bytes, tuple[NDArray[Any], NDArray[Any]]] = {}
    for seed in range(outcomes.shape[1]):
        known = np.isfinite(outcomes[:, seed])
        if known.tobytes() not in solved:
            inverse = np.linalg.pinv(made.matrix[known]) if known.any() else np.zeros((made.matrix.shape[1], 0))
            solved[known.tobytes()] = inverse, inverse @ made.matrix[known]
        inverse, resolved = solved[known.tobytes()]
        fit = inverse @ outcomes[known, seed]
        for name, contrast in made.effects.items():
            if np.allclose(contrast @ resolved, contrast, atol=1e-8):
                out[name][seed] = contrast @ fit
    return out
