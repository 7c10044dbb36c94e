"""Where measured runs go: all of a sweep's on one node, so that paired times compare like with like.

The node is reserved whole before the first run, which is how Ray says which one is free, and every run is then pinned
to it by Ray's `ray.io/node-id` label. A sweep that is continued goes back to the node of its last measured run; where
that is gone, to another with the same device, and says so. The record of a run names its node and device, and the
report refuses to mix unlike devices.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ray import tune

from fastbp.config import RunConfig
from fastbp.record import RunRecord
from fastbp.staged import stages
from sweeps.ledger import DONE, Ledger
from sweeps.source import SweepStopped
from trainables.stage_actors import stage_resources

CHECK_SECONDS = 2.0  # between two looks at whether the node is still there
PATIENCE_SECONDS = 5  # of waiting for a node before a word is said about it
_ID = "ray.io/node-id"


@dataclass(frozen=True)
class Node:
    """A live node of the cluster.

    Attributes:
        id: Ray's.
        host: its host name.
        cpus, gpus: what it has, whether free or not.
        head: whether Ray's own services run there.
    """

    id: str
    host: str
    cpus: float
    gpus: float
    head: bool = False

    @property
    def name(self) -> str:
        """As in the record's `device.node`: host name and start of Ray's id, which tells two nodes of a host apart."""
        return f"{self.host}/{self.id[:8]}"

    def request(self, run: RunConfig, gpus: int) -> tune.PlacementGroupFactory:
        """All CPUs of this very node and whole GPUs, so that no other trial shares it meanwhile.

        A run whose modules need more GPUs than the node has may spread to others.
        """
        spreads = stages(run.method) > 1 and gpus * stages(run.method) > self.gpus
        return stage_resources(run, float(int(self.cpus)), float(gpus), None if spreads else {_ID: self.id})


def live_nodes() -> list[Node]:
    """The nodes that Ray believes alive."""
    import ray

    return [
        Node(
            node["NodeID"],
            node["NodeManagerHostname"],
            node["Resources"].get("CPU", 0.0),
            node["Resources"].get("GPU", 0.0),
            "node:__internal_head__" in node["Resources"],
        )
        for node in ray.nodes()
        if node["Alive"]
    ]


def last_device(ledger: Ledger, runs: Iterable[RunConfig]) -> dict[str, Any]:
    """Where the newest measured run of these was made; empty before the first."""
    done = [ledger.runs[run.key] for run in runs if run.key in ledger.runs]
    done = [record for record in done if record.status in DONE and record.device]
    return max(done, key=lambda record: record.ended_at).device if done else {}


def candidates(nodes: list[Node], gpus: int, threads: int | None, last: dict[str, Any]) -> list[Node]:
    """Nodes that measured runs may use: the last one if it is there, else the largest with this many GPUs.

    Args:
        nodes: the live ones.
        gpus: per run.
        threads: of a run; None: as many as its node has CPUs, which must then agree with the runs before.
        last: the device of the last measured run, or empty.
    """
    fit = [node for node in nodes if node.gpus >= gpus and node.cpus >= 1]
    if last and threads is None:
        fit = [node for node in fit if int(node.cpus) == last.get("threads")]
    same = [node for node in fit if node.name == last.get("node")] or [
        node for node in fit if node.host == host_of(last)
    ]
    if same:
        return same
    most = max((int(node.cpus) for node in fit), default=0)
    fit = [node for node in fit if int(node.cpus) == most]
    return [node for node in fit if not node.head] or fit


def host_of(device: dict[str, Any]) -> str:
    return str(device.get("node", "")).partition("/")[0]


def pick_node(
    gpus: int, threads: int | None, last: dict[str, Any], say: Callable[[str], None], phase: str = "measure"
) -> Node:
    """The node for all measured runs, once it is free; waits where it is not.

    Args:
        gpus, threads, last: see `candidates`.
        say: hears one sentence where this waits or changes the node.
        phase: which asks, measure or ablate; for the sentences.

    Raises:
        SweepStopped: the last node is gone and no other has the same device.
    """
    unlike: dict[str, str] = {}  # nodes with another device than the runs before
    while True:
        nodes = [node for node in candidates(live_nodes(), gpus, threads, last) if node.id not in unlike]
        if not nodes and last:
            others = f"; {', '.join(sorted(set(unlike.values())))} is not of that kind" if unlike else ""
            raise SweepStopped(
                f"{phase}: the runs so far were made on {last.get('name')} (node {last.get('node', 'unknown')}, "
                f"{last.get('threads')} threads), and no live node has that{others}; seconds of unlike devices cannot "
                f"be compared: bring the node back, or measure everything anew in another folder with --out"
            )
        found = _reserve(nodes, gpus, last, say, phase)
        if found is None:
            continue  # the nodes changed meanwhile
        node, device = found
        if device == last.get("name", device):
            if last.get("node") and host_of(last) != node.host:
                say(f"{phase}: node {last['node']} is gone; continuing on {node.name}, also {device}")
            return node
        unlike[node.id] = f"{node.name} ({device})"


def _reserve(
    nodes: list[Node], gpus: int, last: dict[str, Any], say: Callable[[str], None], phase: str
) -> tuple[Node, str | None] | None:
    """Wait until one of the nodes is free as a whole; that node, and its device's name where it may be another one."""
    from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

    bundle = {"CPU": float(int(nodes[0].cpus)) if nodes else 1.0} | ({"GPU": float(gpus)} if gpus else {})
    selector = [{_ID: f"in({','.join(node.id for node in nodes)})"}] if nodes else None
    group = placement_group([bundle], bundle_label_selector=selector)  # type: ignore[arg-type]
    wanted = " and ".join(f"{value:g} {name}" for name, value in bundle.items())
    said = False
    try:
        while not group.wait(PATIENCE_SECONDS):
            if not said:
                say(f"{phase}: waiting for a node with {wanted} free")
            said = True
            if nodes and not {node.id for node in nodes} <= {node.id for node in live_nodes()}:
                return None
        place = next(iter(placement_group_table(group)["bundles_to_node_id"].values()))
        node = next((node for node in live_nodes() if node.id == place), None)
        if node is None or not nodes:  # gone again; or just started, and not asked for as a whole
            return None
        known = not last or host_of(last) == node.host
        return node, last.get("name") if known else _device_name(group, gpus)
    finally:
        remove_placement_group(group)


