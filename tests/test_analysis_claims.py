"""Published claims against measurements with a known truth: every verdict, and nothing decided by a hair."""

import pytest

from analysis.claims import Claim, claim_table, load_claims, mismatch, verdict
from analysis.errors import ReportError
from analysis.statistics import Estimate
from analysis_records import groups_of, run_line, sweep_line, synthetic

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
