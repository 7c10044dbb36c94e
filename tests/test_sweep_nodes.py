"""A cluster of several nodes on one machine: GPUs shared and whole, measured runs pinned to one node, a dying node.

The GPUs are Ray's belief alone: FASTBP_FAKE_GPU lets a run that was given one train on the CPU.
"""

import io
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import ray
from ray.cluster_utils import Cluster
from rich.console import Console

from fastbp.environment import device_fingerprint
from fastbp.record import RunRecord, last_runs, read_records
from faults import check_mlflow
from sweep_files import ended
from sweeps.cluster import _runs_on, check_resources, concurrent_trials, ray_session
from sweeps.drive import run_sweep
from sweeps.ledger import Ledger
from sweeps.placement import Node, candidates, last_device, live_nodes, pick_node, split_blocks
from sweeps.plan import load_plan
from sweeps.progress import Progress
from sweeps.source import SweepError

SMALL = {"object_store_memory": 80 * 2**20}
QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 3}
TASK = """\
task: {{data: digits, model: mlp, model_args: {{depth: 2, width: 8}}, data_args: {{limit: 128}}}}
recipe: {{epochs: 1, batch_size: 64, lr: 0.05}}
arms:
  bp: {{method: bp}}
  stamps: {{method: "stamped_methods:Stamps", file: {file}, seconds: {seconds}}}
"""


@pytest.fixture(scope="module")
def cluster():
    """A head without GPU, which is smaller, and two nodes of 2 CPUs and a GPU that is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTBP_FAKE_GPU", "1")
        head = SMALL | {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, "_system_config": QUICK}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(2):
                cluster.add_node(num_cpus=2, num_gpus=1, **SMALL)
            cluster.wait_for_nodes()
            patch.setenv("RAY_ADDRESS", cluster.address)
            with ray_session():
                yield cluster
        finally:
            cluster.shutdown()


def run(folder, text, *, mlflow=False):
    """Run a sweep; how it ended, its measured and search runs, and what was said."""
    file = folder / "sweep.yaml"
    file.write_text(text)
    said = io.StringIO()
    plan = load_plan(str(file))
    outcome = run_sweep(plan, file, folder / "out", Progress(Console(file=said, width=200)), mlflow=mlflow)
    runs = last_runs(read_records(folder / "out" / "records.jsonl")).values()
    return outcome, {phase: [r for r in runs if r.phase == phase] for phase in ("search", "measure")}, said.getvalue()


def stamps(file):
    """(time, node) of every step of the stamped runs."""
    return [(float(t), node) for t, node, _ in (line.split() for line in file.read_text().splitlines())]


@ray.remote(num_cpus=1)
class Tenant:
    """Somebody else's actor, which keeps a CPU busy."""

    def node(self):
        return ray.get_runtime_context().get_node_id()


@ray.remote(num_cpus=1)
def visit():
    began = time.time()
    time.sleep(0.3)
    return began, time.time()


def keep_visiting(records, node, over, visits):
    """From the end of the search on, ask for a CPU of the node again and again; when it was given goes to `visits`."""
    while not records.exists() or records.read_text().count('"finished"') < 2:
        time.sleep(0.05)
    while not over.is_set():
        visits.append(ray.get(visit.options(label_selector={"ray.io/node-id": node}).remote()))
        time.sleep(0.3)


@pytest.mark.long
@pytest.mark.slow
def test_search_shares_gpus_and_measure_has_a_node_to_itself(cluster, tmp_path):
    assert concurrent_trials(0.5, 0.4) == 4, "0.4 of a GPU fits twice on each of two: the fifth would span both"
    tenant = Tenant.options(num_gpus=1).remote()
    taken = ray.get(tenant.node.remote())  # one of the two nodes is not free: measuring has to take the other
    free = next(node.id for node in live_nodes() if node.gpus and node.id != taken)
    file, visits, over = tmp_path / "stamps", [], threading.Event()
    arguments = (tmp_path / "out" / "records.jsonl", free, over, visits)
    visitor = threading.Thread(target=keep_visiting, args=arguments, daemon=True)
    visitor.start()
    outcome, runs, said = run(
        tmp_path,
        "name: nodes\n" + TASK.format(file=file, seconds=0.2) + "search: {trials: 1, cpus: 0.5, gpus: 0.5}\n"
        "measure: {seeds: [0, 1], threads: 1, gpus: 1}\n",
    )
    over.set()
    visitor.join(timeout=60)
    ray.kill(tenant)
    assert outcome.ok, f"{outcome}: {said}"
    assert [r.status for r in runs["search"]] == ["finished"] * 2, said
    assert not any(r.exclusive for r in runs["search"]), "a search run claims a device of its own"
    nodes = {r.device["node"].partition("/")[2] for r in runs["measure"]}
    assert nodes == {free[:8]}, f"measured on {nodes}; {free[:8]} was free and {taken[:8]} was not"
    assert len(runs["measure"]) == 4
    assert all(r.exclusive for r in runs["measure"])
    assert visits, "somebody else's work never got its turn"
    measured = [t for t, node in stamps(file) if node == free[:8] and t > visits[0][0]]
    assert measured, "no step was measured after the first visit"
    beside = [t for t in measured for began, left in visits if began < t < left]
    assert not beside, f"{len(beside)} of {len(measured)} measured steps ran beside somebody else's work"


