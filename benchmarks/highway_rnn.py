"""Claims about Highway-BP over time, beside three ways to backpropagate exactly through a GRU or LSTM layer.

On a GPU, a training step's forward and backward with k = 5 rounds and L = 1024 steps is

1. at least 3 times as fast as backpropagation through a Python loop over cells, which the paper compares with, for
   every cell and width of the table;
2. and somewhere in the table, at some k, at least 1.5 times as fast as torch's own layer (cuDNN), each of the two as
   one CUDA graph where that is its faster form.

On one CPU thread, with a batch of 8, for a GRU of width 16 and with k = 5 and L = 1024,

3. at least 3 times as fast as the loop and 2 times as fast as torch's own layer. For an LSTM torch has one compiled
   kernel (oneDNN), and no such claim is made: the table shows where Highway-BP loses.

All candidates train the same weights on the same batch: the loop, torch's layer, torch's forward alone, Highway-BP for
every k, and fixed-point iteration (FPI: Highway-BP with gamma = 1, so without a highway), timed at some k. With a loss
at every step FPI is truncated backpropagation whose window slides, every loss through its last k + 1 cells: it stands
for both. On CUDA the loop, the layer and Highway-BP are measured as one CUDA graph each, too, and compared graph with
graph; what cannot be captured is left out, with the reason.

They run in turn, in an order that reverses every round; figures are medians over rounds of ratios within a round, with
their 95 % interval. Beside every time stands the cosine of its gradient to the exact one, of the layer's parameters
(the head's gradient is exact whatever k is), after a short training by plain backprop to repeat the symbol of 8 steps
ago, with a loss at every step. a + b k is fitted to the times. The map shows where Highway-BP is ahead of torch's layer
beyond the interval; elsewhere it is not.

    python benchmarks/highway_rnn.py
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from benchmark import environment, judge, median_interval, write_json
from fastbp import Backprop, HighwayBP
from fastbp.bench import interleaved
from fastbp.recurrent import Recurrent

LIMITS = {
    "cuda": {"times the loop, k = 5, L = 1024, least": 3.0, "times torch's layer, most": 1.5},
    "cpu": {"times the loop, GRU of 16, k = 5, L = 1024": 3.0, "times torch's layer, GRU of 16, k = 5, L = 1024": 2.0},
}
SYMBOLS, DELAY, TRAINING_STEPS = 16, 8, 40
LOOP, LAYER, FORWARD, FPI, GRAPH = "loop", "layer", "forward", "fpi ", " graph"  # before a k, behind a name

Step = Callable[[], Any]


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        fpi: those ks at which FPI is timed.
        steps: of one timed call.
    """

    lengths: tuple[int, ...]
    widths: tuple[int, ...]
    batch: int
    ks: tuple[int, ...]
    fpi: tuple[int, ...]
    rounds: int
    steps: int


CUDA = Sizes((256, 512, 1024), (64, 256, 512), 128, (0, 1, 2, 5, 10, 20), (5, 20), 9, 3)
CPU = Sizes((256, 512, 1024), (16, 64), 8, (0, 1, 2, 5, 10, 20), (5, 20), 7, 1)
QUICK = Sizes((12, 24), (8,), 2, (0, 2), (2,), 2, 1)


def net(cell: str, width: int, device: torch.device) -> Recurrent:
    """A layer over one-hot symbols, with logits at every step."""
    torch.manual_seed(0)
    layer = {"gru": nn.GRU, "lstm": nn.LSTM}[cell](SYMBOLS, width)
    return Recurrent(nn.Identity(), [layer], nn.Linear(width, SYMBOLS), last_step=False).to(device)


