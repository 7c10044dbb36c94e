"""What the first page must not leave unsaid: failures, open losses, unequal budgets, whose control it is."""

import random

from analysis.claims import Claim, verdict
from analysis.statistics import Estimate
from analysis.summary import answer
from analysis_records import RECIPE, groups_of, ldb, run_line, sweep_line, synthetic, with_run


def said(tmp_path, lines, arm="ldb"):
    """(headline, verdict, sentence) of one arm."""
    _, (group,) = groups_of(tmp_path, lines)
    first_page = answer(group)
    (comparison,) = [c for c in first_page.comparisons if c.arm.arm == arm]
    return first_page.headline, comparison.verdict, comparison.sentence


def lines_of(seconds, spread, epochs=4, seeds=5, drop=0.0):
    """Baseline at 10 s and 90 %, ldb at `seconds` and 90 % minus `drop`, with accuracies spread by `spread`."""
    rng = random.Random(1)
    lines = [sweep_line(seeds=list(range(seeds)))]
    for seed in range(seeds):
        lines.append(run_line(seed=seed, train_seconds=10 + 0.01 * seed, test_accuracy=0.9, val_accuracy=0.9))
        accuracy = 0.9 - drop + rng.gauss(0, spread)
        lines.append(
            run_line(
                arm="ldb", role="method", method=ldb(), seed=seed, train_seconds=seconds + 0.01 * rng.random(),
                test_accuracy=accuracy, val_accuracy=accuracy, recipe=RECIPE | {"epochs": epochs},
            )
        )  # fmt: skip
    return lines


def test_a_clean_win_is_a_win(tmp_path):
    headline, found, _ = said(tmp_path, lines_of(7.0, 0.001))
    assert (found, headline.startswith("Use ldb")) == ("wins", True), headline


def test_failures_are_on_the_first_page_and_no_plain_win(tmp_path):
    lines = with_run(lines_of(7.0, 0.001), lambda r: r["arm"] == "ldb" and r["seed"] >= 3, status="diverged")
    headline, found, sentence = said(tmp_path, lines)
    assert found == "trade-off", f"an arm that diverges more often than backprop is called {found}"
    assert "2 of 5 runs diverged" in sentence
    assert not headline.startswith("Use ldb")


def test_an_open_loss_is_said_and_is_no_win(tmp_path):
    _, found, sentence = said(tmp_path, lines_of(7.0, 0.05, drop=0.02))
    assert found == "trade-off", sentence
    assert "points is not excluded" in sentence


def test_unequal_budgets_are_said(tmp_path):
    _, found, sentence = said(tmp_path, lines_of(5.0, 0.001, epochs=2))
    assert "not the same budget: 2 epochs against the baseline's 4" in sentence
    assert found == "trade-off"


def test_a_control_is_that_of_its_own_setting(tmp_path):
    lines = [sweep_line()]
    for seed in range(5):
        lines.append(run_line(seed=seed))
        for rate, seconds in ((0.3, 8.0), (0.7, 6.0)):
            plan = {"mask": True, **ldb(rate)}
            lines.append(run_line(arm="ldb", role="method", method=plan, seed=seed, train_seconds=seconds))
            control = plan | {"mask": False}
            lines.append(run_line(arm="ldb", role="control", method=control, seed=seed, train_seconds=seconds + 2))
    _, (group,) = groups_of(tmp_path, lines)
    arms = [arm for arm in group.arms if arm.role == "method"]
    assert len(arms) == 2
    for arm in arms:
        control = group.control_of(arm)
        assert control is not None
        assert control.values["drop_rate"] == arm.values["drop_rate"], f"{arm.name} is given {control.name}"


def test_a_control_with_another_recipe_is_none(tmp_path):
    lines = [sweep_line(), *[run_line(seed=s) for s in range(3)]]
    for seed in range(3):
        lines.append(run_line(arm="ldb", role="method", method=ldb(), seed=seed))
        other = RECIPE | {"lr": 0.9}
        lines.append(run_line(arm="ldb", role="control", method=ldb(0.0), recipe=other, seed=seed))
    _, (group,) = groups_of(tmp_path, lines)
    (arm,) = [arm for arm in group.arms if arm.role == "method"]
    assert group.control_of(arm) is None


def test_higher_is_strict():
    claim = Claim("c", "dbp", "higher", "here", "accuracy_difference", above=0.0)
    assert verdict(claim, Estimate(0.0, 0.0, 0.0, n=5)) == "contradicted"
    assert verdict(claim, Estimate(0.1, 0.05, 0.2, n=5)) == "confirmed"


def test_the_synthetic_sweep_still_recommends_ldb(tmp_path):
    headline, found, _ = said(tmp_path, synthetic(5))
    assert found == "wins", headline