@pytest.mark.long
@pytest.mark.slow
def test_the_modules_of_a_trial_are_on_as_many_nodes_as_it_takes(cluster, tmp_path):
    """Two GPUs, of which every node has one."""
    file = tmp_path / "stamps"
    outcome, runs, said = run(
        tmp_path,
        "name: spread\ntask: {data: digits, model: mlp, model_args: {depth: 4, width: 8}, data_args: {limit: 128}}\n"
        "recipe: {epochs: 2, batch_size: 32, lr: 0.05}\narms:\n  bp: {method: bp}\n"
        f'  one: {{method: ddg, modules: 2, cuts: [2]}}\n  two: {{method: "stamped_methods:Stamps", file: {file}, '
        "seconds: 0.01, inner: {method: ddg, modules: 2, cuts: [2], processes: true}}\n"
        "measure: {seeds: [0], threads: 1, gpus: 1, controls: false}\n",
    )
    assert outcome.ok, f"{outcome}: {said}"
    one, two = (next(r for r in runs["measure"] if r.arm == arm) for arm in ("one", "two"))
    assert (one.status, one.workers, two.status, two.workers) == ("finished", 1, "finished", 2), said
    assert two.reason == "the GPUs were not watched: the run has several processes"
    assert (two.val_accuracy, two.test_accuracy) == (one.val_accuracy, one.test_accuracy)
    lines = [line.split()[1:] for line in file.read_text().splitlines()]
    places = {process: node for node, process in lines}
    nodes = {node.id[:8] for node in live_nodes() if node.gpus}
    assert (len(places), set(places.values())) == (2, nodes), f"processes on nodes {places}; with a GPU {nodes}"
    steps = [sum(of == process for _, of in lines) for process in places]
    assert steps[0] == steps[1] >= 8, f"steps by process: {steps}"


