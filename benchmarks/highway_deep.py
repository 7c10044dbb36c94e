"""Claims about Highway-BP on deep nets: what a step costs beside backprop's, and what its gradient is worth.

P_eff is the time of the input VJPs of all L blocks one after another over that of one VJP of all equal blocks at once.
The cost model of the method's rounds is then: speed-up over backprop = 3 / (1 + (k+2)/P_eff), where forward, input
gradient and weight gradient of the blocks cost the same; with `batched`, whose branches run once more as one,
3 / (1 + (k+3)/P_eff). ResNets have no equal blocks that could run as one: P_eff is 1 there.

A step takes at most 2.5 times what the cost model says with the measured P_eff: the model has a backward cost two
forwards, and where calls cost more than numbers autograd's costs less than that.

No speed-up is claimed: the last line of each table says where there is one, over the strongest backprop of that net:
eager or compiled, on a GPU each also as a CUDA graph; there the batched steps are captured too. All candidates train
the same net on the same batch, in turn, within one run. A ratio is the median over rounds of the ratio within a round,
with its 95 % interval.

The cosine is that of the blocks' gradient to backprop's, at the initial weights and after a short training by backprop
(texts of a Markov chain, noisy patterns), there also with gamma = 0.1 and with the min-residual combination: what is
nearly the gradient at first may not be so later.

    python benchmarks/highway_deep.py
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmark import environment, judge, median_interval, write_json
from fastbp import Backprop, Chain, HighwayBP
from fastbp.bench import interleaved
from fastbp.measurement import agreement
from fastbp.method import Method
from fastbp.models import make_model
from fastbp.nets import gpt_tiny, vit_tiny
from fastbp.tapes import BlockPlan, Tapes

ITERATIONS = (0, 1, 3, 5)
TRAINING_STEPS, TRAINING_BATCH = 200, 32
CHOICES: dict[str, dict[str, Any]] = {
    "gamma 0": {},
    "gamma .1": {"gamma": 0.1},
    "min_residual": {"combination": "min_residual"},
}
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
        by_block: whether blocks are compiled one by one, equal ones once: a very deep net as a whole takes minutes.
    """

    name: str
    make: Callable[[], nn.Module]
    x: tuple[int, ...]
    y: tuple[int, ...]
    classes: int = 10
    repeat: int = 1
    by_block: bool = False


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
    return Setting(
        f"ResNet-{depth}, {batch} x {side}x{side} pixels", make, (batch, 3, side, side), (batch,), by_block=True
    )


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


def batch_of(setting: Setting, device: torch.device, seed: int = 1, size: int | None = None) -> tuple[Tensor, Tensor]:
    """A text and its next characters, drawn from a Markov chain; or noisy patterns and what they are of."""
    fixed, drawn = (torch.Generator().manual_seed(number) for number in (0, seed))
    size = size or setting.x[0]
    if setting.x == setting.y:
        likely = torch.softmax(2 * torch.randn(setting.classes, setting.classes, generator=fixed), 1)
        text = [torch.randint(setting.classes, (size,), generator=drawn)]
        for _ in range(setting.x[1]):
            text.append(torch.multinomial(likely[text[-1]], 1, generator=drawn)[:, 0])
        tokens = torch.stack(text, 1).to(device)
        return tokens[:, :-1], tokens[:, 1:]
    patterns = torch.randn(setting.classes, *setting.x[1:], generator=fixed)
    y = torch.randint(setting.classes, (size,), generator=drawn)
    x = 0.2 * patterns[y] + torch.randn(size, *setting.x[1:], generator=drawn)
    return x.to(device), y.to(device)


