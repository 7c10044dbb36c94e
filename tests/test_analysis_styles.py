"""Colours: one per method in every report, combinations too; settings of one method are told apart."""

import itertools
import re

import pytest

from analysis.labels import Style, family, styles
from analysis.report import MARKERS
from analysis.shades import arm_styles, shade
from analysis_records import RECIPE, bp, dbp, groups_of, ldb, report_of, run_line

COMBINED = ("dbp+ldb", "ldb+dbp", "dbp+highway", "ldb+highway", "dbp+ddg", "ldb+ddg")
COMBINED += ("dbp+ldb+highway", "ldb+dbp+highway", "dbp+ldb+ddg", "ldb+dbp+ddg")
SINGLE = ("bp", "ldb", "dbp", "highway", "ddg")
GROUNDS = {"light": "#ffffff", "dark": "#1b1f26"}  # --card of the page


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True))


def contrast(a, b):
    """WCAG's contrast ratio."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_a_family_looks_the_same_whatever_else_is_in_the_report():
    alone = {name: styles([name])[name] for name in (*SINGLE, *COMBINED, "my_pkg:Sign", "ldb+my_pkg:Sign")}
    for others in ([], ["a", "zz+ldb"], [*COMBINED, *map(str, range(50))]):
        together = styles([*others, *alone])
        assert {name: together[name] for name in alone} == alone, f"beside {others}"


def test_no_two_combinations_share_colour_or_marker():
    found = styles(COMBINED)
    for key in ("light", "dark", "marker"):
        values = [getattr(found[name], key) for name in (*SINGLE, *COMBINED)]
        assert len(set(values)) == 15, f"{key}: {values}"
    assert {style.marker for style in found.values()} <= set(MARKERS)


def test_every_supported_combination_has_a_style_of_its_own():
    fastbp = pytest.importorskip("fastbp")
    wrappers, leaves = ("ldb", "dbp"), ("highway", "ddg")
    known = styles([])
    for outer, inner in itertools.product(wrappers, (*wrappers, *leaves)):
        if outer != inner:
            method = fastbp.METHODS[outer](inner=fastbp.METHODS[inner]())
            assert family(method.to_dict()) in known


@pytest.mark.parametrize("theme", GROUNDS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.64])
def test_names_can_be_read_on_the_card(theme, share):
    for name, style in styles(COMBINED).items():
        found = contrast(getattr(shade(style, share), theme), GROUNDS[theme])
        assert found >= 4.5, f"{name} in the {theme} theme, shade {share}: {found:.2f}"


def settings_lines(rates):
    methods = [("ldb", "method", ldb(rate)) for rate in rates]
    methods += [("ldb", "control", ldb(rate) | {"mask": False}) for rate in rates]
    cells = [("bp", "baseline", bp()), *methods, ("dbp", "method", dbp())]
    return [run_line(arm=a, role=r, method=m, seed=s) for s in range(3) for a, r, m in cells]


def test_settings_of_one_method_have_shades_of_its_hue(tmp_path):
    _, (group,) = groups_of(tmp_path, settings_lines([0.1, 0.5, 0.9]))
    known = styles([])
    drawn = {arm.name: style for arm, style in arm_styles(group, known).items()}
    own = [style for name, style in drawn.items() if name.startswith("ldb") and "control" not in name]
    assert own[0] == known["ldb"], "the first setting is drawn as the method is everywhere"
    assert len({style.light for style in own}) == len({style.dark for style in own}) == 3
    assert {style.marker for style in own} == {known["ldb"].marker}
    assert drawn["dbp"] == known["dbp"]
    for arm in group.arms:
        if arm.role == "method" and arm.family == "ldb":
            control = group.control_of(arm)
            assert control is not None
            assert drawn[control.name] == drawn[arm.name], f"{control.name} is not drawn in its method's shade"


def test_backprop_as_a_method_is_told_from_the_baseline(tmp_path):
    longer = {"arm": "a-long", "role": "method", "recipe": RECIPE | {"epochs": 8}}
    lines = [run_line(seed=s, **more) for s in range(3) for more in (longer, {})]
    _, (group,) = groups_of(tmp_path, lines)
    drawn = {arm.name: style for arm, style in arm_styles(group, styles([])).items()}
    assert drawn["bp"] == styles([])["bp"], "the baseline has the method's own hue"
    assert drawn["a-long"].light != drawn["bp"].light
    assert drawn["a-long"].dark != drawn["bp"].dark


def test_a_shade_is_between_the_hue_and_the_end():
    style = Style("#0068a8", "#5db8f0", "o")
    assert shade(style, 0.0) == style
    assert shade(style, 1.0) == Style("#000000", "#ffffff", "o")


def test_the_page_and_the_figures_draw_the_shades(tmp_path):
    contents = report_of(tmp_path, settings_lines([0.1, 0.9]), figures=True)
    second = shade(styles([])["ldb"], 0.64)
    page = contents["report.html"].decode()
    assert f'style="--l:{second.light};--d:{second.dark}"' in page
    assert second.light in contents["figures/pareto-group1.svg"].decode()
    plain = report_of(tmp_path / "plain", settings_lines([0.1]))["report.html"].decode()
    assert not re.search(r'style="--l', plain), "a method with one setting has its own hue"
