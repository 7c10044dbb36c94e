"""Claims about DDG with one process per module, against backprop, 1F1B with flush and data parallelism.

1. K = 2 on two processes of one thread each: at least 1.6 times the throughput of backprop on one thread, and at least
   1.0 times that of backprop on both threads, on a balanced net that is bound by computing. All candidates train the
   same net on the same batch, in turn, within one run; the others are blocked meanwhile. The figure is the median over
   rounds of the ratio within a round, with its quartiles. "CPU ms" is what the busiest process computed per batch: a
   machine that others use at the same time shows in a time per batch well above it.
2. Modules that sleep: K = 2, 3, 4 take max_k(F_k + B_k) per batch within 20 %, F and B a module's forward and backward.
3. Memory: what module k holds at its peak is d+1 batches and, of `stash`, as many copies of its weights.

Where there is a CUDA device for every process, each has its own and "threads" mean nothing.

    python benchmarks/ddg_speed.py
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmark import environment, judge, write_json
from crew import Crew, devices_suffice
from ddg_memory import memory_rows
from fastbp import DDG
from fastbp.bench import interleaved
from fastbp.methods.ddg import Cutter
from fastbp.models import make_model
from naps import NAPS, nap_rows

NAP_LIMIT = 1.2
NET = {"blocks": 8, "width": 48, "batch": 16}
QUICK_NET = {"blocks": 4, "width": 8, "batch": 8}
MICRO_BATCHES = (4, 8)
DDG_NAME, BP_ONE, BP_TWO = "DDG, K = 2, two processes", "backprop, one thread", "backprop, two threads"
LIMITS = {BP_ONE: 1.6, BP_TWO: 1.0}

Step = Callable[[], Any]


def setting(device: torch.device, blocks: int, width: int, batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The net, one batch of images and its labels; the same in every process."""
    model = make_model("resnet_tiny", (3, 32, 32), 10, {"blocks": blocks, "width": width}, seed=0)
    torch.manual_seed(1)
    return model.to(device).train(), torch.randn(batch, 3, 32, 32).to(device), torch.arange(batch).to(device) % 10


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9, nesterov=True)


