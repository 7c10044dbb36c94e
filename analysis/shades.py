"""Arms of one method at several settings: the method's hue and marker in shades that tell them apart."""

from __future__ import annotations

from dataclasses import replace

from analysis.labels import Style
from analysis.measured import ROLE_ORDER, Arm, Group

DEEPEST = 0.64  # how far the last setting lies from the method's own hue towards black, on dark ground white


def arm_styles(group: Group, styles: dict[str, Style]) -> dict[Arm, Style]:
    """Every arm of the group to how it is drawn; a control is drawn in the shade of its method."""
    out: dict[Arm, Style] = {}
    for family, arms in _by_family(group).items():
        for i, arm in enumerate(arms):
            out[arm] = shade(styles[family], DEEPEST * i / max(len(arms) - 1, 1))
    for arm in group.arms:
        if arm.role == "method" and (control := group.control_of(arm)):
            out.setdefault(control, out[arm])
    return {arm: out.get(arm, styles[arm.family]) for arm in group.arms}


def _by_family(group: Group) -> dict[str, list[Arm]]:
    """Baselines and methods of each family, the baselines first: plain backprop may be both."""
    found: dict[str, list[Arm]] = {}
    for arm in sorted(group.arms, key=lambda arm: ROLE_ORDER[arm.role]):
        if arm.role != "control":
            found.setdefault(arm.family, []).append(arm)
    return found


def shade(style: Style, share: float) -> Style:
    """The style with its hue that share of the way towards black, on dark ground towards white.

    >>> shade(Style("#0068a8", "#5db8f0", "o"), 0.5)
    Style(light='#003454', dark='#aedcf8', marker='o')
    """
    return replace(style, light=_mixed(style.light, 0, share), dark=_mixed(style.dark, 255, share))


def _mixed(colour: str, end: int, share: float) -> str:
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round((1 - share) * part + share * end):02x}" for part in parts)
