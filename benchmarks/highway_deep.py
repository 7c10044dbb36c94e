"""Claims about Highway-BP on deep nets: what a step costs beside backprop's, and what its gradient is worth.

P_eff is the time of the input VJPs of all L blocks one after another over that of one VJP of all equal blocks at once.
The cost model of the method's rounds is then: speed-up over backprop = 3 / (1 + (k+2)/P_eff), where forward, input
gradient and weight gradient of the blocks cost the same; with `batched`, whose branches run once more as one,
3 / (1 + (k+3)/P_eff). ResNets have no equal blocks that could run as one: P_eff is 1 there.

1. Where blocks are too small to fill the device, `batched` is not slower than backprop: at least 1.05 times as fast at
   k = 0 on the first net of the list, a GPT of 24 blocks on one short text. (The ceiling is a step over its forward.)
2. A step takes at most 2.5 times what the cost model says with the measured P_eff: the model has a backward cost two
   forwards, and where calls cost more than numbers autograd's costs less than that.

Elsewhere it loses, and the last line of each table says so. All candidates train the same net on the same batch, in
turn, within one run. A speed-up is the median over rounds of the ratio within a round, with its 95 % interval; the
cosine is that of the blocks' gradient to backprop's, at the initial weights. On a GPU, backprop and the batched steps
are captured in CUDA graphs too.

    python benchmarks/highway_deep.py
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark import environment, judge, median_interval, write_json
from fastbp import Backprop, Chain, HighwayBP
from fastbp.alike import alike_blocks
from fastbp.bench import interleaved
from fastbp.method import Method
from fastbp.models import make_model
from fastbp.nets import gpt_tiny, vit_tiny
from fastbp.tapes import BlockPlan, Tapes

ITERATIONS = (0, 1, 3, 5)
FASTER = {"speed-up at k = 0 on small blocks": 1.05}
SLOWER = {"step over the cost model": 2.5}
Step = Callable[[], Any]


@dataclass(frozen=True)
class Setting:
    """One net and batch.

    Attributes:
        name: what the table calls it.
        make: the net.
        x, y: the shapes of the batch; y holds one label per entry.
        classes: how many labels; also the vocabulary of a text net.
        repeat: steps per measurement.
    """

    name: str
    make: Callable[[], nn.Module]
    x: tuple[int, ...]
    y: tuple[int, ...]
    classes: int = 10
    repeat: int = 1


def gpt(batch: int, tokens: int, dim: int, depth: int = 12, repeat: int = 1) -> Setting:
    name = f"GPT, {depth} layers of {dim}, {batch} x {tokens} tokens"
    shape = (batch, tokens)
    return Setting(name, lambda: gpt_tiny((tokens,), 65, dim=dim, depth=depth), shape, shape, 65, repeat)


def vit(batch: int, side: int, patch: int, dim: int, depth: int = 12, repeat: int = 1) -> Setting:
    name = f"ViT, {depth} layers of {dim}, {batch} x {(side // patch) ** 2} tokens"
    heads = max(1, dim // 64)
    sizes = {"patch": patch, "dim": dim, "depth": depth, "heads": heads, "mlp_ratio": 4}
    return Setting(
        name, lambda: vit_tiny((3, side, side), 10, **sizes), (batch, 3, side, side), (batch,), repeat=repeat
    )


def resnet(batch: int, side: int, depth: int = 110) -> Setting:
    make = lambda: make_model(f"resnet{depth}", (3, side, side), 10, {}, seed=0)  # noqa: E731
    return Setting(f"ResNet-{depth}, {batch} x {side}x{side} pixels", make, (batch, 3, side, side), (batch,))


CPU = [gpt(1, 8, 32, repeat=5), gpt(1, 64, 64, repeat=2), gpt(8, 64, 64), vit(8, 32, 4, 64), resnet(8, 16)]
GPU = [
    gpt(1, 64, 64),
    gpt(1, 256, 256),
    gpt(32, 256, 256),
    vit(1, 224, 16, 192),
    vit(64, 224, 16, 192),
    resnet(1, 32),
    resnet(128, 32),
]
QUICK = [gpt(1, 4, 8, depth=2), resnet(2, 8, depth=20)]


def batch_of(setting: Setting, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    y = torch.randint(setting.classes, setting.y, generator=generator)
    if setting.x == setting.y:  # a text: the next token
        return y.to(device), y.roll(-1, -1).to(device)
    return torch.randn(setting.x, generator=generator).to(device), y.to(device)


def loss_fn(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


def net(setting: Setting, device: torch.device) -> Chain:
    torch.manual_seed(0)
    return setting.make().to(device).train()  # type: ignore[return-value]


def step_of(method: Method, setting: Setting, x: Tensor, y: Tensor) -> tuple[Step, Chain]:
    """One forward and backward, without an optimizer; the net whose gradients it leaves."""
    model = net(setting, x.device)
    estimator = method.bind(model, loss_fn)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        estimator.backward(x, y)

    step()  # looks at the increments
    return step, model


def parts_of(setting: Setting, x: Tensor) -> dict[str, Step]:
    """The forward, and the input VJPs of all blocks: one after another, and those of equal blocks as one."""
    model = net(setting, x.device)
    blocks = model.residuals()
    with torch.no_grad():
        states = [model.stem(x)]
        for block in blocks:
            states.append(block(states[-1]))
    signals = [torch.randn_like(h) for h in states]
    parts: dict[str, Step] = {"forward": lambda: model(x)}
    looped = Tapes(BlockPlan(blocks), states[0])
    parts["VJPs, loop"] = lambda: looped.cross(signals, len(blocks))
    plan = BlockPlan(blocks, batched=True)
    if plan.alike:
        together = Tapes(plan, states[0])
        parts["VJPs, batched"] = lambda: together.cross(signals, len(blocks))
    return parts


def captured(step: Step) -> Step:
    """The step as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def block_gradient(model: Chain) -> Tensor:
    return torch.cat([p.grad.flatten().double() for p in model.blocks.parameters() if p.grad is not None])


