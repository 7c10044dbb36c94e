"""What `fastbp-sweep submit` checks on this side; jobs on a real head node are in test_ray_job.py."""

import subprocess

import pytest

from sweep_files import TOY
from sweeps import job
from sweeps.source import SweepError
from sweeps.submit import PASSED_ON, prepare, warnings

HEAD = "http://head:8265"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working folder with a sweep file in it, which is not the current one; no MLflow in the environment."""
    for name in (*PASSED_ON, "FASTBP_DATA"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    work = tmp_path / "work"
    work.mkdir()
    (work / "toy.yaml").write_text(TOY)
    return work


def request(work, file="toy.yaml", *, address=HEAD, out="/shared/toy", env=(), **options):
    return prepare(file, address=address, out=out, working_dir=work, env=list(env), **options)


def test_the_job_is_the_command_of_the_readme(work, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@mlflow:5000")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    monkeypatch.setenv("MINE", "1")
    monkeypatch.setenv("EMPTY", "full")
    (work / "a folder").mkdir()
    (work / "toy.yaml").rename(work / "a folder" / "toy.yaml")
    it = request(work, str(work / "a folder" / "toy.yaml"), address="head:8265/", env=["MINE", "EMPTY=", "EQUALS=a=b"])
    assert it.address == HEAD
    assert it.folder == work
    assert it.command == ["fastbp-sweep", "run", "a folder/toy.yaml", "--out", "/shared/toy"]
    own = {k: v for k, v in it.env.items() if not k.startswith(("RAY_", "FASTBP_", "MLFLOW_"))}
    assert own == {"MINE": "1", "EMPTY": "", "EQUALS": "a=b"}
    assert "secret" not in str(it.env), f"Ray would write it into its logs: {it.env}"
    assert it.metadata["fastbp.sweep"] == "toy"
    assert it.metadata != request(work, "a folder/toy.yaml", out="/shared/other").metadata
    said = warnings(it)
    assert said == [
        "MLFLOW_TRACKING_PASSWORD is not sent, as Ray logs a job's environment: set it where the head node is started"
    ], said
    (loud,) = warnings(request(work, "a folder/toy.yaml", env=["MLFLOW_TRACKING_PASSWORD"]))
    assert loud.startswith("warning: MLFLOW_TRACKING_PASSWORD goes with --env into the job's environment"), loud
    assert request(work, "a folder/toy.yaml", smoke=True, remeasure=True).command[-2:] == ["--smoke", "--remeasure"]
    assert request(work, "quickstart").command[2] == "quickstart", "a packaged sweep is found on the other side too"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"file": "missing.yaml"}, "missing.yaml: no such sweep file; packaged sweeps: "),
        ({"out": "runs/toy"}, "--out runs/toy: give an absolute path"),
        ({"out": None}, "nothing of this sweep would stay"),
        ({"address": "ray://head:10001"}, "--address ray://head:10001: expected the dashboard's"),
        ({"env": ["NOT_SET_HERE"]}, "--env NOT_SET_HERE: it is not set here"),
        ({"env": ["A B=secret"]}, "--env A B: expected NAME or NAME=VALUE"),
    ],
)
def test_refusals(work, changes, sentence):
    with pytest.raises(SweepError) as error:
        request(work, **changes)
    assert sentence in str(error.value)
    assert "secret" not in str(error.value)


def test_a_file_that_the_job_would_not_see(work, tmp_path):
    (tmp_path / "elsewhere" / "far.yaml").write_text(TOY)
    with pytest.raises(SweepError, match=r"far\.yaml is outside .*/work, which is what the job sees"):
        request(work, "far.yaml")
    (work / "fastbp-runs" / "toy").mkdir(parents=True)
    (work / "fastbp-runs" / "toy" / "sweep.yaml").write_text(TOY)
    with pytest.raises(SweepError, match="is not uploaded, as nothing in fastbp-runs, toy is"):
        request(work, "fastbp-runs/toy/sweep.yaml")
    subprocess.run(["git", "init", "-q", str(work)], check=True)
    (work / ".gitignore").write_text("*.yaml\n")
    with pytest.raises(SweepError, match=r"toy\.yaml is ignored by git, and Ray uploads nothing that is"):
        request(work)


def test_a_wrong_sweep_is_found_before_anything_is_sent(work):
    (work / "toy.yaml").write_text(TOY.replace("trials", "trails"))
    with pytest.raises(SweepError, match=r"toy\.yaml:7: unknown key 'trails' in search"):
        request(work)


def test_an_mlflow_of_this_machine_is_a_warning(work, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@localhost:5000")
    assert warnings(request(work)) == [
        "warning: MLflow at http://localhost:5000 is this machine's own; the job looks for one on its own"
    ]
    assert warnings(request(work, address="localhost:8265")) == []
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "no MLFLOW_TRACKING_URI" in warnings(request(work))[0]


@pytest.mark.parametrize(
    ("mode", "token", "answer", "sentence"),
    [
        ("", None, "401 Missing", f"{HEAD} asks for a token and none was found here: copy"),
        ("token", None, "no token found", "RAY_AUTH_MODE=token, and there is no token: copy"),
        ("disabled", "0" * 64, "401 Missing", f"{HEAD} asks for a token, and RAY_AUTH_MODE=disabled keeps it back"),
        ("token", "0" * 64, "token is invalid or incorrect", f"{HEAD} refuses the token of RAY_AUTH_TOKEN: replace it"),
    ],
)
def test_the_fix_for_a_token(monkeypatch, tmp_path, mode, token, answer, sentence):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", token) if token else monkeypatch.delenv("RAY_AUTH_TOKEN")
    said = job.token_sentence(HEAD, answer)
    assert said.startswith(sentence), said


class Ended:
    """Details of a job that ended."""

    def __init__(self, status, code, message=None):
        from ray.job_submission import JobStatus

        self.status, self.driver_exit_code, self.message = JobStatus(status), code, message


@pytest.mark.parametrize(
    ("info", "code", "sentence"),
    [
        (("SUCCEEDED", 0), 0, ""),
        (("FAILED", 3), 3, ""),
        (("FAILED", 127), 127, "fastbp-sweep is not installed on the cluster"),
        (("FAILED", -9), 137, "was killed by signal 9"),
        (("FAILED", None, "runtime_env setup failed: x\nmore"), 1, "failed before the sweep began: runtime_env setup"),
        (("STOPPED", -15), 130, "was stopped; submitted again, it continues"),
    ],
)
def test_every_end_of_a_job_has_its_exit_code(info, code, sentence):
    said = []
    assert job._end(Ended(*info), "toy-1", said.append) == code
    assert sentence in "".join(said)
    assert bool(said) == bool(sentence), f"said {said}"


class Flaky:
    """A client whose connection breaks in the middle of the log; the log itself is always sent from its beginning."""

    def __init__(self, *chunks):
        self.chunks, self.calls = chunks, 0

    async def tail_job_logs(self, name):
        self.calls += 1
        for index, chunk in enumerate(self.chunks):
            if self.calls == 1 and index == 2:
                raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")
            yield chunk

    def get_job_info(self, name):
        return Ended("SUCCEEDED", 0)


def test_a_broken_connection_shows_every_line_once(capsys, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda _: None)
    client = Flaky("one\n", "two\nthr", "ee\n", "four\n")
    assert job.follow(client, "toy-1", HEAD, print) == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n"
    assert client.calls == 2


class _Starting:
    """The job server of a head node whose agent is not there for the first calls."""

    def __init__(self, refusals, message="Request failed with status code 500: No available agent to submit job"):
        self.refusals, self.message, self.calls = refusals, message, 0

    def submit_job(self, **job):
        self.calls += 1
        if self.calls <= self.refusals:
            raise RuntimeError(self.message)
        return job["submission_id"]


def test_a_head_node_that_is_still_starting_is_waited_for(monkeypatch, tmp_path):
    monkeypatch.setattr(job.time, "sleep", lambda seconds: None)
    wanted = job.Submission(HEAD, tmp_path, ["true"], {}, {"fastbp.sweep": "toy"})
    said, head = [], _Starting(3)
    assert job._submitted(head, wanted, said.append).startswith("toy-")
    assert (head.calls, said) == (4, ["the head node is still starting; trying again"])
    for head in (_Starting(99), _Starting(1, "the folder is too large")):
        with pytest.raises(RuntimeError, match=head.message):
            job._submitted(head, wanted, said.append)
        assert head.calls == (job.RECONNECTS if head.refusals == 99 else 1)
