"""Ablations expanded into cells, against lists written by hand; fractions against their definition."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from fastbp import Backprop, DecorrelatedBP, HighwayBP, LayerDropBack
from fastbp.recipe import Recipe
from fastbp.record import SweepRecord
from sweep_files import ended, plan_of
from sweeps import mlflow_view
from sweeps.ablate import Cell, expand
from sweeps.estimate import works_of
from sweeps.fraction import regular_fraction
from sweeps.ledger import Ledger
from sweeps.source import SweepError
from sweeps.spec import AblatePart

BOTH = DecorrelatedBP(decor_lr=1e-3, inner=LayerDropBack(drop_rate=0.3))
TRIPLE = replace(BOTH, inner=LayerDropBack(drop_rate=0.3, inner=HighwayBP(iterations=2)))
RECIPE, OWN = Recipe(lr=0.2), Recipe(lr=0.1)  # the arm's and the anchor's

FILE = """\
name: toy
task: {data: digits, model: mlp, model_args: {depth: 2, width: 8}, data_args: {limit: 128}}
recipe: {epochs: 2, batch_size: 64, lr: {log_uniform: [0.01, 0.5]}}
arms:
  bp: {method: bp}
  both: {method: dbp, inner: {method: ldb, drop_rate: search}}
search: {trials: 3, epochs: 1}
measure: {seeds: [0, 1]}
ablate:
  - {arm: both, design: leave_one_out}
  - arm: both
    design: dose_response
    factors: {method.inner.drop_rate: [0.0, 0.25]}
    seeds: [1, 2]