def measure(setting: Setting, device: torch.device, rounds: int) -> dict[str, Any]:
    """All candidates of one net in turn; times in seconds, P_eff, and a row per number of rounds and form."""
    x, y = batch_of(setting, device)
    backprop, exact = step_of(Backprop(), setting, x, y)
    steps: dict[str, Step] = {"backprop": backprop}
    rows = []
    forms = ["loop", "batched"] if alike_blocks(exact.residuals()) else ["loop"]
    for k in ITERATIONS:
        for form in forms:
            step, model = step_of(HighwayBP(iterations=k, batched=form == "batched"), setting, x, y)
            steps[f"{form} {k}"] = step
            cosine = F.cosine_similarity(block_gradient(model), block_gradient(exact), dim=0).item()
            rows.append({"iterations": k, "form": form, "cosine": cosine})
    if device.type == "cuda":
        steps |= {f"{name}, graph": captured(step) for name, step in steps.items() if not name.startswith("loop")}
    candidates = steps | parts_of(setting, x)
    repeated = {name: lambda step=step: [step() for _ in range(setting.repeat)] for name, step in candidates.items()}
    seconds = interleaved(repeated, rounds, device)
    each = {name: statistics.median(times) / setting.repeat for name, times in seconds.items()}
    together = each.get("VJPs, batched", each["VJPs, loop"])
    p_eff = {"loop": 1.0, "batched": each["VJPs, loop"] / together}
    for row in rows:
        name, k, form = f"{row['form']} {row['iterations']}", row["iterations"], row["form"]
        row["seconds"] = each[name]
        row["speed_up"], row["low"], row["high"] = faster(seconds, "backprop", name)
        row["model"] = 3 / (1 + (k + (2 if form == "loop" else 3)) / p_eff[form])
        if f"{name}, graph" in seconds:
            row["graph_speed_up"] = faster(seconds, "backprop, graph", f"{name}, graph")[0]
    found = {
        "name": setting.name,
        "blocks": len(exact.blocks),
        "p_eff": p_eff["batched"],
        "seconds": each,
        "rows": rows,
    }
    return found | {"backward_over_forward": each["backprop"] / each["forward"] - 1}


