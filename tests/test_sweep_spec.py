"""Sweep files: what is refused, at which line, in which words; and that refusing needs no Ray."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from fastbp import DDG, Backprop, DecorrelatedBP, LayerDropBack
from fastbp.knobs import Choice, IntRange, LogUniform, Uniform
from sweeps.plan import load_plan
from sweeps.source import SweepError
from sweeps.spec import Sweep

GOOD = """\
name: toy
task: {data: digits, model: mlp, model_args: {depth: 4, width: 8}}
recipe:
  epochs: 1
  lr: 0.1
arms:
  bp: {method: bp}
  ldb:
    method: ldb
    drop_rate: search
  both:
    method: dbp
    decor_lr: {log_uniform: [1e-5, 1e-2]}
    inner: {method: ldb, drop_rate: {uniform: [0.2, 0.4]}, every_epochs: {choice: [2, 3]}}
    recipe: {lr: search, momentum: 0.5}
search: {trials: 2, epochs: 1}
measure: {seeds: [0, 1]}
"""


def plan_of(tmp_path, text):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    return load_plan(str(file))


def errors_of(tmp_path, text):
    with pytest.raises(SweepError) as caught:
        plan_of(tmp_path, text)
    lines = str(caught.value).splitlines()
    prefix = f"{tmp_path / 'my.yaml'}:"
    assert all(line.startswith(prefix) for line in lines), f"a line without file: {lines}"
    return [line.removeprefix(prefix) for line in lines]


def test_a_good_file_becomes_arms_with_their_search_spaces(tmp_path):
    bp, ldb, both = plan_of(tmp_path, GOOD).arms
    assert bp.method == Backprop(), f"bp is {bp.method}"
    assert bp.space == {}, f"bp searches {bp.space}"
    assert ldb.space == {"method.drop_rate": Uniform(0.1, 0.9)}, f"`search` gave {ldb.space}"
    assert both.space == {
        "method.decor_lr": LogUniform(1e-5, 1e-2),
        "method.inner.drop_rate": Uniform(0.2, 0.4),
        "method.inner.every_epochs": Choice((2, 3)),
        "recipe.lr": LogUniform(1e-3, 1.0),
    }, f"combination searches {both.space}"
    assert both.recipe.momentum == 0.5, f"arm's own recipe field is {both.recipe.momentum}"
    assert ldb.recipe.momentum == 0.9, f"it leaked into another arm: {ldb.recipe.momentum}"
    method, recipe = both.at(
        {"method.inner.drop_rate": 0.3, "method.decor_lr": 1e-3, "method.inner.every_epochs": 3, "recipe.lr": 0.7}
    )
    assert method == DecorrelatedBP(decor_lr=1e-3, inner=LayerDropBack(drop_rate=0.3, every_epochs=3))
    assert recipe.lr == 0.7, f"lr is {recipe.lr}"
    values = both.values_of(method.to_dict(), recipe.to_dict())
    assert both.at(values) == (method, recipe), f"values_of is no inverse of at: {values}"


def test_a_recipe_level_search_is_for_every_arm_and_an_arm_can_fix_it(tmp_path):
    plan = plan_of(tmp_path, GOOD.replace("lr: 0.1", "lr: search").replace("lr: search, mom", "lr: 0.3, mom"))
    spaces = {arm.name: "recipe.lr" in arm.space for arm in plan.arms}
    assert spaces == {"bp": True, "ldb": True, "both": False}, f"lr is searched by {spaces}"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "drop_rate: search\n",
            "drop_rat: search\n",
            ["10: unknown key 'drop_rat' in arms.ldb; did you mean drop_rate?"],
        ),
        (
            "trials: 2",
            "trails: 2",
            ["16: missing key 'trials' in search", "16: unknown key 'trails' in search; did you mean trials?"],
        ),
        ("\nmeasure:", "\nmesure:", ["17: unknown key 'mesure' in the sweep; did you mean measure?"]),
        ("  lr: 0.1", "  lr: -0.1", ["5: recipe: Recipe.lr = -0.1: must be positive"]),
        ("  lr: 0.1", "  lr: fast", ["5: recipe: Recipe.lr = 'fast': expected a number"]),
        ("method: ldb\n", "method: lbd\n", ["9: arms.ldb.method: no method 'lbd'; did you mean ldb?"]),
        (
            "uniform: [0.2, 0.4]",
            "uniform: [0.4, 0.2]",
            ["14: arms.both.inner.drop_rate: uniform: [0.4, 0.2] needs low < high"],
        ),
        (
            "uniform: [0.2, 0.4]",
            "uniforn: [0.2, 0.4]",
            ["14: arms.both.inner.drop_rate: {'uniforn': [0.2, 0.4]} is no search"],
        ),
        (
            "uniform: [0.2, 0.4]",
            "uniform: [0.2, 1.4]",
            ["14: arms.both.inner.drop_rate: LayerDropBack.drop_rate = 1.4"],
        ),
        ("seeds: [0, 1]", "seeds: [0, 0]", ["17: measure: seeds must be distinct"]),
        ("bp: {method: bp}", "bp: {method: ldb}", ["6: no arm is plain backprop"]),
        ("model: mlp", "model: mpl", ["no model 'mpl'"]),
        ("search: {trials: 2, epochs: 1}", "", ["arm both searches method.decor_lr"]),
        ("  lr: 0.1", "  lr: 0.1\n  lr: 0.2", ["6: key 'lr' again; it is already on line 5"]),
        ("seeds: [0, 1]", "seeds: [0, 1", ["not YAML"]),
        (
            "name: toy",
            "mlflow: {tracking_uri: 'http://u:p@h'}\nname: toy",
            ["1: mlflow: tracking_uri holds a password"],
        ),
        ("name: toy", "name: a/b", ["1: name = 'a/b'"]),
    ],
)
def test_a_bad_file_is_refused_with_line_key_and_fix(tmp_path, old, new, expected):
    assert old in GOOD, f"the test replaces nothing: {old!r}"
    found = errors_of(tmp_path, GOOD.replace(old, new))
    for part in expected:
        assert any(part in line for line in found), f"expected {part!r} in {found}"


def test_all_problems_are_listed_in_the_order_of_the_file(tmp_path):
    text = GOOD.replace("drop_rate: search\n", "drop_rat: search\n").replace("momentum: 0.5", "momentum: 5")
    found = errors_of(tmp_path, text)
    assert [line.split(":")[0] for line in found] == ["10", "15"], f"found {found}"


def test_a_range_whose_end_the_model_cannot_bind_is_refused(tmp_path):
    text = GOOD.replace("  both:", "  ddg: {method: ddg, modules: {int: [2, 99]}}\n  both:")
    found = errors_of(tmp_path, text)
    assert len(found) == 1, f"found {found}"
    assert "arm ddg at method.modules = 99" in found[0], f"found {found}"


def test_small_floats_without_a_dot_are_numbers(tmp_path):
    text = GOOD.replace("lr: 0.1", "lr: 1e-1\n  weight_decay: 5e-4")
    recipe = plan_of(tmp_path, text).arms[0].recipe
    assert (recipe.lr, recipe.weight_decay) == (0.1, 5e-4), f"read as {recipe}"


def test_an_integer_range_and_a_positional_method_name(tmp_path):
    text = GOOD.replace("  both:", "  ddg: {method: ddg, modules: {int: [1, 3]}}\n  both:")
    arm = next(arm for arm in plan_of(tmp_path, text).arms if arm.name == "ddg")
    assert arm.space == {"method.modules": IntRange(1, 3)}, f"space is {arm.space}"
    assert arm.method == DDG(), f"method is {arm.method}"


def test_where_it_is_stored_does_not_change_the_hash_what_is_trained_does(tmp_path):
    plain = plan_of(tmp_path, GOOD).sweep.hash
    stored = plan_of(tmp_path, GOOD + "mlflow: {experiment: other}\nmax_failures: 3\n").sweep.hash
    assert stored == plain, "the hash depends on where results are stored"
    assert plan_of(tmp_path, GOOD.replace("lr: 0.1", "lr: 0.2")).sweep.hash != plain, "the hash misses the recipe"

    class Newer(Sweep):
        later: int = 3

    newer = Newer.model_validate(plan_of(tmp_path, GOOD).sweep.model_dump(exclude_defaults=True))
    assert newer.hash == plain, "a new setting refuses the folders of before"


def test_a_typo_is_reported_before_ray_optuna_or_mlflow_are_imported(tmp_path):
    (tmp_path / "my.yaml").write_text(GOOD.replace("drop_rate: search\n", "drop_rat: search\n"))
    code = (
        "import sys; sys.argv = ['fastbp-sweep', 'run', 'my.yaml']\n"
        "from sweeps.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in ('ray', 'optuna', 'mlflow') if m in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 2, f"exit code {done.returncode}: {done.stderr}"
    assert done.stderr.strip() == "my.yaml:10: unknown key 'drop_rat' in arms.ldb; did you mean drop_rate?"
    assert done.stdout.strip() == "[]", f"imported before validation was over: {done.stdout}"
    assert not (tmp_path / "fastbp-runs").exists(), "an output folder was made for a file that is wrong"


def image_folder(root, classes=10, images=8):
    """An image folder of tiny random pictures."""
    image = pytest.importorskip("PIL.Image")
    for part, label in itertools.product(("train", "test"), range(classes)):
        folder = root / part / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(images):
            image.new("RGB", (32, 32), (i * 20, label * 20, 0)).save(folder / f"{i}.png")


@pytest.mark.parametrize("file", sorted(Path(__file__).parents[1].glob("sweeps/*.yaml")), ids=lambda f: f.stem)
@pytest.mark.parametrize("smoke", [False, True])
def test_packaged_sweeps_are_valid(file, smoke, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTBP_DATA", str(tmp_path))
    image_folder(tmp_path / "data" / "cifar10")  # which some of them name
    (tmp_path / "data" / "tinyshakespeare.txt").write_text("Speak, speak.\n" * 20_000)
    plan = load_plan(file.stem, smoke=smoke)
    assert plan.sweep.name == file.stem + "-smoke" * smoke, f"{file.name} is called {plan.sweep.name}"
    if smoke:
        assert all(arm.recipe.epochs == 1 for arm in plan.arms), "a smoke run is one epoch"


SHORT = """\
name: toy
task: {data: digits, model: mlp, model_args: {depth: 2, width: 8}, data_args: {limit: 128}}
recipe: {epochs: 30, batch_size: 64}
arms:
  bp: {method: bp}
  bp-long: {method: bp, recipe: {epochs: 60}}
  ldb: {method: ldb, recipe: {warmup_epochs: 2, lr: 0.2}}
