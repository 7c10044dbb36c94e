"""Cuts against brute force, costs against what torch and arithmetic say."""

import itertools
import random
import time

import pytest
import torch
from torch import nn

from fastbp import DDG, Backprop
from fastbp.flops import step_flops
from fastbp.models import make_model
from fastbp.split import TOLERANCE, BlockCost, best_cuts, even_cuts, measure, module_bytes, pieces, table, tied_cuts
from fastbp.views import as_chain

cross_entropy = nn.functional.cross_entropy


def all_cuts(blocks, modules):
    return itertools.combinations(range(1, blocks), modules - 1)


def worst(costs, cuts):
    edges = [0, *cuts, len(costs)]
    return max(sum(costs[a:b]) for a, b in itertools.pairwise(edges))


def test_best_cuts_equal_brute_force():
    generator = random.Random(0)
    for _ in range(300):
        blocks = generator.randint(1, 9)
        modules = generator.randint(1, blocks)
        costs = [generator.expovariate(1.0) for _ in range(blocks)]
        cuts = best_cuts(costs, modules)
        assert list(cuts) == sorted(set(cuts)), f"cuts {cuts} do not rise"
        assert len(cuts) == modules - 1, f"{len(cuts)} cuts for {modules} modules"
        best = min(worst(costs, c) for c in all_cuts(blocks, modules))
        got = worst(costs, cuts)
        assert got <= best * (1 + TOLERANCE) + 1e-12, f"{costs} cut at {cuts}: {got}, the best is {best}"


def test_noise_below_the_tolerance_does_not_move_a_cut():
    for seed in range(20):
        generator = random.Random(seed)
        costs = [1 + 0.01 * generator.uniform(-1, 1) for _ in range(12)]
        assert best_cuts(costs, 4) == (3, 6, 9), f"noise of 1 % moved the cuts to {best_cuts(costs, 4)}"


def test_best_cuts_keep_a_constraint():
    costs = [1.0, 1, 1, 1, 1, 1]
    cuts = best_cuts(costs, 2, lambda k, start, stop: k != 0 or stop <= 2)
    assert cuts == (2,), f"module 0 may hold two blocks at most, the cut is at {cuts}"
    with pytest.raises(ValueError, match="no cut of 6 blocks into 2 modules"):
        best_cuts(costs, 2, lambda k, start, stop: False)


def test_even_cuts():
    assert [even_cuts(5, 3), even_cuts(4, 4), even_cuts(9, 2), even_cuts(3, 1)] == [(1, 3), (1, 2, 3), (4,), ()]


def test_costs_of_linear_blocks_are_the_closed_form():
    net = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(3)])
    costs = measure(net, lambda out, y: out.sum(), torch.randn(5, 8), torch.zeros(5), timed=False)
    product = 2 * 5 * 8 * 8
    flops = [c.flops for c in costs]
    assert flops == [2 * product, 3 * product, 3 * product], f"the first block has no input gradient: {flops}"
    kept = [c.activation_bytes for c in costs]
    assert kept[:2] == [5 * 8 * 4] * 2, f"a linear layer keeps its input, these keep {kept} bytes"
    assert [c.parameter_bytes for c in costs] == [8 * 8 * 4] * 3
    assert all(c.seconds == 0 for c in costs), "times although none were asked for"


def test_costs_add_up_to_the_step_and_leave_no_trace():
    model = make_model("resnet_tiny", (3, 8, 8), 10, {}, 0)
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 10
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    costs = measure(model, cross_entropy, x, y, timed=True)
    assert torch.equal(torch.get_rng_state(), state), "measuring drew from the caller's generator"
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert not changed, f"measuring changed {changed}"
    assert all(p.grad is None for p in model.parameters()), "measuring left gradients"
    assert all(c.forward_seconds > 0 and c.backward_seconds > 0 for c in costs), f"a block without time: {costs}"
    want = step_flops(Backprop().bind(model, cross_entropy), x, y)
    assert sum(c.flops for c in costs) == want, f"blocks {sum(c.flops for c in costs)} FLOPs, the step {want}"


def test_memory_of_a_module():
    costs = [BlockCost(parameter_bytes=10, activation_bytes=100, input_bytes=7)] * 4
    got = {w: module_bytes(costs, 3, w, 0, 0, 2) for w in ("stash", "mixed", "replay")}
    assert got == {"stash": 3 * 200 + 6 * 20, "mixed": 3 * 200 + 3 * 20, "replay": 3 * 7 + 200 + 3 * 20}, got
    assert module_bytes(costs, 3, "replay", 2, 3, 4) == 100 + 30, "the last module keeps its one graph"


