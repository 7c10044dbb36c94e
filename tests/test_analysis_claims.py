"""Published claims against measurements with a known truth: every verdict, and nothing decided by a hair."""

import json

import pytest
from typer.testing import CliRunner

from analysis.claims import Claim, claim_table, load_claims, mismatch, verdict
from analysis.cli import app
from analysis.errors import ReportError
from analysis.statistics import Estimate
from analysis_records import bp, epoch_lines, groups_of, ldb, run_line, sweep_line, synthetic, write

FASTER = {"id": "t", "method": "ldb", "text": "faster", "source": "here", "metric": "seconds_ratio"}


@pytest.mark.parametrize(
    ("estimate", "expected"),
    [
        (Estimate(0.7, 0.6, 0.8, n=5), "confirmed"),
        (Estimate(0.7, 0.6, 0.80001, n=5), "not enough data"),
        (Estimate(0.9, 0.81, 1.0, n=5), "contradicted"),
        (Estimate(0.9, 0.8, 1.0, n=5), "not enough data"),
        (Estimate(0.7, 0.6, 0.75, n=2), "not enough data"),
        (Estimate(0.7, None, None, n=5), "not enough data"),
        (Estimate(), "not enough data"),
    ],
)
def test_only_an_interval_on_one_side_decides(estimate, expected):
    assert verdict(Claim(**FASTER, at_most=0.8), estimate) == expected


def test_at_least_is_the_mirror_image():
    claim = Claim(**(FASTER | {"metric": "accuracy_difference"}), at_least=-0.005)
    assert verdict(claim, Estimate(0.0, -0.004, 0.004, n=5)) == "confirmed"
    assert verdict(claim, Estimate(-0.01, -0.02, -0.006, n=5)) == "contradicted"
    assert verdict(claim, Estimate(0.0, -0.006, 0.006, n=5)) == "not enough data"


def table_of(tmp_path, claims, records=None):
    results, (group,) = groups_of(tmp_path, records or synthetic(5))
    return claim_table(group, results, claims)


def test_verdicts_of_a_sweep_with_known_truth(tmp_path):
    """In the synthetic sweep ldb takes 7 s to the baseline's 10 s at equal accuracy."""
    claims = [
        Claim(**FASTER, at_most=0.8),
        Claim(**FASTER, at_most=0.5),
        Claim(**FASTER, at_most=0.8, where={"device": "cuda"}),
        Claim(**FASTER, at_most=0.8, where={"data": ["cifar*"]}),
        Claim(**FASTER, at_most=0.8, where={"settings": {"drop_rate": 0.9}}),
        Claim(**(FASTER | {"method": "highway"}), at_most=0.8),
    ]
    rows = table_of(tmp_path, claims).rows
    said = [row["verdict"] for row in rows]
    assert said == ["confirmed", "contradicted", "not comparable", "not comparable", "not comparable"], said
    assert rows[0]["measured"].value == pytest.approx(0.7, abs=0.05)
    assert [row["why"] for row in rows[2:]] == [
        "device is cpu, not cuda",
        "data is digits, not cifar*",
        "drop_rate is 0.5, not 0.9",
    ]


def test_two_seeds_are_not_enough(tmp_path):
    (row,) = table_of(tmp_path, [Claim(**FASTER, at_most=0.8)], synthetic(2)).rows
    assert (row["verdict"], row["why"]) == ("not enough data", "2 paired seeds, at least 3 are needed")


def test_an_arm_of_contaminated_runs_alone_has_its_claims_with_nothing_said(tmp_path):
    beside = {"exclusive": False, "reason": "the processor is shared: other programs"}
    lines = [sweep_line(), *(run_line(seed=seed) for seed in range(3))]
    lines += [run_line(arm="ldb", role="method", method=ldb(), seed=seed, **beside) for seed in range(3)]
    (row,) = table_of(tmp_path, [Claim(**FASTER, at_most=0.8)], lines).rows
    assert row["verdict"] == "not enough data"
    assert row["why"] == "all 3 measured runs shared their device with other programs"
    assert row["measured"].value is None


def test_published_claims_are_well_formed():
    claims = load_claims()
    assert {claim.method for claim in claims} == {"ldb", "dbp", "highway", "ddg"}
    assert len({claim.id for claim in claims}) == len(claims)
    for claim in claims:
        assert claim.source.startswith("arXiv:"), claim.id
        assert claim.where, f"{claim.id} would be comparable with anything"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[claim]]\nid = 3 3", "claims.toml"),
        ('[[claim]]\nid = "a"\ncolour = "red"', "colour"),
        (
            '[[claim]]\nid="a"\nmethod="m"\ntext="t"\nsource="s"\nmetric="speed"\nat_most=1.0',
            "metric 'speed' is none of",
        ),
        (
            '[[claim]]\nid="a"\nmethod="m"\ntext="t"\nsource="s"\nmetric="seconds_ratio"',
            "one of at_most, at_least and above",
        ),
    ],
)
def test_a_bad_claims_file_is_a_sentence(tmp_path, text, message):
    path = tmp_path / "claims.toml"
    path.write_text(text)
    with pytest.raises(ReportError, match=message):
        load_claims(path)