"""


def expanded(method, design, factors=None, **rest):
    """Name, method and recipe of the cells beside anchor and whole arm, and the ablation."""
    part = AblatePart(arm="arm", design=design, factors=factors, **rest)
    whole, anchor = Cell("arm", method, RECIPE, {}), Cell("bp", Backprop(), OWN, {})
    known = {anchor.setting: "bp", whole.setting: "arm"}
    found = expand(part, whole, anchor, [0], known)
    assert found.cells[:2] == [anchor, whole], f"{design} begins with {found.cells[:2]}"
    assert all(cell.recipe == RECIPE for cell in found.cells[1:] if "recipe" not in cell.name), "a recipe moved"
    return {cell.name: cell.method for cell in found.cells[2:]}, found


def test_leave_one_out_takes_each_component_out_once():
    dbp, ldb, highway = DecorrelatedBP(decor_lr=1e-3), LayerDropBack(drop_rate=0.3), HighwayBP(iterations=2)
    assert expanded(TRIPLE, "leave_one_out")[0] == {
        "arm": TRIPLE,
        "arm/without-dbp": replace(ldb, inner=highway),
        "arm/without-ldb": replace(dbp, inner=highway),
        "arm/without-highway": BOTH,
    }
    assert expanded(BOTH, "leave_one_out")[0] == {"arm": BOTH, "arm/without-dbp": ldb, "arm/without-ldb": dbp}
    assert set(expanded(TRIPLE, "leave_one_out", ["ldb"])[0]) == {"arm", "arm/without-ldb"}
    assert expanded(ldb, "leave_one_out")[0] == {"arm": ldb, "arm/plain": Backprop()}


def test_add_one_in_puts_each_component_into_backprop_with_the_arms_recipe():
    dbp, ldb, highway = DecorrelatedBP(decor_lr=1e-3), LayerDropBack(drop_rate=0.3), HighwayBP(iterations=2)
    cells, found = expanded(TRIPLE, "add_one_in")
    assert cells == {
        "arm/plain": Backprop(), "arm/only-dbp": dbp, "arm/only-ldb": ldb, "arm/only-highway": highway, "arm": TRIPLE,
    }  # fmt: skip
    assert [cell.levels for cell in found.cells if cell.name == "arm/only-ldb"] == [
        {"dbp": False, "ldb": True, "highway": False}
    ]


def test_dose_response_moves_one_field_at_a_time_and_knows_the_arms_own_level():
    factors = {"method.inner.drop_rate": [0, 0.5], "recipe.lr": [0.1, 0.2]}
    cells, found = expanded(BOTH, "dose_response", factors)
    assert list(cells) == ["arm/inner.drop_rate=0", "arm/inner.drop_rate=0.5", "arm/recipe.lr=0.1", "arm"]
    assert cells["arm/inner.drop_rate=0.5"] == replace(BOTH, inner=LayerDropBack(drop_rate=0.5))
    assert cells["arm/recipe.lr=0.1"] == BOTH
    assert [cell.recipe.lr for cell in found.cells if cell.name == "arm/recipe.lr=0.1"] == [0.1]
    own = [cell.levels for cell in found.cells[2:] if cell.name == "arm"]
    assert own == [{"recipe.lr": 0.2}, {"method.inner.drop_rate": 0.3}], f"the whole arm stands for {own}"


def test_factorial_crosses_components_and_fields():
    cells, found = expanded(BOTH, "factorial", {"ldb": None, "recipe.lr": [0.1, 0.2, 0.4]})
    assert list(cells) == [
        "arm/without-ldb,recipe.lr=0.1", "arm/without-ldb,recipe.lr=0.2", "arm/without-ldb,recipe.lr=0.4",
        "arm/recipe.lr=0.1", "arm", "arm/recipe.lr=0.4",
    ]  # fmt: skip
    assert found.factors == {"ldb": [False, True], "recipe.lr": [0.1, 0.2, 0.4]}
    assert found.cells[2].levels == {"ldb": False, "recipe.lr": 0.1}
    assert (found.cells[2].method, found.cells[2].recipe.lr) == (DecorrelatedBP(decor_lr=1e-3), 0.1)


def test_a_cell_that_is_the_anchor_or_another_arm_is_not_run_twice():
    part = AblatePart(arm="arm", design="factorial")
    whole, anchor = Cell("arm", BOTH, RECIPE, {}), Cell("bp", Backprop(), RECIPE, {})
    ldb = Cell("ldb", LayerDropBack(drop_rate=0.3), RECIPE, {})
    known = {cell.setting: cell.name for cell in (anchor, whole, ldb)}
    names = [cell.name for cell in expand(part, whole, anchor, [0], known).cells]
    assert names == ["bp", "arm", "bp", "ldb", "arm/without-ldb", "arm"], f"cells are {names}"


# ---- fractions


def words(found, factors):
    """Every product of factors that is constant over the design, by trying all of them."""
    sign = np.where(np.array(found.rows), 1, -1)
    sets = (s for k in range(1, factors + 1) for s in itertools.combinations(range(factors), k))
    return [s for s in sets if abs(sign[:, s].prod(axis=1).sum()) == len(sign)]


# resolution of the best regular designs: Box, Hunter and Hunter, table 6.22
KNOWN = [(3, 4, 3), (4, 8, 4), (5, 8, 3), (5, 16, 5), (6, 8, 3), (6, 16, 4), (6, 32, 6), (7, 8, 3), (7, 16, 4),
         (7, 32, 4), (7, 64, 7), (8, 16, 4), (8, 32, 4), (8, 64, 5), (9, 16, 3), (9, 32, 4), (10, 32, 4), (10, 128, 5),
         (11, 16, 3), (11, 32, 4)]  # fmt: skip


@pytest.mark.parametrize(("factors", "cells", "resolution"), KNOWN)
def test_fractions_have_the_resolution_of_the_textbook(factors, cells, resolution):
    found = regular_fraction(factors, cells)
    assert found is not None
    assert (len(found.rows), len(set(found.rows)), found.resolution) == (cells, cells, resolution)
    shortest = min(map(len, words(found, factors)))
    assert shortest == resolution, f"the shortest defining word has {shortest} letters"
    assert (True,) * factors in found.rows, "the whole arm is not in the design"


def test_fractions_end_where_main_effects_would_be_mixed():
    assert regular_fraction(31, 32).resolution == 3
    assert regular_fraction(32, 32) is None
    assert len(regular_fraction(9, 100).rows) == 64, "not a power of two"
    assert regular_fraction(3, 8).resolution == 0, "all combinations fit"


# ---- in a sweep file


def ledger_of(plan):
    values = {"recipe.lr": 0.1}
    arms = {arm.name: arm for arm in plan.arms}
    runs = [
        plan.search_run(arms["bp"], values),
        plan.search_run(arms["both"], values | {"method.inner.drop_rate": 0.4}),
    ]
    return Ledger.of(ended(run) for run in runs)


def test_blocks_are_seeds_and_each_has_anchor_and_whole_arm_once(tmp_path):
    plan = plan_of(tmp_path, FILE)
    runs = plan.ablate_runs(ledger_of(plan))
    common = {"bp", "both"}
    parts, doses = {"both/without-ldb", "both/without-dbp"}, {"both/inner.drop_rate=0.0", "both/inner.drop_rate=0.25"}
    blocks = {seed: sorted(run.arm for run in runs if run.seed == seed) for seed in (0, 1, 2)}
    expected = {0: common | parts, 1: common | parts | doses, 2: common | doses}
    assert blocks == {seed: sorted(arms) for seed, arms in expected.items()}
    assert [run.block for run in runs] == sorted(run.block for run in runs), "blocks are mixed"
    assert {(run.arm, run.role) for run in runs if run.role == "baseline"} == {("bp", "baseline")}
    assert {run.phase for run in runs} == {"ablate"}
    whole = next(run for run in runs if run.arm == "both")
    assert whole.method.inner.drop_rate == 0.4, "not at the chosen setting"
    assert plan_of(tmp_path, FILE).ablate_runs(ledger_of(plan)) == runs, "the order is not a function of the file"


def test_once_ablated_a_setting_stands(tmp_path):
    plan = plan_of(tmp_path, FILE.replace("measure: {seeds: [0, 1]}\n", "").replace("one_out}", "one_out, seeds: [0]}"))
    ledger = ledger_of(plan)
    ledger.add(ended(next(run for run in plan.ablate_runs(ledger) if run.arm == "both")))
    better = plan.search_run(plan.arms[1], {"recipe.lr": 0.3, "method.inner.drop_rate": 0.2})
    ledger.add(ended(better, val=0.99))
    assert plan.chosen(plan.arms[1], ledger) == {"recipe.lr": 0.1, "method.inner.drop_rate": 0.4}


def test_an_arm_without_a_setting_is_not_ablated(tmp_path):
    plan = plan_of(tmp_path, FILE)
    assert plan.ablations(Ledger()) == []
    assert plan.ablate_runs(Ledger()) == []


def test_a_file_without_ablations_keeps_its_hash(tmp_path):
    text = FILE[: FILE.index("ablate")]
    assert "ablate" not in plan_of(tmp_path, text).sweep.config()
    assert plan_of(tmp_path, text).sweep.hash != plan_of(tmp_path, FILE).sweep.hash


def test_smoke_is_one_seed(tmp_path):
    plan = plan_of(tmp_path, FILE)
    small = replace(plan, sweep=plan.sweep.smoke())
    assert {run.seed for run in small.ablate_runs(ledger_of(plan))} == {0, 1}, "each ablation's first"
    assert [small.ablated_seeds(part) for part in small.sweep.ablate] == [[0], [1]]


def test_mlflow_counts_the_cells_of_the_ablations(tmp_path):
    plan = plan_of(tmp_path, FILE)
    ledger = ledger_of(plan)
    runs, found = plan.ablate_runs(ledger), [ablation.to_dict() for ablation in plan.ablations(ledger)]
    sweep = SweepRecord(sweep="toy", config={"ablate": [{}]}, ablate_cells=len(runs), ablations=found)
    records = [ended(run) for run in runs]
    names = {mlflow_view.cell_name(r): mlflow_view.planned_runs(sweep, r) for r in records}
    assert names == {
        "ablate bp": 3, "ablate both": 3, "ablate both/without-ldb": 2, "ablate both/without-dbp": 2,
        "ablate both/inner.drop_rate=0.0": 2, "ablate both/inner.drop_rate=0.25": 2,
    }  # fmt: skip
    assert mlflow_view.is_complete(sweep, records, final=False)
    assert not mlflow_view.is_complete(sweep, records[1:], final=True), "a missing cell is overlooked"
    assert not mlflow_view.is_complete(replace(sweep, ablate_cells=0), [], final=False), "before the search is over"


HEAD = """\
name: toy
task: {data: digits, model: mlp, model_args: {depth: 2, width: 8}, data_args: {limit: 128}}
recipe: {epochs: 2, batch_size: 64, lr: 0.1}
arms:
  bp: {method: bp}
  ddg: {method: ddg, modules: 2}
  both: {method: dbp, inner: {method: ldb}}