def test_table_shares():
    costs = [BlockCost(0.1, 0.2, 30.0, 4, 8, 2), BlockCost(0.1, 0.2, 10.0, 4, 8, 2), BlockCost(0.2, 0.4, 20.0, 4, 8, 2)]
    rows = table(costs, (2,), "stash")
    assert [row["blocks"] for row in rows] == [2, 1]
    assert [row["delay"] for row in rows] == [1, 0]
    assert [round(row["time_share"], 6) for row in rows] == [0.5, 0.5]
    assert [round(row["flops_share"], 6) for row in rows] == [2 / 3, 1 / 3] or rows[0]["flops_share"] == pytest.approx(
        2 / 3
    )


class Busy(nn.Module):
    """A layer of `rounds` matrix products, and a nap for every ten of them."""

    def __init__(self, rounds):
        super().__init__()
        self.rounds = rounds
        self.weight = nn.Parameter(torch.eye(96))

    def forward(self, x):
        for _ in range(self.rounds):
            x = x @ self.weight
        time.sleep(self.rounds // 10 * 0.05)
        return x


@pytest.fixture(autouse=True)
def _few_runs(monkeypatch):
    monkeypatch.setattr("fastbp.split._TIMED_RUNS", 3)


def busy_net(*rounds):
    return nn.Sequential(*[Busy(r) for r in rounds])


@pytest.mark.parametrize(
    ("split", "want"), [("time", (4,)), ("flops", (4,)), ("blocks", (3,)), ("parameters", (3,)), ("auto", (3,))]
)
def test_splits_of_a_net_whose_last_blocks_are_heavy(split, want):
    net = busy_net(10, 10, 10, 10, 20, 20)
    estimator = DDG(modules=2, split=split).bind(net, lambda out, y: out.sum())
    estimator.prepare(torch.randn(256, 96), torch.zeros(256))
    assert estimator.cutter.cuts == want, f"split by {split} at {estimator.cutter.cuts}"
    rows = estimator.table()
    assert [row["first_block"] for row in rows] == [0, want[0]], f"the table shows {rows}"
    measured = [row["memory_bytes"] > 0 for row in rows]
    assert measured == [split in ("time", "flops")] * 2, f"memory that nobody measured: {rows}"


def test_auto_is_time_where_modules_run_side_by_side():
    net = busy_net(10, 10, 10, 10, 20, 20)
    estimator = DDG(modules=2, devices=("cpu", "cpu")).bind(net, lambda out, y: out.sum())
    estimator.prepare(torch.randn(256, 96), torch.zeros(256))
    assert estimator.cutter.cuts == (4,), f"cut at {estimator.cutter.cuts}"


def test_first_batch_decides_where_nobody_prepares():
    net = busy_net(1, 1, 8)
    estimator = DDG(modules=2, split="flops").bind(net, lambda out, y: out.sum())
    with pytest.raises(
        ValueError, match=r"^DDG\.lr_power = 1\.0: the cuts are not decided yet; call estimator\.prepare"
    ):
        DDG(modules=2, split="flops", lr_power=1.0).bind(net, lambda out, y: out.sum()).param_groups()
    estimator.backward(torch.randn(4, 96), torch.zeros(4))
    assert estimator.cutter.cuts == (2,), f"cut at {estimator.cutter.cuts}"


def test_memory_cap_moves_layers_to_later_modules():
    net = busy_net(4, 4, 4, 4)
    x, y = torch.randn(64, 96), torch.zeros(64)
    costs = measure(net, lambda out, y: out.sum(), x, y, timed=False)
    free = best_cuts([c.flops for c in costs], 2)
    need = module_bytes(costs, 2, "stash", 0, 0, free[0])
    estimator = DDG(modules=2, split="flops", max_memory_bytes=need - 1).bind(net, lambda out, y: out.sum())
    estimator.prepare(x, y)
    assert estimator.cutter.cuts[0] < free[0], f"cut at {estimator.cutter.cuts}, without the cap at {free}"
    with pytest.raises(ValueError, match=r"^DDG\.max_memory_bytes = 10: no cut of 4 blocks into 2 modules needs so"):
        DDG(modules=2, max_memory_bytes=10).bind(net, lambda out, y: out.sum()).prepare(x, y)


def test_a_shared_weight_is_never_cut():
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(5)])
    net[3].weight = net[1].weight
    tied = tied_cuts(pieces(as_chain(net)))
    assert sorted(tied) == [2, 3], f"cuts that part a shared weight: {tied}"
    with pytest.raises(
        TypeError, match=r"^DDG: weight .* is shared across the cut before block 2; its gradients would"
    ):
        DDG(modules=2, cuts=(2,)).bind(net, cross_entropy)
    estimator = DDG(modules=3, split="parameters").bind(net, cross_entropy)
    assert estimator.cutter.cuts == (1, 4), f"cut at {estimator.cutter.cuts}"
    with pytest.raises(TypeError, match=r"is shared by too many blocks to cut the net into 4 modules"):
        DDG(modules=4, split="parameters").bind(net, cross_entropy)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"split": "tme"},
            "DDG.split = 'tme': must be one of auto, time, flops, parameters, blocks; did you mean time?",
        ),
        ({"cuts": (2, 1), "modules": 3}, "DDG.cuts = (2, 1): must be rising block numbers from 1"),
        ({"cuts": (1, 2)}, "DDG.cuts = (1, 2): 2 modules need 1 cuts"),
        ({"devices": ("cpu",)}, "DDG.devices = ('cpu',): 2 modules need 2 devices, one each"),
        ({"max_memory_bytes": 0}, "DDG.max_memory_bytes = 0: must be a positive number"),
        (
            {"cuts": (1,), "max_memory_bytes": 10},
            "DDG.max_memory_bytes = 10: chooses among cuts, and `cuts` are given; omit one",
        ),
        ({"shrink": 0.0}, "DDG.shrink = 0.0: must be in (0, 1]"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(ValueError, match=r"^DDG") as caught:
        DDG(**settings)
    assert str(caught.value) == message


def test_a_cut_beyond_the_net_is_refused():
    with pytest.raises(
        ValueError, match=r"^DDG\.cuts = \(9,\): this Sequential has 3 blocks; the last cut is below that"
    ):
        DDG(cuts=[9]).bind(busy_net(1, 1, 1), cross_entropy)


class _Pair(nn.Module):
    """Returns two tensors, or adds the two that it gets."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return sum(x) if isinstance(x, tuple) else (self.layer(x), x)


def test_a_block_that_returns_no_tensor_is_refused_by_name_while_it_is_measured():
    net = nn.Sequential(nn.Linear(4, 4), _Pair(), _Pair(), nn.Linear(4, 3))
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    with pytest.raises(TypeError) as caught:
        DDG(modules=2, split="flops").bind(net, cross_entropy).prepare(x, y)
    assert str(caught.value) == (
        "DDG: block 1, which ends in _Pair, returned a tuple, but only one tensor can cross a cut; return a tensor, or "
        "give `cuts` elsewhere"
    )
    estimator = DDG(modules=2, cuts=(3,)).bind(net, cross_entropy)
    assert estimator.backward(x, y).isfinite(), "within a module a tuple is the model's own business"


def test_the_last_block_may_return_what_the_loss_takes():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), _Pair())
    estimator = DDG(modules=2, split="flops").bind(net, lambda out, y: cross_entropy(out[0] + out[1], y))
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    estimator.prepare(x, y)
    assert estimator.cutter.cuts is not None
    assert estimator.backward(x, y).isfinite()


def test_the_memory_cap_holds_for_one_module_too_but_not_for_the_control():
    net, loss_fn = busy_net(4, 4, 4, 4), lambda out, y: out.sum()
    x, y = torch.randn(64, 96), torch.zeros(64)
    need = module_bytes(measure(net, loss_fn, x, y, timed=False), 1, "stash", 0, 0, 4)
    fits = DDG(modules=1, max_memory_bytes=need).bind(net, loss_fn)
    fits.prepare(x, y)
    assert fits.cutter.cuts == ()
    assert fits.backward(x, y).isfinite()
    capped = DDG(modules=1, max_memory_bytes=need - 1)
    message = rf"^DDG\.max_memory_bytes = {need - 1}: the whole net needs more; raise it, use more modules or a smaller"
    with pytest.raises(ValueError, match=message):
        capped.bind(net, loss_fn).prepare(x, y)
    assert DDG(modules=2, max_memory_bytes=need - 1).exact(net) == DDG(modules=1), "plain backprop is cut nowhere"