def loss_fn(out: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(out.flatten(0, -2), y.flatten())


def net(setting: Setting, device: torch.device) -> Chain:
    torch.manual_seed(0)
    return setting.make().to(device).train()  # type: ignore[return-value]


def step_of(method: Method, setting: Setting, x: Tensor, y: Tensor) -> Step:
    """One forward and backward, without an optimizer."""
    model = net(setting, x.device)
    estimator = method.bind(model, loss_fn)

    def step() -> None:
        model.zero_grad()
        estimator.backward(x, y)

    step()  # looks at the increments
    return step


def compiled_step(setting: Setting, x: Tensor, y: Tensor) -> Step:
    """Backprop's, by torch.compile."""
    model = net(setting, x.device)
    for module in model.blocks if setting.by_block else [model]:
        module.compile()

    def step() -> None:
        model.zero_grad()
        loss_fn(model(x), y).backward()

    step()
    return step


def parts_of(setting: Setting, x: Tensor) -> dict[str, Step]:
    """The forward, and the input VJPs of all blocks: one after another, and those of equal blocks as one."""
    model = net(setting, x.device)
    blocks = model.residuals()
    with torch.no_grad():
        states = [model.stem(x)]
        for block in blocks:
            states.append(block(states[-1]))
    signals = [torch.ones_like(h) for h in states]  # a capture that failed leaves a GPU without random numbers
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
    with torch.cuda.stream(torch.cuda.Stream()):  # also puts the current stream back where the capture fails
        torch.cuda.synchronize()
        for _ in range(3):
            step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay


def trained(setting: Setting, device: torch.device, steps: int) -> Chain:
    """The net after a few steps of backprop."""
    model = net(setting, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for i in range(steps):
        optimizer.zero_grad()
        x, y = batch_of(setting, device, seed=2 + i, size=TRAINING_BATCH)
        loss_fn(model(x), y).backward()
        optimizer.step()
    return model


def cosines(model: Chain, x: Tensor, y: Tensor) -> dict[str, dict[int, float]]:
    """Of the blocks' gradient to backprop's, by choice and number of rounds; the net stays as it is."""

    def gradient(method: Method) -> list[Tensor | None]:
        copied = copy.deepcopy(model)
        method.bind(copied, loss_fn).backward(x, y)
        return [p.grad for p in copied.blocks.parameters()]

    exact = gradient(Backprop())
    return {
        name: {k: agreement(gradient(HighwayBP(iterations=k, **more)), exact)[0].item() for k in ITERATIONS}
        for name, more in CHOICES.items()
    }


def or_reason(make: Callable[[], Step], name: str) -> Step | None:
    """A candidate, or a line that says why there is none: a compiler may be missing, a step may not be capturable."""
    try:
        return make()
    except Exception as error:
        print(f"  left out: {name} ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})")
        return None


def measure(setting: Setting, device: torch.device, rounds: int, training: int) -> dict[str, Any]:
    """All candidates of one net in turn; times in seconds, P_eff, and a row per number of rounds and form."""
    print(f"\n{setting.name}", flush=True)
    x, y = batch_of(setting, device)
    found = {"initial": cosines(net(setting, device), x, y)}
    found["trained"] = cosines(trained(setting, device, training), x, y)
    parts = parts_of(setting, x)
    forms = ["loop", "batched"] if "VJPs, batched" in parts else ["loop"]
    steps: dict[str, Step | None] = {"backprop": step_of(Backprop(), setting, x, y)}
    steps["backprop, compiled"] = or_reason(lambda: compiled_step(setting, x, y), "backprop, compiled")
    for form in forms:
        for k in ITERATIONS:
            steps[f"{form} {k}"] = step_of(HighwayBP(iterations=k, batched=form == "batched"), setting, x, y)
    if device.type == "cuda":
        for name, step in list(steps.items()):
            if step is not None and not name.startswith("loop"):
                steps[f"{name}, graph"] = or_reason(lambda step=step: captured(step), f"{name}, graph")
    candidates = {name: step for name, step in steps.items() if step is not None} | parts
    repeated = {name: lambda step=step: [step() for _ in range(setting.repeat)] for name, step in candidates.items()}
    seconds = interleaved(repeated, rounds, device)
    each = {name: statistics.median(times) / setting.repeat for name, times in seconds.items()}
    strongest = min((name for name in each if name.startswith("backprop")), key=lambda name: each[name])
    p_eff = each["VJPs, loop"] / each["VJPs, batched"] if "VJPs, batched" in each else None
    rows = [row_of(seconds, each, form, k, p_eff, strongest) for k in ITERATIONS for form in forms]
    return {
        "name": setting.name,
        "blocks": len(net(setting, device).blocks),
        "p_eff": p_eff,
        "strongest": strongest,
        "seconds": each,
        "rows": rows,
        "cosines": found,
        "backward_over_forward": each["backprop"] / each["forward"] - 1,
    }


def row_of(
    seconds: dict[str, list[float]], each: dict[str, float], form: str, k: int, p_eff: float | None, strongest: str
) -> dict[str, Any]:
    """One form and number of rounds beside the eager backprop, the cost model and the strongest backprop."""
    name = f"{form} {k}"
    best = min((n for n in (name, f"{name}, graph") if n in each), key=lambda n: each[n])
    speed_up, low, high = faster(seconds, "backprop", name)
    model = 3 / (1 + ((k + 2) if form == "loop" else (k + 3) / (p_eff or 1.0)))
    row = {"iterations": k, "form": form, "seconds": each[name], "model": model, "best": best}
    return row | {"speed_up": speed_up, "low": low, "high": high, "over_strongest": faster(seconds, strongest, best)}


def faster(seconds: dict[str, list[float]], baseline: str, name: str) -> tuple[float, float, float]:
    """The baseline's time over the candidate's in the same round: median and its interval."""
    return median_interval([a / b for a, b in zip(seconds[baseline], seconds[name], strict=True)])


def show(found: dict[str, Any]) -> None:
    ms = {name: 1e3 * value for name, value in found["seconds"].items()}
    one = (
        "nothing runs as one"
        if found["p_eff"] is None
        else f"{ms['VJPs, batched']:.2f} as one: P_eff {found['p_eff']:.2f}"
    )
    print(
        f"  {found['blocks']} blocks; ms: forward {ms['forward']:.2f}, "
        + ", ".join(f"{name} {ms[name]:.2f}" for name in ms if name.startswith("backprop"))
    )
    print(f"  input VJPs of all blocks {ms['VJPs, loop']:.2f} one by one, {one}")
    print(
        f"  {'k':>3s} {'form':>8s} {'ms':>9s} {'over eager':>11s} {'95 % interval':>15s} {'model':>7s} "
        f"{'over ' + found['strongest']:>28s}"
    )
    for row in found["rows"]:
        middle, low, high = row["over_strongest"]
        print(
            f"  {row['iterations']:3d} {row['form']:>8s} {1e3 * row['seconds']:9.2f} {row['speed_up']:11.2f} "
            f"{row['low']:7.2f} to {row['high']:.2f} {row['model']:7.2f} {middle:12.2f} [{low:.2f}, {high:.2f}]"
        )
    print(f"  {'cosine':>8s}" + "".join(f"{f'k = {k}':>9s}" for k in ITERATIONS))
    for state, choices in found["cosines"].items():
        for choice, by_k in choices.items():
            print(f"  {'':8s}" + "".join(f"{value:9.3f}" for value in by_k.values()) + f"  {state}, {choice}")
    print(f"  {verdict(found)}")


def verdict(found: dict[str, Any]) -> str:
    """Where it wins over the strongest backprop, or that it loses, in one sentence."""
    wins = sorted({row["iterations"] for row in found["rows"] if row["over_strongest"][1] > 1})
    losses = sorted({row["iterations"] for row in found["rows"]} - set(wins))
    if not wins:
        best = max(found["rows"], key=lambda row: row["over_strongest"][0])
        ratio = best["over_strongest"][0]
        ahead = f"at best {ratio:.2f} times as fast as {found['strongest']} (k = {best['iterations']})"
        return f"It {'wins nowhere beyond the interval' if ratio > 1 else 'loses at every k'}: {ahead}."
    rest = f", and loses or draws at k = {', '.join(map(str, losses))}" if losses else ""
    return f"It wins over {found['strongest']} at k = {', '.join(map(str, wins))}{rest}."


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
    torch.set_float32_matmul_precision("high" if on_gpu else "highest")  # TF32, as a GPU's convolutions have it
    settings = QUICK if arguments.quick else GPU if on_gpu else CPU
    nets = []
    for setting in settings:
        sizes = (2, 2) if arguments.quick else (arguments.rounds, TRAINING_STEPS)
        nets.append(measure(setting, device, *sizes))
        show(nets[-1])
        write_json(arguments.out, {"quick": arguments.quick, "nets": nets, **environment(device)})  # the next may fail
    if not on_gpu:
        print("\nnot measured: a GPU, and CUDA graphs")
    if arguments.quick:
        return
    worst = max(row["model"] / row["speed_up"] for found in nets for row in found["rows"])
    judge("highway_deep", {name: worst for name in SLOWER}, SLOWER, arguments.out)


if __name__ == "__main__":
    main()
