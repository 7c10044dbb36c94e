"""No password of a URL is shown, however it is written; what is no password stays readable."""

import pytest

from analysis.mlflow_source import _without_password as analysis_version
from sweeps.source import SweepError, without_password
from sweeps.submit import _environment

CASES = [
    ("http://me:secret@host/path", "http://host/path"),
    ("http://me:sec@ret@host:5000/x", "http://host:5000/x"),
    ("http://me:sec/ret@host/x", "http://host/x"),
    ("http://me:s/e@c/r@et@host/x", "http://host/x"),
    ("http://me:s?e#cret@host/x", "http://host/x"),
    ("http://me:12345/6@host/x", "http://host/x"),
    ("http://me:/secret@host", "http://host"),
    ("http://:secret@host", "http://host"),
    ("http://token@host/x", "http://host/x"),
    ("postgresql+psycopg://me:sec/ret@db:5432/mlflow", "postgresql+psycopg://db:5432/mlflow"),
    ("two: http://a:b@c/d and http://e:f/g@h/i, ok", "two: http://c/d and http://h/i, ok"),
    ("HTTPConnectionPool(url='http://a:b@c/d', to='x@y')", "HTTPConnectionPool(url='http://c/d', to='x@y')"),
    ("http://host/x?user=me&password=secret", "http://host/x?user=me&password=***"),
    ("http://host/x?password=sec%40ret&y=1#z", "http://host/x?password=***&y=1#z"),
    ("http://host/x?PassWord=secret", "http://host/x?PassWord=***"),
    ("mysql://db/m?ssl_passwd=s&passwd=t", "mysql://db/m?ssl_passwd=***&passwd=***"),
    ("postgresql:///m?host=/run&password=s/e@c", "postgresql:///m?host=/run&password=***"),
    ("http://host/x?access_token=abc;api_key=def", "http://host/x?access_token=***;api_key=***"),
    ("http://me:a@host/x?token=b", "http://host/x?token=***"),
]
READABLE = [
    "http://127.0.0.1:5000",
    "http://127.0.0.1:5000/",
    "http://host:5000/api/2.0/mlflow/experiments/get-by-name?experiment_name=a@b",
    "https://host/Users/me@corp.example/x",
    "https://github.com/a/b@v1",
    "sqlite:////home/me@work/mlruns.db",
    "file:///home/me@work/x:y@z",
    "write to me@host.example, or see http://host",
    "mlflow:toy@sqlite:///mlruns.db",
    "http://host/x?passed=3&tokens",
    "a password=secret outside of any URL is not ours to find",
    "",
]


@pytest.mark.parametrize("clean", [without_password, analysis_version], ids=["sweeps", "analysis"])
@pytest.mark.parametrize(("text", "expected"), [*CASES, *((text, text) for text in READABLE)])
def test_passwords_go_and_the_rest_stays(clean, text, expected):
    assert clean(text) == expected
    assert clean(expected) == expected, "cleaned twice it is something else"


def test_a_job_does_not_get_a_password_that_is_a_parameter(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:p/w@host/x")
    assert _environment([])["MLFLOW_TRACKING_URI"] == "http://host/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host/x?password=pw")
    with pytest.raises(SweepError, match="MLFLOW_TRACKING_URI has a password as a parameter") as refused:
        _environment([])
    assert "pw" not in str(refused.value)
