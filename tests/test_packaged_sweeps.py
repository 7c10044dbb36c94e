"""The sweep files that come with the package: every cell is legal, and controls share their arm's plan."""

import contextlib
import random
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest

from sweeps.estimate import middle
from sweeps.plan import load_plan

FILES = sorted(path.stem for path in (Path(__file__).parents[1] / "sweeps").glob("*.yaml"))


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """Every packaged sweep, on a small image folder where it wants CIFAR-10, and a small text."""
    image = pytest.importorskip("PIL.Image")
    folder, noise = tmp_path_factory.mktemp("packaged"), random.Random(0)
    for part in ("train", "test"):
        for label in "abc":
            place = folder / "data" / "cifar10" / part / label
            place.mkdir(parents=True)
            for i in range(20):
                image.frombytes("RGB", (32, 32), noise.randbytes(32 * 32 * 3)).save(place / f"{i}.png")
    (folder / "data" / "tinyshakespeare.txt").write_text("a bird in the hand, " * 100, encoding="utf-8")
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTBP_DATA", str(folder))
        yield {name: load_plan(name) for name in FILES}


def test_every_packaged_sweep_is_legal_and_named_after_its_file(plans):
    assert {"drop_rates", "decorrelation_strengths", "module_splits", "quickstart"} <= set(plans)
    assert [plan.sweep.name for plan in plans.values()] == FILES


def cells(plan):
    """Arm to its measured cell and control, at the middle of the searched ranges."""
    return {arm.name: plan.cells(arm, middle(arm)) for arm in plan.arms if not arm.plain}


def crossed(plan, *names):
    """The levels of the cells of the sweep's one ablation."""
    (ablation,) = plan.ablations()
    assert tuple(ablation.factors) == names
    return {tuple(cell.levels[name] for name in names) for cell in ablation.cells if cell.levels}


def test_drop_rates_sets_every_cell_beside_the_same_plan_without_a_mask(plans):
    plan = plans["drop_rates"]
    measured = cells(plan)
    assert {arm.method.unit for arm in plan.arms if not arm.plain} == {"tensor", "layer", "block", "prefix"}
    searched = {path.partition(".")[2] for arm in plan.arms for path in arm.space}
    assert searched == {"lr", "drop_rate", "lr_policy", "batch_scale"}
    for name, (cell, control) in measured.items():
        assert cell.method.mask, f"{name}: the arm itself has no mask"
        assert control.method == replace(cell.method, mask=False), f"{name}: the control has another plan"
        assert control.recipe == cell.recipe
    levels = crossed(plan, "method.mask", "method.drop_rate", "method.lr_policy", "method.batch_scale")
    assert levels == set(product((False, True), (0.25, 0.5), ("none", "inverse"), (1.0, 2.0)))


def test_decorrelation_strengths_crosses_every_two_of_its_settings(plans):
    plan = plans["decorrelation_strengths"]
    searched = {path.partition(".")[2] for arm in plan.arms for path in arm.space}
    assert searched == {"lr", "decor_lr", "kappa", "sample_fraction", "interval"}
    for name, (cell, control) in cells(plan).items():
        assert control.method == replace(cell.method, decor_lr=0.0), name
    settings = ("method.decor_lr", "method.kappa", "method.sample_fraction", "method.interval", "recipe.lr")
    levels = crossed(plan, *settings)
    assert len(levels) == 16, "half of all"
    for i, j in combinations(range(5), 2):
        assert len({(cell[i], cell[j]) for cell in levels}) == 4, f"{settings[i]} is not crossed with {settings[j]}"


HIGHWAY = ["highway_iterations", "highway_iterations_gpt", "highway_iterations_gru"]


@pytest.mark.parametrize("name", HIGHWAY)
def test_highway_iterations_cross_rounds_with_gamma_up_to_fixed_point_iteration(plans, name):
    plan = plans[name]
    assert any(arm.plain for arm in plan.arms)
    doses = crossed(plan, "method.iterations", "method.gamma")
    rounds, gammas = ({dose[i] for dose in doses} for i in (0, 1))
    assert doses == {(k, gamma) for k in rounds for gamma in gammas}
    assert {0, 1} < rounds, rounds
    assert {0.0, 1.0} <= gammas, gammas
    assert {path.partition(".")[2] for arm in plan.arms for path in arm.space} == {"lr"}


def test_highway_iterations_beside_schedules(plans):
    arms = {arm.name: arm.method for name in HIGHWAY[:2] for arm in plans[name].arms}
    assert (arms["growing"].growing_epochs, arms["growing"].exact_from) == (3, 4)
    assert arms["adaptive"].tolerance > 0
    assert arms["rising"].gamma_epochs == 4
    assert arms["min-residual"].combination == "min_residual"


@pytest.mark.parametrize("name", ["drop_rates", "decorrelation_strengths", "module_splits", *HIGHWAY])
def test_gpu_resources_are_said_in_a_comment(name):
    text = (Path(__file__).parents[1] / "sweeps" / f"{name}.yaml").read_text(encoding="utf-8")
    assert "With GPUs: search {gpus: 0.25}, measure {gpus: 1}" in text
    assert max(map(len, text.splitlines())) <= 130
