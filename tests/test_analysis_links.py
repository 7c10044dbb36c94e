"""Only web servers become links, without what must not be passed on."""

import pytest

from analysis.links import Origin, run_url


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000/#/experiments/3/runs/ab"),
        ("https://me:secret@mlflow.example/team/?token=1#x", "https://mlflow.example/team/#/experiments/3/runs/ab"),
        ("http://[::1]:5000/", "http://[::1]:5000/#/experiments/3/runs/ab"),
        ("sqlite:///mlruns.db", ""),
        ("file:///tmp/mlruns", ""),
        ("databricks", ""),
        ("databricks://profile", ""),
        ("ftp://host/x", ""),
        ("javascript:alert(1)//http://x", ""),
        ("http://", ""),
        ("http://host:port/", ""),
        ("http://[broken", ""),
        ('http://host"><script>/', ""),
    ],
)
def test_pages_of_runs(uri, expected):
    assert run_url(uri, "3", "ab") == expected


def test_ids_cannot_leave_their_place():
    url = run_url("http://h", "1/../2", 'a b"#?')
    assert url == "http://h/#/experiments/1%2F..%2F2/runs/a%20b%22%23%3F"


def test_a_run_is_named_by_mlflow_or_by_its_key():
    assert Origin("k1", "records.jsonl").text == "run k1"
    assert Origin("k1", "records.jsonl", "ab12").text == "MLflow run ab12"