ablate:
"""
LEAVE, DOSE, CROSS = (
    f"  arm: both\n  design: {design}\n  seeds: [0]\n" for design in ("leave_one_out", "dose_response", "factorial")
)
BAD = [
    (LEAVE.replace("both", "bth"), r":9: ablate.arm: no arm 'bth'; did you mean both\?"),
    (LEAVE.replace("both", "bp"), ":9: ablate.arm = 'bp': plain backprop has no components"),
    (LEAVE.replace("one_out", "one"), ":10: ablate.design = 'leave_one': input should be"),
    (LEAVE.replace("design", "desing"), ":10: unknown key 'desing' in ablate; did you mean design"),
    (LEAVE.replace("[0]", "[0, 0]"), ":8: ablate: seeds must be distinct whole numbers from 0"),
    (LEAVE.replace("[0]", "null"), ":8: ablate.seeds: there is no `measure` part to take them from"),
    (LEAVE + "  factors: [lbd]", r":12: .*no component 'lbd'; did you mean ldb\?"),
    (LEAVE + "  factors: ldb", ":12: .*give a list of components, or a mapping"),
    (DOSE, ":8: ablate.factors: dose_response needs fields with levels"),
    (DOSE + "  factors: {ldb: null}", ":12: .*ldb is a component; dose_response takes fields"),
    (DOSE + "  factors:\n    method.inner.drop_rate: [0.1,\n 1.5]", r":14: .*LayerDropBack.drop_rate = 1.5: must be"),
    (DOSE + "  factors: {method.drop_rate: [0.1]}", ":12: .*DecorrelatedBP has no field 'drop_rate'"),
    (DOSE + "  factors: {drop_rate: [0.1]}", ":12: .*no component or field 'drop_rate'; did you mean"),
    (DOSE + "  factors: {recipe.lr: [0.1, 0.1]}", ":12: .*recipe.lr has a level twice"),
    (DOSE + "  factors: {recipe.lr: null}", ":12: .*recipe.lr needs a list of levels"),
    (DOSE + "  factors: {method.inner: [0.1]}", ":12: .*method.inner is a whole method; name one of its fields"),
    (CROSS + "  factors: {ldb: [1, 2]}", r":12: .*ldb = \[1, 2\]: a component has the levels \[off, on\]"),
    (CROSS + "  factors: {ldb: null, method.inner.drop_rate: [0.1, 0.2]}", ":12: .*drop_rate means nothing where ldb"),
    (
        CROSS + "  max_cells: 4\n  factors: {ldb: null, recipe.lr: [0.1, 0.2, 0.3]}",
        ":12: .*all combinations are 6 cells.*give recipe.lr two levels each.*max_cells: 6",
    ),
    (CROSS + "  max_cells: 2", ":12: .*2 factors need at least 4 cells; set max_cells: 4"),
    (
        DOSE.replace("both", "ddg") + "  factors: {method.modules: [2, 50]}",
        ":8: ablate: cell ddg/modules=50: .*modules",
    ),
]


TWO = """\
  - {arm: both, design: leave_one_out, seeds: [0], threads: 1, gpus: 0}
  - {arm: both, design: add_one_in, seeds: [0]}