def test_one_device_does_not_speak_for_two(tmp_path):
    records = [sweep_line(), *[run_line(seed=s) for s in range(3)]]
    _, (group,) = groups_of(tmp_path, records)
    claim = Claim(**(FASTER | {"method": "bp"}), at_most=0.8, where={"devices": 2})
    assert mismatch(claim, group, group.arms[0]) == "one device, not 2"


def test_a_run_on_two_devices_speaks_for_two_and_not_for_three(tmp_path):
    _, (group,) = groups_of(tmp_path, [sweep_line(), *[run_line(seed=s, workers=2) for s in range(3)]])
    two, three = (Claim(**(FASTER | {"method": "bp"}), at_most=0.8, where={"devices": n}) for n in (2, 3))
    assert mismatch(two, group, group.arms[0]) == ""
    assert mismatch(three, group, group.arms[0]) == "2 devices, not 3"


def target_records(seeds):
    """Every run reaches the baseline's final accuracy with its second of four epochs; ldb's take 4 s to 10 s."""
    lines = [sweep_line()]
    for seed in range(seeds):
        for arm, role, method, seconds in (("bp", "baseline", bp(), 10.0), ("ldb", "method", ldb(), 4.0)):
            run = run_line(arm=arm, role=role, method=method, seed=seed, train_seconds=seconds + 0.01 * seed)
            lines += [run, *epoch_lines(run, [0.5, 0.95, 0.95, 0.95])]
    return lines


@pytest.mark.parametrize(
    ("seeds", "verdict", "why"),
    [
        (3, "not enough data", "3 paired seeds, at least 5 are needed"),
        (4, "not enough data", "4 paired seeds, at least 5 are needed"),
        (5, "confirmed", ""),
    ],
)
def test_a_claim_about_time_to_a_target_needs_five_seeds(tmp_path, seeds, verdict, why):
    """The median's interval is the range below five seeds: at three it covers 75 %, at five 94 %."""
    claim = Claim(**(FASTER | {"metric": "target_ratio"}), at_most=0.5)
    table = table_of(tmp_path, [claim], target_records(seeds))
    (row,) = table.rows
    assert (row["verdict"], row["why"]) == (verdict, why)
    assert row["measured"].value == pytest.approx(0.4, abs=0.01), "the figure itself is shown all the same"
    assert "(5 for times to a target" in table.caption
    (row,) = table_of(tmp_path / "time", [Claim(**FASTER, at_most=0.5)], target_records(3)).rows
    assert row["verdict"] == "confirmed", "three seeds are enough for a mean"


@pytest.mark.parametrize("curve", [[0.5, 0.6, 0.7, 0.8], [0.95, 0.95, 0.95, 0.95]], ids=["both missed", "a time of 0"])
def test_a_pair_without_a_ratio_is_said(tmp_path, curve):
    lines = target_records(5)
    for line in lines:
        if line["kind"] == "epoch":
            line["val_accuracy"] = curve[line["epoch"]]
            if line["epoch"] == 0:
                line["train_seconds"] = 0.0
    (row,) = table_of(tmp_path, [Claim(**(FASTER | {"metric": "target_ratio"}), at_most=0.5)], lines).rows
    expected = "a pair has no ratio: both runs missed the target, or the baseline's time is 0"
    assert (row["verdict"], row["why"]) == ("not enough data", expected)


OWN = """
[[claim]]
id = "mine"
method = "ldb"
text = "On my digits a third is saved."
source = "my notebook"
metric = "seconds_ratio"
at_most = 0.8
"""


def test_a_file_of_ones_own_claims_is_judged_beside_the_papers(tmp_path):
    source = write(tmp_path / "records.jsonl", synthetic(5))
    own = tmp_path / "own.toml"
    own.write_text(OWN)
    command = [str(source), "--out", str(tmp_path / "out"), "--claims", str(own)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "out" / "tables" / "claims.json").read_text())["rows"]
    assert [row["verdict"] for row in rows if row["source"] == "my notebook"] == ["confirmed"]
    assert sum(row["source"].startswith("arXiv") for row in rows) > 1, "the papers' claims are gone"
    assert "On my digits" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("", "there is no [[claim]]"),
        ("claim = 3", "there is no [[claim]]"),
        ("[claim]\nid = 'a'", "there is no [[claim]]"),
        (OWN.replace("0.8", "'fast'"), "claim mine: the bound is 'fast', expected a number"),
        (OWN.replace("0.8", "nan"), "claim mine: the bound is nan, expected a number"),
        (OWN + "where = 3", "claim mine: where is 3, expected a table"),
        (OWN + "where = {data = 'digits'}", "claim mine: where.data is 'digits', expected a list of names"),
        (OWN + "where = {dta = ['digits']}", "claim mine: where has no 'dta'; known are data, model"),
        (OWN + "where = {devices = true}", "claim mine: where.devices is True, expected a whole number"),
        (OWN.replace('"ldb"', "7"), "claim mine: method is 7, expected a text"),
        ("\x00", "own.toml: "),
    ],
)
def test_a_bad_file_of_claims_is_one_sentence_and_exit_code_2(tmp_path, text, message):
    source = write(tmp_path / "records.jsonl", synthetic(2))
    own = tmp_path / "own.toml"
    if text is not None:
        own.write_text(text)
    result = CliRunner().invoke(app, [str(source), "--out", str(tmp_path / "out"), "--claims", str(own)])
    assert result.exit_code == 2, result.output
    assert message in result.stderr, result.stderr
    assert str(own) in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists(), "a report was begun"