def backprop(rank: int, ranks: int, device: torch.device, **net: int) -> tuple[Step, Any]:
    """The whole net; with more than one rank data parallel, each with its share of the batch."""
    model, x, y = setting(device, **net)
    x, y = x.chunk(ranks)[rank], y.chunk(ranks)[rank]
    forward: nn.Module = model
    if ranks > 1:
        forward = nn.parallel.DistributedDataParallel(model)
    optimizer = sgd(model.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(forward(x), y).backward()
        optimizer.step()

    return step, None


def delayed(rank: int, ranks: int, device: torch.device, **net: int) -> tuple[Step, Any]:
    """One module of DDG; tells the split table."""
    model, x, y = setting(device, **net)
    estimator = DDG(modules=ranks, processes=ranks > 1, split="time" if ranks > 1 else "auto").bind(
        model, nn.functional.cross_entropy
    )
    estimator.prepare(x, y)
    optimizer = sgd(estimator.param_groups())
    estimator.start_epoch(0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        estimator.backward(x, y)
        optimizer.step()

    return step, estimator.table()


def pipelined(
    rank: int, ranks: int, device: torch.device, cuts: tuple[int, ...], micro_batches: int, **net: int
) -> tuple[Step, Any]:
    """One stage of torch's 1F1B schedule, which ends every batch with a flush: the exact gradient."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    model, x, y = setting(device, **net)
    cutter = Cutter(DDG(modules=ranks, cuts=cuts), model, nn.functional.cross_entropy)
    stage = PipelineStage(cutter.nets()[rank], rank, ranks, device)
    schedule = Schedule1F1B(stage, micro_batches, loss_fn=nn.functional.cross_entropy)
    optimizer = sgd(stage.submod.parameters())

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        if rank == 0:
            schedule.step(x)
        elif rank == ranks - 1:
            schedule.step(target=y, losses=[])
        else:
            schedule.step()
        optimizer.step()

    return step, None


def step_rows(rounds: int, steps: int, net: dict[str, int], micro_batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """Seconds per batch of every candidate, and how many times their throughput DDG has."""
    crews = {DDG_NAME: Crew(delayed, 2, 1, **net)}
    table = crews[DDG_NAME].told[0]
    shares = [f"{row['blocks']} blocks, {row['time_share']:.0%} of the time" for row in table]
    print(f"split: {'; '.join(shares)}")
    crews["DDG, K = 1, one thread"] = Crew(delayed, 1, 1, **net)
    crews[BP_ONE] = Crew(backprop, 1, 1, **net)
    if not devices_suffice(2):
        crews[BP_TWO] = Crew(backprop, 1, 2, **net)
    cuts = tuple(int(row["first_block"]) for row in table[1:])
    for count in micro_batches:
        crews[f"1F1B with flush, {count} micro-batches"] = Crew(pipelined, 2, 1, cuts=cuts, micro_batches=count, **net)
    crews["data parallel, two processes"] = Crew(backprop, 2, 1, **net)
    seconds = interleaved({name: lambda crew=crew: crew(steps) for name, crew in crews.items()}, rounds)
    for crew in crews.values():
        crew.close()
    cpu = {name: max(crew.cpu_seconds) / crew.steps for name, crew in crews.items()}
    return [row | {"cpu_seconds_per_batch": cpu[row["name"]]} for row in _compared(seconds, steps)]


def _compared(seconds: dict[str, list[float]], steps: int) -> Iterator[dict[str, Any]]:
    for name, times in seconds.items():
        pairs = [a / b for a, b in zip(times, seconds[DDG_NAME], strict=True)]
        low, middle, high = statistics.quantiles(pairs, n=4, method="inclusive")
        yield {
            "name": name,
            "seconds_per_batch": statistics.median(times) / steps,
            "ddg_throughput": middle,
            "low": low,
            "high": high,
        }


def show_steps(rows: list[dict[str, Any]]) -> None:
    print(f"{'':36s} {'ms per batch':>13s} {'CPU ms':>7s} {'throughput of DDG':>18s} {'quartiles':>18s}")
    for row in rows:
        quartiles = f"{row['low']:.3f} to {row['high']:.3f}"
        wall, cpu = (row[name] * 1e3 for name in ("seconds_per_batch", "cpu_seconds_per_batch"))
        print(f"{row['name']:36s} {wall:13.1f} {cpu:7.1f} {row['ddg_throughput']:18.3f} {quartiles:>18s}")


def show_naps(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'modules that sleep, ms':36s} {'slowest':>9s} {'measured':>9s} {'ratio':>7s} {'eager':>7s} {'barrier':>8s}"
    )
    for row in rows:
        print(
            f"{row['name']:36s} {row['lazy'] * 1e3:9.0f} {row['measured'] * 1e3:9.1f} {row['ratio']:7.3f} "
            f"{row['eager'] * 1e3:7.0f} {row['barrier'] * 1e3:8.0f}"
        )


def show_memory(rows: list[dict[str, Any]]) -> None:
    print(f"{'memory at the peak':36s} {'module':>7s} {'delay':>6s} {'MB':>8s} {'formula':>8s} {'ratio':>7s}")
    for row in rows:
        print(
            f"{row['name']:36s} {row['module']:7d} {row['delay']:6d} {row['bytes'] / 1e6:8.2f} "
            f"{row['formula'] / 1e6:8.2f} {row['ratio']:7.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=10, help="per candidate and round")
    parser.add_argument("--quick", action="store_true", help="a small net, to see that it runs; proves nothing")
    parser.add_argument("--out", default="results/benchmarks/ddg_speed.json")
    arguments = parser.parse_args()
    if not dist.is_available():
        raise SystemExit("this torch is built without torch.distributed")
    net, rounds, steps = (QUICK_NET, 2, 3) if arguments.quick else (NET, arguments.rounds, arguments.steps)
    memory = memory_rows()
    show_memory(memory)
    naps = nap_rows(NAPS[:1] if arguments.quick else NAPS, 6 if arguments.quick else 15)
    show_naps(naps)
    rows = step_rows(rounds, steps, net, MICRO_BATCHES[:1] if arguments.quick else MICRO_BATCHES)
    show_steps(rows)
    place = environment(torch.device("cuda" if devices_suffice(2) else "cpu"))
    found = {"quick": arguments.quick, "net": net, "rounds": rounds, "steps": steps, **place}
    write_json(arguments.out, found | {"rows": rows, "naps": naps, "memory": memory})
    if arguments.quick:
        return
    throughput = {f"times {row['name']}": row["ddg_throughput"] for row in rows if row["name"] in LIMITS}
    for name in LIMITS.keys() - {row["name"] for row in rows}:
        print(f"not measured, every process has a GPU: {name}")
    naps_limit = {"modules that sleep": NAP_LIMIT}
    figures = throughput | {"modules that sleep": max(row["ratio"] for row in naps)}
    limits = naps_limit | {f"times {k}": v for k, v in LIMITS.items()}
    judge("ddg_speed", figures, limits, arguments.out, least=throughput)


if __name__ == "__main__":
    main()