"""


def test_without_a_measure_part_the_ablations_say_how_they_are_run(tmp_path):
    plan = plan_of(tmp_path, HEAD + TWO)
    assert (plan.exclusive_part.gpus, plan.exclusive_part.threads) == (0, 1)
    assert {work.threads for work in works_of(plan)} == {1}, "the estimate is for other threads"
    assert plan_of(tmp_path, HEAD + TWO.replace("in, seeds: [0]", "in, seeds: [0], threads: 1")).arms
    none = plan_of(tmp_path, HEAD + TWO.replace(", threads: 1, gpus: 0", ""))
    assert (none.exclusive_part.gpus, none.exclusive_part.threads) == (None, None)
    assert all("threads" not in part for part in none.sweep.config()["ablate"]), "folders of before are refused"
    assert none.sweep.hash != plan.sweep.hash
    both = plan_of(tmp_path, HEAD.replace("ablate:", "measure: {seeds: [0], threads: 1, gpus: 0}\nablate:") + TWO)
    assert both.exclusive_part.threads == 1


@pytest.mark.parametrize(
    ("measure", "ablate", "message"),
    [
        (
            "",
            TWO.replace("in, seeds: [0]", "in, seeds: [0], threads: 2"),
            "10: ablate.threads = 2: another ablation has 1",
        ),
        (
            "measure: {seeds: [0]}\n",
            TWO,
            "10: ablate.threads = 1: the measure part has none.*give it in `measure` alone",
        ),
        ("", TWO.replace("gpus: 0", "gpus: 2"), "9: ablate.0.gpus = 2: input should be less than or equal to 1"),
    ],
)
def test_ablations_that_would_run_unlike_the_others_are_refused(tmp_path, measure, ablate, message):
    with pytest.raises(SweepError) as caught:
        plan_of(tmp_path, HEAD.replace("ablate:", f"{measure}ablate:") + ablate)
    assert re.search(f"toy.yaml:{message}", str(caught.value)), f"said: {caught.value}"


@pytest.mark.parametrize(("part", "message"), BAD)
def test_a_bad_part_is_refused_with_line_and_fix(tmp_path, part, message):
    with pytest.raises(SweepError) as caught:
        plan_of(tmp_path, HEAD + part)
    assert re.search(f"toy.yaml{message}", str(caught.value)), f"said: {caught.value}"