def _device_name(group: Any, gpus: int) -> str:
    """What the record of a run there would call its device."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    strategy = PlacementGroupSchedulingStrategy(placement_group=group)
    probe = ray.remote(_probe).options(num_cpus=1, num_gpus=gpus, scheduling_strategy=strategy)
    return ray.get(probe.remote("cuda" if gpus else "cpu"))


def _probe(wanted: str) -> str:
    import torch

    from fastbp.environment import device_fingerprint
    from trainables.method_trainable import device_for

    return str(device_fingerprint(torch.device(device_for(wanted))).get("name"))


def split_blocks(runs: Iterable[RunConfig], ledger: Ledger, node: Node) -> list[str]:
    """A sentence for every block whose finished runs were made elsewhere than the rest will be."""
    blocks: dict[int | None, list[RunConfig]] = {}
    for run in runs:
        blocks.setdefault(run.block, []).append(run)
    out = []
    for block, members in blocks.items():
        done = [ledger.runs[run.key] for run in members if ledger.done(run.key)]
        elsewhere = sorted({_node_of(r) for r in done if host_of(r.device) not in ("", node.host)})
        if elsewhere and len(done) < len(members):
            out.append(
                f"{members[0].phase}: block {block} (seed {members[0].seed}) began on {', '.join(elsewhere)} and ends "
                f"on {node.name}, so its pairs span two machines with the same device"
            )
    return out


def _node_of(record: RunRecord) -> str:
    return str(record.device.get("node", "an unknown node"))


class NodeGone(tune.Stopper):
    """Ends a Tune experiment whose node died: its next trial would wait for that node for ever.

    Attributes:
        gone: whether it died.
    """

    def __init__(self, node: Node) -> None:
        self.node, self.gone, self._next = node, False, 0.0

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if not self.gone and time.monotonic() >= self._next:
            self._next = time.monotonic() + CHECK_SECONDS
            self.gone = self.node.id not in {node.id for node in live_nodes()}
        return self.gone
