"""The samplers of a search: every argument given, so that a new default of Optuna's changes no search."""

from __future__ import annotations

import itertools
import json
import math
import random
import warnings
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from fastbp.knobs import Choice, Domain, IntRange, LogUniform

optuna.logging.set_verbosity(optuna.logging.WARNING)

LEARNING = ("tpe", "nsga2")  # propose by what they were told; the others' lists are fixed beforehand
Settings = list[dict[str, Any]]  # encoded values by path


def arguments(name: str, trials: int) -> dict[str, Any]:
    """Class and arguments of a sampler but for its seed, JSON-able."""
    startup = max(2, min(10, trials // 3))
    return {
        "tpe": {
            "class": "TPESampler",
            "n_startup_trials": startup,
            "n_ei_candidates": 24,
            "multivariate": True,
            "group": False,
            "constant_liar": True,
        },
        "nsga2": {
            "class": "NSGAIISampler",
            "population_size": max(2, min(50, trials // 4)),
            "mutation": None,
            "mutation_prob": None,
            "crossover": None,
            "crossover_prob": 0.9,
            "swapping_prob": 0.5,
            "elite_population_selection_strategy": None,
            "child_generation_strategy": None,
            "after_trial_strategy": None,
        },
        "qmc": {
            "class": "QMCSampler",
            "qmc_type": "sobol",
            "scramble": True,
            "warn_asynchronous_seeding": False,
            "warn_independent_sampling": False,
        },
        "random": {"class": "RandomSampler"},
        "grid": {"class": "grid"},
    }[name]


def describe(name: str, trials: int) -> dict[str, Any]:
    """What to log of a sampler: its version and arguments."""
    return {"optuna": optuna.__version__, **arguments(name, trials)}


def make_sampler(name: str, trials: int, seed: int) -> optuna.samplers.BaseSampler:
    given = arguments(name, trials)
    kind = given.pop("class")
    if name == "grid":
        return optuna.samplers.RandomSampler(seed=seed)  # never asked: every point is enqueued
    if name == "qmc":
        given["independent_sampler"] = optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return getattr(optuna.samplers, kind)(**given, seed=seed)


def generation_attrs(name: str, trials: int, complete: int) -> dict[str, int]:
    """System attributes with which NSGA-II knows the generation of a trial that it is told after a restart.

    Args:
        complete: how many trials ran their full budget before this one.
    """
    if name != "nsga2":
        return {}
    return {"NSGAIISampler:generation": complete // arguments(name, trials)["population_size"]}


def fixed_settings(name: str, space: dict[str, Domain], trials: int, seed: int) -> Settings:
    """All settings that a random, qmc or grid search will try, in order; empty for one that learns.

    Made in one go, so that neither a failure nor the order of the results can change them: Optuna's own QMCSampler
    leaves its sequence while no trial has succeeded.
    """
    if name in LEARNING or not space:
        return []
    if name == "grid":
        return _grid(space, trials, seed)
    distributions = {path: distribution(domain) for path, domain in space.items()}
    study = optuna.create_study(sampler=make_sampler(name, trials, seed), pruner=optuna.pruners.NopPruner())
    if name == "qmc":  # a first trial tells it the space; otherwise its first point is a random one
        low = {path: _points(domain, 2)[0] for path, domain in space.items()}
        known = optuna.trial.create_trial(state=TrialState.COMPLETE, value=0.0, params=low, distributions=distributions)
        study.add_trial(known)
    return [study.ask(distributions).params for _ in range(trials)]


def space_size(space: dict[str, Domain]) -> float:
    """How many different settings there are; infinite with a real number among them."""
    sizes = {Choice: lambda d: len(d.values), IntRange: lambda d: d.high - d.low + 1}
    return math.prod(sizes.get(type(domain), lambda d: math.inf)(domain) for domain in space.values())


def every_setting(space: dict[str, Domain]) -> Settings:
    """All settings of a space without real numbers, encoded."""
    values = [
        _points(domain, 2) if isinstance(domain, Choice) else list(range(domain.low, domain.high + 1))  # type: ignore[arg-type]
        for domain in space.values()
    ]
    return [dict(zip(space, setting, strict=True)) for setting in itertools.product(*values)]


def _grid(space: dict[str, Domain], trials: int, seed: int) -> Settings:
    """Evenly spaced points of every range, as many as the budget allows, times all values of every choice.

    At most `trials` settings, in random order, so that a grid that is cut short by the budget has no blank corner.
    """
    ranges = [path for path, domain in space.items() if not isinstance(domain, Choice)]
    choices = math.prod(len(d.values) for d in space.values() if isinstance(d, Choice))
    points = max(2, int((trials / choices) ** (1 / len(ranges)) + 1e-9)) if ranges else 0
    axes = [_points(domain, points) for domain in space.values()]
    settings = [dict(zip(space, values, strict=True)) for values in itertools.product(*axes)]
    random.Random(seed).shuffle(settings)
    return settings[:trials]


def _points(domain: Domain, n: int) -> list[Any]:
    if isinstance(domain, Choice):
        return [encode(domain, value) for value in domain.values]
    low, high = float(domain.low), float(domain.high)
    if isinstance(domain, LogUniform):
        inner = [low * (high / low) ** (i / (n - 1)) for i in range(1, n - 1)]
    else:
        inner = [low + (high - low) * i / (n - 1) for i in range(1, n - 1)]
    if isinstance(domain, IntRange):
        return sorted({domain.low, *(round(x) for x in inner), domain.high})
    return [low, *inner, high]


def distribution(domain: Domain) -> BaseDistribution:
    if isinstance(domain, Choice):
        return CategoricalDistribution([encode(domain, value) for value in domain.values])
    if isinstance(domain, IntRange):
        return IntDistribution(domain.low, domain.high)
    return FloatDistribution(domain.low, domain.high, log=isinstance(domain, LogUniform))


def encode(domain: Domain, value: Any) -> Any:
    """Optuna takes no lists as choices: choices travel as JSON text."""
    return json.dumps(value) if isinstance(domain, Choice) else value


def decode(domain: Domain, value: Any) -> Any:
    if not isinstance(domain, Choice):
        return value
    return next(candidate for candidate in domain.values if json.dumps(candidate) == value)