@pytest.mark.long
@pytest.mark.slow
def test_a_node_that_dies_while_measuring_costs_nothing_but_its_run(cluster, tmp_path):
    file, gone = tmp_path / "stamps", []

    def kill():
        while len(stamps(file) if file.exists() else ()) < 10:  # eight steps a run, with warm-up: in the second one
            time.sleep(0.05)
        node = stamps(file)[-1][1]
        raylet = next(n for n in cluster.worker_nodes if n.node_id.startswith(node))
        gone.append(node)
        cluster.remove_node(raylet, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    uri = f"sqlite:///{tmp_path / 'mlruns.db'}"
    text = "name: dying\n" + TASK.format(file=file, seconds=0.5) + f"mlflow: {{tracking_uri: {uri}}}\n"
    outcome, runs, said = run(tmp_path, text + "measure: {seeds: [0, 1, 2, 3], threads: 1, gpus: 0}\n", mlflow=True)
    killer.join(timeout=60)
    assert outcome.ok, f"{outcome}: {said}"
    assert outcome.mlflow_error == "", outcome.mlflow_error
    check_mlflow(uri, "dying", {r.run_key: r for r in runs["measure"]})
    keys = [r.run_key for r in runs["measure"]]
    assert len(keys) == len(set(keys)) == 8, f"{len(keys)} runs: {said}"
    ends = [r for r in read_records(tmp_path / "out" / "records.jsonl") if isinstance(r, RunRecord)]
    finished = [r.run_key for r in ends if r.status == "finished"]
    assert sorted(finished) == sorted(keys), "a finished run was lost or done twice"
    order = [
        r.device["node"].partition("/")[2] for r in sorted(runs["measure"], key=lambda r: (r.ended_at, r.started_at))
    ]
    assert order[0] == gone[0], f"{gone} died, and the runs were on {order}"
    assert gone[0] != order[-1], f"{gone} died, and the runs were on {order}"
    assert len(set(order)) == 2, f"the runs went to {order}"
    assert f"/{gone[0]} is gone; what was running there is tried again" in said, said


@pytest.mark.long
@pytest.mark.slow
def test_another_machine_must_have_the_same_device(cluster):
    import torch

    here = device_fingerprint(torch.device("cpu"))["name"]
    said = []
    node = pick_node(0, 1, {"node": "far/12345678", "name": here, "threads": 1}, said.append)
    assert said == [f"measure: node far/12345678 is gone; continuing on {node.name}, also {here}"]
    with pytest.raises(SweepError, match=r"^ablate: .* made on Abacus \(node far/12345678, 1 threads\), and no live"):
        pick_node(0, 1, {"node": "far/12345678", "name": "Abacus", "threads": 1}, said.append, "ablate")


@pytest.mark.long
@pytest.mark.slow
def test_a_node_that_an_autoscaler_has_yet_to_start_is_waited_for(cluster, monkeypatch):
    monkeypatch.setattr("sweeps.placement.PATIENCE_SECONDS", 1)
    said = [check_resources("measure", 1, 3)]
    assert "none of the" in said[0], f"said {said}"
    with ThreadPoolExecutor() as pool:
        choice = pool.submit(pick_node, 3, None, {}, said.append)
        while len(said) < 2 and not choice.done():
            time.sleep(0.1)
        cluster.add_node(num_cpus=1, num_gpus=3, **SMALL)
        node = choice.result(timeout=60)
    assert node.gpus == 3, f"chose {node}"
    assert said[1:] == ["measure: waiting for a node with 1 CPU and 3 GPU free"], f"said {said}"


def test_trials_per_node_are_counted_in_rays_units():
    node = {"CPU": 8.0, "GPU": 2.0}
    counted = {
        need: _runs_on(node, *need) for need in ((1, 0), (0.1, 0), (1, 0.1), (1, 0.4), (1, 1), (1, 2), (9, 0), (1, 3))
    }
    assert counted == {
        (1, 0): 8, (0.1, 0): 80, (1, 0.1): 8, (1, 0.4): 4, (1, 1): 2, (1, 2): 1, (9, 0): 0, (1, 3): 0,
    }  # fmt: skip
    assert _runs_on({"CPU": 64.0, "GPU": 1.0}, 1, 0.1) == 10, "ten tenths fit on a GPU"


HEAD, SMALLER, A, B = (
    Node("0" * 56, "head", 8, 0, head=True),
    Node("1" * 56, "small", 4, 1),
    Node("2" * 56, "one", 8, 1),
    Node("3" * 56, "two", 8, 1),
)
EVERY = [HEAD, SMALLER, A, B]


@pytest.mark.parametrize(
    ("gpus", "threads", "last", "expected"),
    [
        (0, 1, {}, [A, B]),  # the largest, and not the head while there are others
        (1, 1, {}, [A, B]),
        (2, 1, {}, []),
        (0, 1, {"node": B.name}, [B]),
        (1, None, {"node": SMALLER.name, "threads": 4}, [SMALLER]),
        (1, None, {"node": "gone/00000000", "threads": 4}, [SMALLER]),  # as many threads as the runs before
        (1, None, {"node": A.name, "threads": 6}, []),
        (0, 1, {"node": "two"}, [B]),  # the same machine, started again
        (0, 1, {"node": "gone/00000000"}, [A, B]),
        (1, 1, {"name": "from before nodes were recorded"}, [A, B]),
    ],
)
def test_candidates(gpus, threads, last, expected):
    assert candidates(EVERY, gpus, threads, last) == expected
    assert candidates([HEAD], 0, None, {}) == [HEAD]


def test_a_split_block_is_said(tmp_path):
    text = "name: split\n" + TASK.format(file=tmp_path / "s", seconds=0) + "measure: {seeds: [0, 1], threads: 1}\n"
    (tmp_path / "split.yaml").write_text(text)
    runs = load_plan(str(tmp_path / "split.yaml")).measure_runs(Ledger())
    records = [ended(r) for r in runs[:3]]  # the first block, and half of the second
    for number, record in enumerate(records):
        record.device, record.ended_at = {"node": B.name}, f"2026-01-01T00:0{number}:00+00:00"
    ledger = Ledger.of(records)
    assert last_device(ledger, runs) == {"node": B.name}
    assert split_blocks(runs, ledger, B) == []
    assert split_blocks(runs, ledger, A) == [
        f"measure: block 1 (seed 1) began on {B.name} and ends on {A.name}, so its pairs span two machines with the "
        "same device"
    ]
    ablated = [replace(run, phase="ablate") for run in runs]
    done = Ledger.of([replace(ended(run), device={"node": B.name}) for run in ablated[:3]])
    (sentence,) = split_blocks(ablated, done, A)
    assert sentence.startswith("ablate: block 1 (seed 1)"), sentence


def test_a_gpu_that_torch_cannot_see_is_a_sentence(monkeypatch):
    from trainables.method_trainable import device_for

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("FASTBP_FAKE_GPU", raising=False)
    assert device_for("cpu") == "cpu"
    with pytest.raises(RuntimeError, match=r"Ray gave this run a GPU of node .* sees none: install there a CUDA build"):
        device_for("cuda")
    assert os.environ.get("FASTBP_FAKE_GPU") is None