def faster(seconds: dict[str, list[float]], baseline: str, name: str) -> tuple[float, float, float]:
    """The baseline's time over the candidate's in the same round: median and its interval."""
    return median_interval([a / b for a, b in zip(seconds[baseline], seconds[name], strict=True)])


def show(found: dict[str, Any]) -> None:
    ms = {name: 1e3 * value for name, value in found["seconds"].items()}
    batched = f"{ms['VJPs, batched']:.2f}" if "VJPs, batched" in ms else "-"
    print(f"\n{found['name']}: {found['blocks']} blocks")
    print(
        f"  ms: forward {ms['forward']:.2f}, step of backprop {ms['backprop']:.2f}, input VJPs of all blocks "
        f"{ms['VJPs, loop']:.2f} one by one, {batched} as one: P_eff {found['p_eff']:.2f}"
    )
    print(f"  {'k':>3s} {'cosine':>8s} {'form':>8s} {'ms':>9s} {'speed-up':>9s} {'95 % interval':>18s} {'model':>7s}")
    for row in found["rows"]:
        interval = f"{row['low']:.2f} to {row['high']:.2f}"
        graph = f"  as graphs {row['graph_speed_up']:.2f}" if "graph_speed_up" in row else ""
        print(
            f"  {row['iterations']:3d} {row['cosine']:8.4f} {row['form']:>8s} {1e3 * row['seconds']:9.2f} "
            f"{row['speed_up']:9.2f} {interval:>18s} {row['model']:7.2f}{graph}"
        )
    print(f"  {verdict(found)}")


def verdict(found: dict[str, Any]) -> str:
    """Where it wins, or that it loses, in one sentence."""
    wins = sorted({row["iterations"] for row in found["rows"] if row["low"] > 1})
    losses = sorted({row["iterations"] for row in found["rows"]} - set(wins))
    if not wins:
        best = max(found["rows"], key=lambda row: row["speed_up"])
        ahead = f"at best {best['speed_up']:.2f} times as fast as backprop (k = {best['iterations']})"
        return f"It {'wins nowhere beyond the interval' if best['speed_up'] > 1 else 'loses at every k'}: {ahead}."
    rest = f", and loses or draws at k = {', '.join(map(str, losses))}" if losses else ""
    return f"It wins at k = {', '.join(map(str, wins))}{rest}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu", action="store_true", help="measure on the CPU although there is a GPU")
    parser.add_argument("--quick", action="store_true", help="small nets, to see that it runs; proves nothing")
    parser.add_argument("--out", default="results/benchmarks/highway_deep.json")
    arguments = parser.parse_args()
    on_gpu = torch.cuda.is_available() and not arguments.cpu
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.set_num_threads(1)
    settings = QUICK if arguments.quick else GPU if on_gpu else CPU
    nets = []
    for setting in settings:
        nets.append(measure(setting, device, 2 if arguments.quick else arguments.rounds))
        show(nets[-1])
    if not on_gpu:
        print("\nnot measured: a GPU, and CUDA graphs")
    write_json(arguments.out, {"quick": arguments.quick, "device": device.type, "nets": nets, **environment()})
    if arguments.quick:
        return
    (first,) = [row for row in nets[0]["rows"] if (row["form"], row["iterations"]) == ("batched", 0)]
    worst = max(row["model"] / row["speed_up"] for found in nets for row in found["rows"])
    figures = {name: worst for name in SLOWER} | {name: first["speed_up"] for name in FASTER}
    judge("highway_deep", figures, SLOWER | FASTER, arguments.out, least=FASTER)


if __name__ == "__main__":
    main()
