"""Claims about what decorrelated backprop adds to a backprop step.

1. At 224x224 and batch 256 on a GPU, sample_fraction .01: at most 15 % of a backprop step for the ResNets.
2. There, at most a fifth of what a literal two-stage implementation adds (a convolution with R, then a 1x1 convolution
   with W, and the full F^3 update), written here as the naive peer.
3. At CIFAR size, where the F x F products dominate, `structure="block"` at sample_fraction .01: at most 30 %.

Overhead is the time of a step (forward, estimate, optimizer) over backprop's of the same round, less 1; medians over
rounds with 95 % intervals (of fewer than six rounds the range). FLOPs are counted in the dispatcher over the same
steps. "spec" is the count of the specification for the leanest form at 224x224, batch 256, convolutions only. Without a
CUDA device the GPU rows are not measured, and the CPU rows are at sizes that fit: their batches are small, which makes
every share larger. R learns from one image at least: of a batch of 8 or 16, a sample_fraction of .01 is that, and so is
.1.

    python benchmarks/dbp_overhead.py
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmark import environment, judge, median_interval, write_json
from fastbp import Backprop, DecorrelatedBP
from fastbp.bench import interleaved
from fastbp.flops import step_flops
from fastbp.layer_inputs import features, groups_of, readable_layers
from fastbp.methods.decorrelated import decorrelation_of
from fastbp.models import make_model

LIMITS = {
    "ResNets at 224 on a GPU, p = .01": 0.15,
    "naive peer's overhead over ours at 224 on a GPU": 5.0,
    "block at CIFAR size": 0.30,
}
SPEC = {  # p = .1 and p = .01, percent of a backprop step
    "resnet18": (43, 10), "resnet50": (27, 6), "alexnet": (43, 8), "vgg16": (25, 5), "vit_base_patch16_224": (17, 4),
}  # fmt: skip
GPU_ROWS = [(name, 224, 256) for name in SPEC]
CPU_ROWS = [
    ("cifar_resnet18", 32, 32), ("resnet18", 64, 16), ("resnet50", 64, 16), ("vgg16", 64, 8),
    ("vit_tiny_patch16_224", 224, 8), ("alexnet", 224, 16),
]  # fmt: skip
FEWER = {"vgg16": 3}  # rounds at most on a CPU, where one takes minutes
QUICK_ROWS = [("resnet20", 16, 2)]
CLAIMED = "block, p = 0.01"  # of the net at CIFAR size
FRACTIONS, INTERVALS = (0.1, 0.01), (1, 10)
T = TypeVar("T")


def make(name: str) -> nn.Module:
    """A net with 10 classes; `cifar_resnet18` has a 3x3 stem without pooling, `resnet20` is a small one for a look."""
    if name == "resnet20":
        return make_model("resnet20", (3, 16, 16), 10, {"width": 8})
    if name == "alexnet":
        import torchvision

        return torchvision.models.alexnet(num_classes=10)
    import timm

    net = timm.create_model(name.removeprefix("cifar_"), num_classes=10)
    if name.startswith("cifar_"):
        net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        net.maxpool = nn.Identity()
    return net


class TwoStage(nn.Module):
    """The naive peer of one layer: z = R x by a convolution with F outputs, y = W z by a 1x1 convolution."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, fraction: float) -> None:
        super().__init__()
        self.layer, self.fraction = [layer], fraction
        self.W, self.bias = nn.Parameter(layer.weight.detach().clone()), layer.bias
        self.R = torch.eye(layer.weight[0].numel(), device=layer.weight.device)
        self.z = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer[0]
        if isinstance(layer, nn.Linear):
            z = functional.linear(x, self.R)
            rows = z.reshape(-1, z.shape[-1])
            self.z = rows[: sampled(len(rows), self.fraction)].detach().clone()
            return functional.linear(z, self.W, self.bias)
        kernel = self.R.reshape(-1, *layer.weight.shape[1:])
        z = functional.conv2d(x, kernel, None, layer.stride, layer.padding, layer.dilation)
        kept = z[: sampled(len(z), self.fraction)].detach().clone()  # a view would keep all of z
        self.z = kept.permute(0, 2, 3, 1).reshape(-1, z.shape[1])
        return functional.conv2d(z, self.W.reshape(len(self.W), -1, 1, 1), self.bias)

    @torch.no_grad()
    def update(self, decor_lr: float, kappa: float) -> None:
        K = self.z.T @ self.z / len(self.z)
        M = (1 - kappa) * K
        M.diagonal().copy_(kappa * (K.diagonal() - 1))
        self.R = self.R - decor_lr * M @ self.R
        self.z = torch.empty(0)  # as for gradients below