"""
DOSES = "ablate: {arm: ldb, design: dose_response, seeds: [3], factors: {recipe.epochs: [2, 5], %s}}\n"


@pytest.mark.parametrize(
    ("part", "cells", "seeds"),
    [
        ("measure: {seeds: [0, 1]}\n", [], [0]),
        (DOSES % "recipe.lr: [0.1], recipe.warmup_epochs: [1]", [["recipe.lr"]], None),
        (DOSES % "recipe.warmup_epochs: [1]", [], [0]),  # nothing is left: the arms are measured once
    ],
)
def test_a_smoke_run_has_one_epoch_whatever_arms_and_ablations_say(tmp_path, part, cells, seeds):
    (tmp_path / "toy.yaml").write_text(SHORT + part)
    plan = load_plan(str(tmp_path / "toy.yaml"), smoke=True)
    short = {arm.name: (arm.recipe.epochs, arm.recipe.warmup_epochs) for arm in plan.arms}
    assert short == dict.fromkeys(("bp", "bp-long", "ldb"), (1, 0)), short
    assert plan.arms[2].recipe.lr == 0.2, "the arm lost the rest of its recipe"
    assert [list(part.factors or ()) for part in plan.sweep.ablate] == cells
    assert (plan.sweep.measure.seeds if plan.sweep.measure else None) == seeds