def batch(length: int, size: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Symbols as x (B, L, SYMBOLS), and those of DELAY steps ago as y (B, L)."""
    generator = torch.Generator().manual_seed(seed)
    symbols = torch.randint(SYMBOLS, (size, length + DELAY), generator=generator)
    return one_hot(symbols[:, DELAY:], SYMBOLS).float().to(device), symbols[:, :-DELAY].to(device)


def loss_of(logits: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), y.flatten())


def train(model: Recurrent, size: int, steps: int, device: torch.device) -> None:
    """Plain backprop, so that gradients reach back some steps."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for i in range(steps):
        optimizer.zero_grad(set_to_none=True)
        x, y = batch(64, 4 * size, device, seed=1 + i)
        loss_of(model(x), y).backward()
        optimizer.step()


def through_cells(model: Recurrent) -> Callable[[nn.Module, Tensor], Tensor]:
    """Runs the layer as a Python loop over torch's cells, which share its weights."""
    layer: Any = model.layers[0]
    kind = nn.GRUCell if isinstance(layer, nn.GRU) else nn.LSTMCell
    cell = kind(layer.input_size, layer.hidden_size, device=layer.weight_ih_l0.device)
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        setattr(cell, name, getattr(layer, f"{name}_l0"))

    def run(_: nn.Module, x: Tensor) -> Tensor:
        state, out = None, []
        for x_t in x:
            state = cell(x_t, state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(out)

    return run


def candidates(model: Recurrent, x: Tensor, y: Tensor, ks: tuple[int, ...]) -> dict[str, Step]:
    """One forward and backward by name, gradients in `p.grad`."""
    run = through_cells(model)

    def loop() -> None:
        model.zero_grad(set_to_none=True)
        loss_of(model.compute(x, run), y).backward()

    def forward() -> None:
        with torch.no_grad():
            model(x)

    def method(chosen: Backprop | HighwayBP) -> Step:
        estimator = chosen.bind(model, loss_of)

        def step() -> None:
            model.zero_grad(set_to_none=True)
            estimator.backward(x, y)

        return step

    found = {LOOP: loop, LAYER: method(Backprop()), FORWARD: forward}
    found |= {str(k): method(HighwayBP(iterations=k)) for k in ks}
    return found | {f"{FPI}{k}": method(HighwayBP(iterations=k, gamma=1.0)) for k in ks}


def with_graphs(model: Recurrent, steps: dict[str, Step]) -> dict[str, Step]:
    """Behind the candidates those of them that take a gradient and can be captured, each as one CUDA graph."""
    graphs = {f"{name}{GRAPH}": captured(name, model, step) for name, step in steps.items() if name != FORWARD}
    return steps | {name: step for name, step in graphs.items() if step is not None}


def captured(name: str, model: Recurrent, step: Step) -> Step | None:
    """The step as one CUDA graph, gradients in `p.grad`; None, with a line that says why, where that fails."""
    try:
        want = gradient(model, step)
        replay = capture(model, step)
        error = ((gradient(model, replay) - want).norm() / want.norm()).item()
        if error > 1e-2:  # TF32 apart
            raise RuntimeError(f"its replay's gradient is {error:.2g} from the step's")
        return replay
    except Exception as error:
        reason = str(error).partition("\n")[0]
        print(f"{name}: left out as a CUDA graph: {type(error).__name__}: {reason}", flush=True)
        model.zero_grad(set_to_none=True)
        return None


def capture(model: Recurrent, step: Step) -> Step:
    with torch.cuda.stream(torch.cuda.Stream()):  # also puts the current stream back where the capture fails
        torch.cuda.synchronize()
        step()
        torch.cuda.synchronize()
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    grads = [(p, p.grad) for p in model.parameters()]

    def replay() -> None:
        graph.replay()
        for p, grad in grads:
            p.grad = grad

    return replay


def gradient(model: Recurrent, step: Step) -> Tensor:
    """Of the layer's parameters."""
    step()
    return torch.cat([p.grad.flatten() for p in model.layers.parameters() if p.grad is not None]).double()


def measure(cell: str, width: int, sizes: Sizes, device: torch.device, training: int) -> list[dict[str, Any]]:
    """One row per length and k."""
    model = net(cell, width, device)
    train(model, sizes.batch, training, device)
    rows: list[dict[str, Any]] = []
    for length in sizes.lengths:
        x, y = batch(length, sizes.batch, device)
        steps = candidates(model, x, y, sizes.ks)
        exact = gradient(model, steps[LAYER])
        cosines = {
            name: torch.cosine_similarity(gradient(model, steps[name]), exact, 0).item()
            for name in (f"{kind}{k}" for kind in ("", FPI) for k in sizes.ks)
        }
        untimed = {f"{FPI}{k}" for k in sizes.ks if k not in sizes.fpi}
        steps = {name: step for name, step in steps.items() if name not in untimed}
        if device.type == "cuda":
            steps = with_graphs(model, steps)
        repeated = {name: lambda step=step: [step() for _ in range(sizes.steps)] for name, step in steps.items()}
        seconds = interleaved(repeated, sizes.rounds, device)
        ms = {name: statistics.median(times) / sizes.steps * 1e3 for name, times in seconds.items()}
        a, b = fit(sizes.ks, [ms[str(k)] for k in sizes.ks])
        shared = {"cell": cell, "width": width, "length": length, "batch": sizes.batch, "fit_a_ms": a, "fit_b_ms": b}
        shared |= {f"{name}_ms": ms[name] for name in (LOOP, LAYER, FORWARD)}
        shared |= {f"{name}_graph_ms": ms.get(f"{name}{GRAPH}") for name in (LOOP, LAYER)}
        for k in sizes.ks:
            own = {"k": k, "ms": ms[str(k)], "graph_ms": ms.get(f"{k}{GRAPH}"), "cosine": cosines[str(k)]}
            fpi = {"fpi_ms": ms.get(f"{FPI}{k}"), "fpi_graph_ms": ms.get(f"{FPI}{k}{GRAPH}")}
            fpi["fpi_cosine"] = cosines[f"{FPI}{k}"]
            rows.append(shared | own | fpi | speedups(seconds, k))
        print("\n".join(line(row) for row in rows[-len(sizes.ks) :]), flush=True)
        print(f"{'':17s} fit {a:.2f} + {b:.2f} k ms; torch's forward alone takes {ms[FORWARD]:.2f} ms")
    return rows


def speedups(seconds: dict[str, list[float]], k: int) -> dict[str, list[float]]:
    """How many times as fast as each of the others, a graph as another's graph: median, low, high."""
    found: dict[str, list[float]] = {}
    for kind in ("", GRAPH):
        own = seconds.get(f"{k}{kind}", [])
        for name in (LOOP, LAYER):
            other = seconds.get(f"{name}{kind}", [])
            if own and other:
                ratios = [a / b for a, b in zip(other, own, strict=True)]
                found[f"times_{name}{kind.replace(' ', '_')}"] = list(median_interval(ratios))
    forms = [[n for n in (name, f"{name}{GRAPH}") if n in seconds] for name in (LAYER, str(k))]
    if all(forms) and max(map(len, forms)) > 1:  # each of the two in its faster form
        layer, own = (seconds[min(names, key=lambda n: statistics.median(seconds[n]))] for names in forms)
        found["times_fastest_layer"] = list(median_interval([a / b for a, b in zip(layer, own, strict=True)]))
    return found


def fit(ks: tuple[int, ...], ms: list[float]) -> tuple[float, float]:
    """Least squares a + b k."""
    slope, intercept = statistics.linear_regression(ks, ms)
    return intercept, slope


COLUMNS = {
    "times_loop": "times the loop",
    "times_layer": "the layer",
    "times_loop_graph": "graph: the loop",
    "times_layer_graph": "the layer",
}
HEADINGS = (
    f"{'cell':4s} {'L':>5s} {'width':>5s} {'k':>3s} {'ms':>8s} {'cosine':>7s} {'FPI ms':>8s} {'cosine':>7s}  "
    + " ".join(f"{title:>20s}" for title in COLUMNS.values())
)


def line(row: dict[str, Any]) -> str:
    cells = []
    for name in COLUMNS:
        middle, low, high = row.get(name, [0.0] * 3)
        cells.append(f"{middle:6.2f} [{low:.2f}, {high:.2f}]" if middle else "not measured")
    fpi = "" if row["fpi_ms"] is None else f"{row['fpi_ms']:.2f}"
    ahead = " <" if wins(row) else ""
    return (
        f"{row['cell']:4s} {row['length']:5d} {row['width']:5d} {row['k']:3d} {row['ms']:8.2f} {row['cosine']:7.4f} "
        f"{fpi:>8s} {row['fpi_cosine']:7.4f}  " + " ".join(f"{text:>20s}" for text in cells) + ahead
    )


def wins(row: dict[str, Any]) -> bool:
    """Whether it is ahead of torch's layer beyond the interval."""
    return over_layer(row)[1] > 1


def over_layer(row: dict[str, Any]) -> list[float]:
    """How many times as fast as torch's layer, both in their faster form."""
    return row.get("times_fastest_layer", row["times_layer"])


def win_map(rows: list[dict[str, Any]]) -> list[str]:
    """Per cell, width and length the largest k that still is ahead of torch's layer, with its cosine."""
    lengths = sorted({row["length"] for row in rows})
    out = ["largest k that is ahead of torch's layer (cosine there), by L:"]
    out.append(f"{'cell':4s} {'width':>5s}" + "".join(f"{length:>14d}" for length in lengths))
    for cell, width in sorted({(row["cell"], row["width"]) for row in rows}):
        places = []
        for length in lengths:
            here = [r for r in rows if (r["cell"], r["width"], r["length"]) == (cell, width, length) and wins(r)]
            best = max(here, key=lambda r: r["k"], default=None)
            places.append("none" if best is None else f"{best['k']} ({best['cosine']:.3f})")
        out.append(f"{cell:4s} {width:5d}" + "".join(f"{place:>14s}" for place in places))
    return out


def figures(rows: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """The claimed figures of a kind of device."""
    long = [row for row in rows if row["k"] == 5 and row["length"] == 1024]
    if kind == "cuda":
        loop = min((row["times_loop"][0] for row in long), default=float("nan"))
        found = (loop, max(over_layer(row)[0] for row in rows))
    else:
        claimed = next((row for row in long if (row["cell"], row["width"]) == ("gru", 16)), None)
        found = (claimed["times_loop"][0], claimed["times_layer"][0]) if claimed else (float("nan"),) * 2
    return dict(zip(LIMITS[kind], found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=("gru", "lstm"), default=["gru", "lstm"])
    parser.add_argument("--cpu", action="store_true", help="measure the CPU even where there is CUDA")
    parser.add_argument("--quick", action="store_true", help="short and narrow, to see that it runs; proves nothing")
    parser.add_argument("--out", default="results/benchmarks/highway_rnn.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for all, as cuDNN's layers have it by default
    sizes = QUICK if arguments.quick else CUDA if device.type == "cuda" else CPU
    print(HEADINGS)
    rows: list[dict[str, Any]] = []
    for cell in arguments.cells:
        for width in sizes.widths:
            rows += measure(cell, width, sizes, device, 2 if arguments.quick else TRAINING_STEPS)
            write_json(arguments.out, {"rows": rows, **environment(device)})  # the next may fail
    drawn = win_map(rows)
    print("\n".join(drawn))
    gpu = "measured" if device.type == "cuda" else "not measured"
    facts = {"quick": arguments.quick, "gpu": gpu, "rounds": sizes.rounds, "map": drawn}
    write_json(arguments.out, facts | {"rows": rows, "limits": LIMITS, **environment(device)})
    if arguments.quick:
        return
    for kind in LIMITS.keys() - {device.type}:
        for name, limit in LIMITS[kind].items():
            print(f"claim ({name} at least {limit:g}): of {kind}, not measured")
    limits = LIMITS[device.type]
    judge("highway_rnn", figures(rows, device.type), limits, arguments.out, least=limits)


if __name__ == "__main__":
    main()