def naive_step(net: nn.Module, fraction: float, x: Tensor, y: Tensor) -> tuple[Callable[[], None], Any]:
    net = copy.deepcopy(net)
    stages = []
    for path, layer in chosen(net).items():
        if groups_of(layer) > 1:
            continue
        parent, _, name = path.rpartition(".")
        stages.append(TwoStage(layer, fraction))
        setattr(net.get_submodule(parent), name, stages[-1])
    optimizer = torch.optim.SGD(net.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        for stage in stages:
            stage.update(1e-5, 1e-2)
        optimizer.zero_grad()  # the other candidates need the room

    return step, None


def our_step(net: nn.Module, method: Any, x: Tensor, y: Tensor) -> tuple[Callable[[], None], Any]:
    estimator = method.bind(copy.deepcopy(net), functional.cross_entropy)
    optimizer = torch.optim.SGD(estimator.model.parameters(), 1e-3, momentum=0.9)

    def step() -> None:
        estimator.backward(x, y)
        optimizer.step()
        optimizer.zero_grad()

    return step, estimator


def chosen(net: nn.Module) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return readable_layers(net, choose="all", max_features=4608, width=features, who="DecorrelatedBP")


def fractions_of(batch: int) -> tuple[float, ...]:
    """Those that sample different numbers of images; of two that do not, the smaller."""
    return tuple({sampled(batch, fraction): fraction for fraction in FRACTIONS}.values())


def sampled(batch: int, fraction: float) -> int:
    return max(1, int(batch * fraction))


def methods_of(quick: bool, device: torch.device, batch: int) -> dict[str, DecorrelatedBP]:
    """The settings that are timed; on a CPU the longest of them is left out."""
    out = {}
    for fraction in fractions_of(batch):
        for interval in INTERVALS:
            if device.type == "cuda" or interval == 1 or fraction == min(FRACTIONS):
                out[f"full, p = {fraction:g}, interval {interval}"] = DecorrelatedBP(
                    decor_lr=1e-5, sample_fraction=fraction, interval=interval
                )
        for structure in ("block", "channel"):
            out[f"{structure}, p = {fraction:g}"] = DecorrelatedBP(
                decor_lr=1e-5, sample_fraction=fraction, structure=structure
            )
    return dict(list(out.items())[-2:]) if quick else out


def measure(
    name: str, size: int, batch: int, rounds: int, device: torch.device, quick: bool, only: str = ""
) -> list[dict[str, Any]]:
    """One row per candidate, or of the candidate `only`; all in turn with backprop."""
    torch.manual_seed(0)
    net = make(name).to(device).train()
    x, y = torch.randn(batch, 3, size, size, device=device), torch.randint(10, (batch,), device=device)
    wanted = {label: method for label, method in methods_of(quick, device, batch).items() if only in ("", label)}
    methods: dict[str, Any] = {"backprop": Backprop(), **wanted}
    makers: dict[str, Callable[[], tuple[Callable[[], None], Any]]] = {
        label: partial(our_step, net, method, x, y) for label, method in methods.items()
    }
    for fraction in () if only else fractions_of(batch) if device.type == "cuda" else FRACTIONS[-1:]:
        makers[f"naive, p = {fraction:g}"] = partial(naive_step, net, fraction, x, y)
    periods = {label: getattr(methods.get(label), "interval", 1) for label in makers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers beyond max_features: both implementations leave them plain
        peaks = fitting(name, {label: partial(peak_bytes, makers[label], periods[label], device) for label in makers})
        made = {label: makers[label]() for label in peaks}
    calls = {label: repeated(step, periods[label]) for label, (step, _) in made.items()}
    estimators = {label: estimator for label, (_, estimator) in made.items() if estimator is not None}
    plain = estimators.pop("backprop")
    made.clear()
    seconds = timed(name, calls, peaks, rounds, device)
    base_flops = step_flops(plain, x, y)
    rows = []
    for label in calls:
        if label == "backprop":
            continue
        per_step = [t / periods.get(label, 1) for t in seconds[label]]
        ratio = [a / b - 1 for a, b in zip(per_step, seconds["backprop"], strict=True)]
        middle, low, high = median_interval(ratio)
        estimator = estimators.get(label)
        flops = step_flops(estimator, x, y) if estimator is not None else None
        fraction = float(label.split("p = ")[1].split(",")[0])
        spec = SPEC.get(name, (None, None))[FRACTIONS.index(fraction)]
        rows.append(
            {
                "net": name,
                "size": size,
                "batch": batch,
                "device": device.type,
                "what": label,
                "sample_fraction": fraction,
                "sampled_images": sampled(batch, fraction),
                "rounds": rounds,
                "backprop_ms": sorted(seconds["backprop"])[rounds // 2] * 1e3,
                "overhead": middle,
                "low": low,
                "high": high,
                "flops_overhead": flops / base_flops - 1 if flops and base_flops else None,
                "spec_percent_at_224_batch_256": spec,
                "matrix_mib": sum(row["bytes"] for row in estimator.report()) / 2**20 if estimator else None,
                "peak_mib_over_backprop": None if peaks[label] is None else (peaks[label] - peaks["backprop"]) / 2**20,
            }
        )
    return rows


def fitting(name: str, runs: dict[str, Callable[[], T]]) -> dict[str, T]:
    """What each of them returns; those for which the GPU has no room are left out, and named."""
    found = {}
    for label, run in runs.items():
        try:
            found[label] = run()
        except torch.OutOfMemoryError:
            print(f"{name}, {label}: does not fit into the GPU's memory")
    return found


def timed(
    name: str, calls: dict[str, Callable[[], None]], peaks: dict[str, int | None], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """As `interleaved`; the largest candidates, for which the GPU has no room beside the others, leave `calls`."""
    while True:
        try:
            return interleaved(calls, rounds, device)
        except torch.OutOfMemoryError:
            largest = max(calls, key=lambda label: peaks[label] or 0)
        del calls[largest]
        print(f"{name}, {largest}: does not fit into the GPU's memory beside the others")


def repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(times):
            step()

    return call


def peak_bytes(maker: Callable[[], tuple[Callable[[], None], Any]], steps: int, device: torch.device) -> int | None:
    """The most memory that one candidate allocates by itself, matrices and optimizer included; unknown on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()  # hooks hold the candidate before this one in cycles
    before = torch.cuda.memory_allocated(device)
    step, _ = maker()
    repeated(step, steps)()
    torch.cuda.reset_peak_memory_stats(device)
    repeated(step, steps)()
    return torch.cuda.max_memory_allocated(device) - before


def surgery(name: str, rounds: int, device: torch.device, batch: int) -> dict[str, float]:
    """Parametrized weights against an optimizer-side wrapper, without updates of R: seconds over plain backprop."""
    torch.manual_seed(0)
    net = make(name).to(device).train()
    x, y = torch.randn(batch, 3, 32, 32, device=device), torch.randint(10, (batch,), device=device)
    backprop, _ = our_step(net, Backprop(), x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parametrized, estimator = our_step(net, DecorrelatedBP(interval=10**9), x, y)
    wrapped = copy.deepcopy(net)
    matrices = {path: decorrelation_of(layer) for path, layer in estimator.layers.items()}
    weights = {path: wrapped.get_submodule(path).weight for path in matrices}
    masters = {path: nn.Parameter(weight.detach().clone()) for path, weight in weights.items()}
    others = [p for p in wrapped.parameters() if all(p is not w for w in weights.values())]
    optimizer = torch.optim.SGD([*masters.values(), *others], 1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        for weight in weights.values():
            weight.grad = None
        functional.cross_entropy(wrapped(x), y).backward()
        with torch.no_grad():
            for path, matrix in matrices.items():
                grad, form = weights[path].grad, matrix.layout
                masters[path].grad = grad + form.join(torch.bmm(form.split(grad), matrix.D.mT), grad)
            optimizer.step()
            for path, matrix in matrices.items():
                weights[path].copy_(matrix(masters[path]))

    seconds = interleaved({"backprop": backprop, "parametrized": parametrized, "wrapper": step}, rounds, device)
    return {
        name: median_interval([a / b for a, b in zip(seconds[name], seconds["backprop"], strict=True)])[0]
        for name in ("parametrized", "wrapper")
    }


def claims(rows: list[dict[str, Any]]) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """Figures that a limit bounds from above, those that it bounds from below, and the claims that are not measured."""
    gpu, naive, block = LIMITS
    resnets = [
        row["overhead"]
        for row in rows
        if row["device"] == "cuda" and row["size"] == 224 and row["net"].startswith("resnet")
        if row["what"] == "full, p = 0.01, interval 1"
    ]
    cifar = [row["overhead"] for row in rows if row["net"] == "cifar_resnet18" and row["what"] == CLAIMED]
    peers = naive_over_ours([row for row in rows if row["device"] == "cuda" and row["size"] == 224])
    most = {name: max(values) for name, values in ((gpu, resnets), (block, cifar)) if values}
    least = {naive: min(peers.values())} if peers else {}
    return most, least, [name for name in LIMITS if name not in {*most, *least}]


def naive_over_ours(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Net and fraction to the naive peer's overhead over ours, both with an update in every step."""
    ours = {_place(row): row["overhead"] for row in rows if row["what"].endswith("interval 1")}
    peers = [row for row in rows if row["what"].startswith("naive") and _place(row) in ours]
    return {
        f"{row['net']}, p = {row['sample_fraction']:g}": row["overhead"] / max(ours[_place(row)], 1e-3) for row in peers
    }


def _place(row: dict[str, Any]) -> tuple[str, float]:
    return row["net"], row["sample_fraction"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="one net and two rounds, to see that it runs")
    parser.add_argument("--out", default="results/benchmarks/dbp_overhead.json")
    arguments = parser.parse_args()
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # the naive peers fill the GPU
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # on a GPU the convolutions run in TF32; so do the products with R
    torch.backends.cudnn.benchmark = True
    rounds = 2 if arguments.quick else arguments.rounds
    sizes = QUICK_ROWS if arguments.quick else [*CPU_ROWS[:1], *GPU_ROWS] if device.type == "cuda" else CPU_ROWS
    rows: list[dict[str, Any]] = []
    for name, size, batch in sizes:
        batch = 256 if device.type == "cuda" else batch
        some = rounds if device.type == "cuda" else min(rounds, FEWER.get(name, rounds))
        new = measure(name, size, batch, some, device, arguments.quick)
        if name == "cifar_resnet18":  # a claim rests on one of its rows: more rounds of that
            (row,) = measure(name, size, batch, 3 * rounds, device, arguments.quick, only=CLAIMED)
            new = [row if row["what"] == old["what"] else old for old in new]
        rows += new
        write_json(arguments.out, {"limits": LIMITS, "rows": rows, **environment()})  # what follows may not fit
        print(f"{name}, {size}x{size}, batch {batch}, {device.type}: backprop {new[0]['backprop_ms']:.0f} ms")
        print(f"  p = .01 samples {new[-1]['sampled_images']} of {batch} images")
        for row in new:
            flops = "" if row["flops_overhead"] is None else f"{row['flops_overhead']:8.1%}"
            memory = "" if row["matrix_mib"] is None else f"{row['matrix_mib']:8.0f} MiB of R"
            interval = f"{row['low']:.1%} to {row['high']:.1%}"
            print(f"  {row['what']:32s} {row['overhead']:8.1%}  {interval:22s} FLOPs {flops:8s} {memory}", flush=True)
    ways = surgery(sizes[0][0], rounds, device, sizes[0][2])
    print(f"W R without updates, over backprop: {', '.join(f'{k} {v:.3f}' for k, v in ways.items())}")
    times = naive_over_ours(rows)
    if times:
        print(f"naive peer's overhead over ours: {', '.join(f'{net} {value:.1f}' for net, value in times.items())}")
    most, least, missing = claims(rows)
    if device.type != "cuda":
        missing += [f"{name} at {size}x{size}, batch {batch} on a GPU" for name, size, batch in GPU_ROWS]
    content = {"limits": LIMITS, "rows": rows, "surgery": ways, "naive_over_ours": times}
    content["not_measured"] = missing
    write_json(arguments.out, {**content, **environment()})
    for name in missing:
        print(f"not measured: {name}")
    if not arguments.quick:
        judge("dbp_overhead", most | least, LIMITS, arguments.out, least=least)


if __name__ == "__main__":
    main()
