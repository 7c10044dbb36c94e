"""Highway-BP over time: GRU and LSTM against the sum over paths, autograd and truncated backpropagation."""

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from fastbp import DDG, Backprop, DecorrelatedBP, HighwayBP, LayerDropBack, Recurrent, as_chain, cell_rounds
from fastbp.cell_rounds import LayerRounds
from fastbp.config import RunConfig, Task
from fastbp.flops import Counter, step_flops
from fastbp.highway_recurrent import highway_layer
from fastbp.models import make_model
from fastbp.recipe import Recipe
from fastbp.recurrent import PixelSteps
from fastbp.run import Run
from fastbp.testing import check_method, small_batch
from reference import recurrent as twin

KINDS = {"gru": (nn.GRU, twin.GRU, "co"), "lstm": (nn.LSTM, twin.LSTMco, "co"), "lstm-ch": (nn.LSTM, twin.LSTMch, "ch")}


def tokens_loss(logits, y):
    return cross_entropy(logits.flatten(0, -2), y.flatten())


def net_and_batch(kind, *, last_step=True, steps=4, bias=True, scale=1.0):
    """Two layers of unequal width, three where a residual sum asks for equal ones."""
    torch.manual_seed(3)
    make = KINDS[kind][0]
    layers = [make(3, 2, bias=bias), make(2, 2, bias=bias)]
    model = Recurrent(nn.Linear(2, 3), layers, nn.Linear(2, 3), last_step=last_step, residual=True).double()
    with torch.no_grad():
        for p in model.layers.parameters():
            p.mul_(scale)
    x = torch.randn(2, steps, 2, dtype=torch.float64)
    return model, x, torch.tensor([0, 2]) if last_step else torch.randint(3, (2, steps))


def gradients(model, x, y, method):
    model.zero_grad()
    method.bind(model, tokens_loss).backward(x, y)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


@pytest.mark.parametrize("last_step", [True, False], ids=["last step", "every step"])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_sum_over_paths(kind, gamma, last_step):
    model, x, y = net_and_batch(kind, last_step=last_step)
    for k in range(4):
        want = twin.gradients(model, x, y, tokens_loss, k, gamma, KINDS[kind][1])
        got = gradients(model, x, y, HighwayBP(iterations=k, gamma=gamma, lstm_state=KINDS[kind][2]))
        for name, grad in got.items():
            error = relative(grad, want[name])
            assert error < 1e-11, f"k={k}: {name} differs from the sum over paths by {error:.3g}"


def layer_and_input(kind, steps, hidden=5, bias=True):
    torch.manual_seed(1)
    layer = KINDS[kind][0](3, hidden, bias=bias).double()
    return layer, torch.randn(steps, 2, 3, dtype=torch.float64, requires_grad=True)


def layer_gradients(layer, x, G, rounds=None):
    """Of x and all weights for the outputs' gradient G; by autograd without `rounds`."""
    out = layer(x)[0] if rounds is None else highway_layer(layer, x, rounds)
    return torch.autograd.grad(out, [x, *layer.parameters()], G)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_rounds_for_all_steps_are_backprop(kind, gamma):
    for steps, bias in ((1, True), (2, True), (9, False), (30, True)):
        layer, x = layer_and_input(kind, steps, bias=bias)
        G = torch.randn(steps, 2, 5, dtype=torch.float64)
        want = layer_gradients(layer, x, G)
        for k in (steps - 1, steps, steps + 3):
            got = layer_gradients(layer, x, G, LayerRounds(k, gamma, KINDS[kind][2]))
            worst = max(relative(a, b) for a, b in zip(got, want, strict=True))
            assert worst < 1e-12, f"T={steps}, k={k}: {worst:.3g} from autograd"


@pytest.mark.parametrize("kind", KINDS)
def test_signals_become_final_from_the_last_step_on(kind):
    steps = 6
    layer, x = layer_and_input(kind, steps)
    G = torch.randn(steps, 2, 5, dtype=torch.float64)
    table = [layer_gradients(layer, x, G, LayerRounds(k, 0.0, KINDS[kind][2]))[0] for k in range(steps + 1)]
    for k in range(steps):
        for j in range(steps):
            same = torch.allclose(table[k][steps - 1 - j], table[-1][steps - 1 - j], rtol=1e-13, atol=0)
            assert same == (k >= j), f"step L-{j} at k={k}: final is {same}, expected from k={j} on"


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_highway_it_is_truncated_backpropagation(kind):
    """Gamma 1 with a loss on the last step: the gradient through the last k+1 cells."""
    steps = 8
    layer, x = layer_and_input(kind, steps)
    G = torch.zeros(steps, 2, 5, dtype=torch.float64)
    G[-1] = torch.randn(2, 5, dtype=torch.float64)
    for k in range(steps):
        start = steps - 1 - k
        state = layer(x[:start])[1] if start else None
        if state is not None:
            state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        want = torch.autograd.grad(layer(x[start:], state)[0][-1], [x, *layer.parameters()], G[-1])
        got = layer_gradients(layer, x, G, LayerRounds(k, 1.0, KINDS[kind][2]))
        worst = max(relative(a, b) for a, b in zip(got, want, strict=True))
        assert worst < 1e-12, f"k={k}: {worst:.3g} from truncated backpropagation"


def test_cell_state_with_output_gate_is_the_better_lstm_state():
    """The specification's table, in kind: (c, o) is ahead at every k, and (c, h) wastes its first round."""
    steps = 8
    layer, x = layer_and_input("lstm", steps)
    G = torch.zeros(steps, 2, 5, dtype=torch.float64)
    G[-1] = torch.randn(2, 5, dtype=torch.float64)
    exact = torch.cat([g.flatten() for g in layer_gradients(layer, x, G)[1:]])
    errors = {}
    for state in ("co", "ch"):
        found = [layer_gradients(layer, x, G, LayerRounds(k, 0.0, state))[1:] for k in range(steps)]
        errors[state] = [relative(torch.cat([g.flatten() for g in grads]), exact) for grads in found]
        assert errors[state][-1] < 1e-14, f"{state} at k = L - 1: {errors[state][-1]}"
    for k in range(4):
        assert errors["co"][k] < 0.7 * errors["ch"][k], f"k={k}: {errors}"
    assert errors["co"][:4] == sorted(errors["co"][:4], reverse=True), errors["co"]


@pytest.mark.parametrize("kind", ["gru", "lstm-ch"])
def test_min_residual_is_the_least_squares_combination(kind):
    layer, x = layer_and_input(kind, 5, hidden=2)
    G = torch.randn(5, 2, 2, dtype=torch.float64)
    weights = [w.detach() for w in layer.all_weights[0]]
    state = KINDS[kind][2]
    for k in (1, 2, 3):
        dx, grads = twin.min_residual(KINDS[kind][1], x.detach(), weights, G, k, 0.1)
        got = layer_gradients(layer, x, G, LayerRounds(k, 0.1, state, min_residual=True))
        plain = layer_gradients(layer, x, G, LayerRounds(k, 0.1, state))
        for a, b, other in zip(got, [dx, *grads], plain, strict=True):
            assert relative(a, b) < 1e-6, f"k={k}: {relative(a, b):.3g} from the least-squares solution"
            assert relative(a, other) > 1e-5, f"k={k}: as good as the plain sum, so the test shows nothing"


@pytest.mark.parametrize("kind", KINDS)
def test_min_residual_is_exact_with_as_many_rounds_as_steps_and_tames_cancelling_ones(kind):
    layer, x = layer_and_input(kind, 10)
    with torch.no_grad():
        layer.weight_hh_l0.mul_(8)  # increments that grow before they fall
    G = torch.randn(10, 2, 5, dtype=torch.float64)
    exact = layer_gradients(layer, x, G)
    errors = {}
    for best in (False, True):
        for k in (4, 10):
            got = layer_gradients(layer, x, G, LayerRounds(k, 0.0, KINDS[kind][2], min_residual=best))
            errors[best, k] = max(relative(a, b) for a, b in zip(got, exact, strict=True))
    assert errors[True, 10] < 1e-6, errors
    assert errors[True, 4] < errors[False, 4], errors


@pytest.mark.parametrize("kind", KINDS)
def test_increments_with_the_coefficient_one_are_the_plain_sum(kind, monkeypatch):
    monkeypatch.setattr(cell_rounds, "coefficients", lambda increments: torch.ones(len(increments) - 1))
    layer, x = layer_and_input(kind, 10)
    G = torch.randn(10, 2, 5, dtype=torch.float64)
    for k in (1, 2, 5):
        best, plain = (LayerRounds(k, 0.1, KINDS[kind][2], min_residual=some) for some in (True, False))
        for a, b in zip(layer_gradients(layer, x, G, best), layer_gradients(layer, x, G, plain), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_min_residual_reaches_the_rounds():
    model, x, y = net_and_batch("gru", steps=12, scale=4.0)
    exact = gradients(model, x, y, Backprop())
    errors = []
    for combination in ("sum", "min_residual"):
        got = gradients(model, x, y, HighwayBP(iterations=5, combination=combination))
        errors.append(max(relative(got[name], exact[name]) for name in got))
    assert errors[1] < 0.9 * errors[0], f"sum and smallest residual: {errors}"


class Operations(TorchDispatchMode):
    """Counts what is dispatched."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_the_backward_has_no_operation_per_step(kind):
    """Sixteen times the steps are about four times the operations, those of the chunked scans."""
    counts = []
    for steps in (256, 4096):
        layer, x = layer_and_input(kind, steps, hidden=1)
        out = highway_layer(layer, x, LayerRounds(2, 0.1, KINDS[kind][2]))
        with Operations() as operations:
            out.sum().backward()
        counts.append(operations.count)
    assert counts[1] < 6 * counts[0], f"operations with 256 and 4096 steps: {counts}"


def test_a_diagonal_recurrence_is_exact_without_a_round():
    layer, x = layer_and_input("gru", 7)
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
    G = torch.randn(7, 2, 5, dtype=torch.float64)
    for a, b in zip(layer_gradients(layer, x, G, LayerRounds(0)), layer_gradients(layer, x, G), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_in_the_loss_and_accumulates(kind):
    model, x, y = net_and_batch(kind, steps=6)
    method = HighwayBP(iterations=2, gamma=0.2, lstm_state=KINDS[kind][2])
    once = gradients(model, x, y, method)
    scaled = method.bind(model, lambda h, t: 1024 * tokens_loss(h, t))
    model.zero_grad()
    for _ in range(2):
        scaled.backward(x, y)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, 2048 * once[name]), f"{name} is not linear in the loss, or does not accumulate"


def test_frozen_weights_get_none_and_do_not_change_the_others():
    model, x, y = net_and_batch("gru", steps=6)
    method = HighwayBP(iterations=2)
    want = gradients(model, x, y, method)
    for frozen in (["stem"], ["layers.1.weight_ih"], ["layers.0", "stem"], ["layers"], ["stem", "layers"], ["head"]):
        model.zero_grad()
        for name, p in model.named_parameters():
            p.requires_grad_(not any(name.startswith(part) for part in frozen))
        method.bind(model, tokens_loss).backward(x, y)
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert torch.equal(p.grad, want[name]), f"{name} changed because {frozen} are frozen"
            else:
                assert p.grad is None, f"frozen {name} has a gradient"


def test_layers_are_called_once_and_hooks_on_weights_see_the_gradient():
    model, x, y = net_and_batch("lstm", steps=6)
    calls, seen = [], []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: calls.append(1))
    model.layers[0].weight_hh_l0.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    got = gradients(model, x, y, HighwayBP(iterations=1))
    assert len(calls) == 2, f"the two layers were called {len(calls)} times"
    assert torch.equal(seen[0], got["layers.0.weight_hh_l0"])


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_products_keep_float32_signals(kind):
    torch.manual_seed(0)
    model = Recurrent(nn.Identity(), [KINDS[kind][0](8, 32)], nn.Linear(32, 4), last_step=False)
    x, y = torch.randn(4, 40, 8), torch.randint(4, (4, 40))
    method = HighwayBP(iterations=5, lstm_state=KINDS[kind][2])
    want = gradients(model, x, y, method)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        got = gradients(model, x, y, method)
    low = gradients(copy.deepcopy(model).bfloat16(), x.bfloat16(), y, method)
    for name, grad in want.items():
        assert got[name].dtype == torch.float32, f"{name} under autocast: {got[name].dtype}"
        assert low[name].dtype == torch.bfloat16, f"{name} in bfloat16: {low[name].dtype}"
        for found in (got[name], low[name].float()):
            cosine = torch.cosine_similarity(found.flatten(), grad.flatten(), 0).item()
            assert cosine > 0.99, f"{name}: cosine to float32 {cosine}"


@pytest.mark.parametrize("cell", [cell_rounds.GRU, cell_rounds.LSTM, cell_rounds.PaperLSTM])
def test_only_products_are_in_bfloat16(cell):
    layer = (nn.GRU if cell is cell_rounds.GRU else nn.LSTM)(3, 4).bfloat16()
    x = torch.randn(5, 2, 3, dtype=torch.bfloat16)
    out = layer(x)[0].detach()
    solved = cell(x, out, [w.detach() for w in layer.all_weights[0]], torch.bfloat16)
    solved.solve(torch.randn_like(out), LayerRounds(2, 0.1))
    assert solved.pushed.dtype == torch.bfloat16
    for part in (*solved.signals, solved.factors, solved.g):
        assert part.dtype == torch.float32, f"{part.dtype} in {cell.__name__}"


def pixel_net(cell="gru"):
    return make_model(cell, (1, 8, 8), 4, {"width": 6, "layers": 2, "step": 8}).double()


@pytest.mark.parametrize(
    ("method", "cell"),
    [
        (HighwayBP(iterations=2), "gru"),
        (HighwayBP(iterations=1, gamma=0.2, lstm_state="ch"), "lstm"),
        (HighwayBP(iterations=5, growing_epochs=3, tolerance=0.1, exact_from=4), "lstm"),
        (LayerDropBack(drop_rate=0.5, inner=HighwayBP(iterations=2)), "gru"),
    ],
    ids=str,
)
def test_the_conformance_suite(method, cell):
    assert len(check_method(method, make_model=lambda: pixel_net(cell), batch=small_batch)) == 8


def test_schedules_reach_the_rounds():
    model, x, y = net_and_batch("gru", steps=12)
    estimator = HighwayBP(iterations=6, growing_epochs=3, tolerance=1e-9, exact_from=4).bind(model, tokens_loss)
    used = []
    for epoch in range(5):
        estimator.start_epoch(epoch)
        model.zero_grad()
        estimator.backward(x, y)
        used.append(estimator.metrics().get("highway/iterations"))
    assert used == [2, 4, 6, 6, None], f"rounds by epoch: {used}"
    last = {name: p.grad.clone() for name, p in model.named_parameters()}
    for name, grad in gradients(model, x, y, Backprop()).items():
        assert torch.equal(last[name], grad), f"{name}: from epoch 4 on, steps are plain backprop"
    estimator.start_epoch(3)
    estimator.backward(x, y)
    found = estimator.metrics()
    assert 0 < found["highway/last_increment"] < found["highway/largest_increment"] < 1, found
    coarse = HighwayBP(iterations=6, tolerance=10.0).bind(model, tokens_loss)
    coarse.backward(x, y)
    coarse.start_epoch(1)
    assert coarse.metrics()["highway/iterations"] == 1, "every increment is small enough, so one round is"


def test_a_tolerance_decides_where_all_rounds_are_allowed():
    model, x, y = net_and_batch("gru", steps=12)
    estimator = HighwayBP(iterations=20, tolerance=0.3).bind(model, tokens_loss)
    estimator.backward(x, y)
    assert 0 < int(estimator.start_epoch(1).kind.removeprefix("k=")) < 12


def test_rounds_of_an_exact_epoch_are_not_made_up():
    model, _, _ = net_and_batch("gru", steps=12)
    method = HighwayBP(iterations=2, exact_from=1)
    for steps, want in ((12, {"highway/iterations": 12.0}), (None, {})):
        model.steps = steps
        estimator = method.bind(model, tokens_loss)
        estimator.start_epoch(1)
        assert estimator.metrics() == want, f"steps = {steps}"


def test_increments_are_those_of_the_signals():
    layer, x = layer_and_input("gru", 6)
    G = torch.randn(6, 2, 5, dtype=torch.float64)
    rounds = LayerRounds(7, 0.0, "co", growth=[])
    layer_gradients(layer, x, G, rounds)
    (ratios,) = rounds.growth
    assert ratios.shape == (7,)
    assert (ratios[:5] > 0).all(), f"five rounds change something: {ratios}"
    assert not ratios[5:].any(), f"the signals are final after L - 1 rounds: {ratios}"


@pytest.mark.parametrize("method", [Backprop(), HighwayBP(iterations=10)], ids=str)
@pytest.mark.parametrize(("cell", "optimizer", "precision"), [("gru", "adam", "float32"), ("lstm", "sgd", "bfloat16")])
def test_the_loop_trains_pixels(method, cell, optimizer, precision):
    task = Task("digits", cell, {"limit": 128}, {"width": 16, "step": 2})
    recipe = Recipe(epochs=2, batch_size=32, lr=1e-2, optimizer=optimizer, precision=precision)
    run = Run(RunConfig(task, recipe, method))
    first, second = run.train_epoch(), run.train_epoch()
    assert second.train_loss < first.train_loss, f"{first.train_loss} became {second.train_loss}"
    assert run.end().flops_executed > 0
    exact = method.exact(run.estimator.model)
    assert exact == (method if method == Backprop() else dataclasses.replace(method, iterations=32))


def test_characters_are_read_with_a_loss_per_step(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh " * 300)
    task = Task(f"text:{path}", "lstm", {"length": 16}, {"width": 16, "layers": 2})
    run = Run(RunConfig(task, Recipe(epochs=3, batch_size=16, lr=1e-2, optimizer="adam"), HighwayBP(iterations=3)))
    losses = [run.train_epoch().train_loss for _ in range(3)]
    assert losses[-1] < 0.8 * losses[0], losses


def test_pixels_come_row_by_row():
    x = torch.arange(2 * 3 * 2 * 4).view(2, 3, 2, 4)
    steps = PixelSteps(1)(x)
    assert steps.shape == (2, 8, 3)
    assert torch.equal(steps[1, 5], x[1, :, 1, 1]), "step 5 of rows of 4 is the second pixel of the second row"
    rows = PixelSteps(4)(x)
    assert rows.shape == (2, 2, 12)
    assert torch.equal(rows[1, 1].view(4, 3), x[1, :, 1].T)


def test_the_keep_gate_starts_where_it_is_told():
    plain, kept = (make_model("gru", (5,), 7, {"width": 4, "keep_bias": bias}, seed=2) for bias in (0.0, 2.0))
    moved = kept.layers[0].bias_ih_l0 - plain.layers[0].bias_ih_l0
    torch.testing.assert_close(moved, torch.tensor([0.0] * 4 + [2.0] * 4 + [0.0] * 4))
    assert plain(torch.zeros(3, 5, dtype=torch.int64)).shape == (3, 5, 7)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: nn.GRU(2, 2, num_layers=2), ValueError, "GRU with num_layers=2, expected 1: give `layers` one module"),
        (lambda: nn.LSTM(2, 2, bidirectional=True), ValueError, "LSTM with bidirectional=True, expected False: only"),
        (lambda: nn.LSTM(2, 3, proj_size=2), ValueError, "LSTM with proj_size=2, expected 0: only layers without"),
        (lambda: nn.GRU(2, 2, batch_first=True), ValueError, "batch_first=True, expected False: the layers get (T, B,"),
        (lambda: nn.GRU(2, 3), ValueError, "layers[1] takes 2 features, layers[0] gives 3"),
        (lambda: nn.RNN(2, 2), TypeError, "layers[0] is a RNN; only nn.GRU and nn.LSTM themselves are supported"),
    ],
)
def test_layers_that_are_refused(make, error, said):
    with pytest.raises(error) as caught:
        Recurrent(nn.Identity(), [make(), nn.GRU(2, 2)], nn.Identity(), last_step=True)
    assert said in str(caught.value)


@pytest.mark.filterwarnings("ignore:dropout option adds dropout")
def test_other_refusals():
    with pytest.raises(ValueError, match=r"dropout between layers is not supported; put an nn\.Dropout into the stem"):
        Recurrent(nn.Identity(), [nn.GRU(2, 2, dropout=0.1)], nn.Identity(), last_step=True)
    with pytest.raises(ValueError, match="layers is empty"):
        Recurrent(nn.Identity(), [], nn.Identity(), last_step=True)
    with pytest.raises(ValueError, match=r"layers\[1\] takes 2 features and gives 3$"):
        Recurrent(nn.Identity(), [nn.GRU(2, 2), nn.GRU(2, 3)], nn.Identity(), last_step=True, residual=True)
    with pytest.raises(ValueError, match="gru: step = 3 does not divide the 8 x 8 pixels"):
        make_model("gru", (1, 8, 8), 10, {"step": 3})
    net, x, y = net_and_batch("gru")
    with pytest.raises(TypeError, match=r"^as_chain cannot see a fastbp\.recurrent\.Recurrent as a chain"):
        as_chain(net)
    with pytest.raises(TypeError, match=r"^as_chain cannot see a fastbp\.recurrent\.Recurrent as a chain"):
        DDG(2).bind(net, tokens_loss)
    gru, lstm = (net_and_batch(cell, steps=4)[0] for cell in ("gru", "lstm"))
    with pytest.raises(ValueError, match=r"lstm_state = 'ch': this Recurrent has no nn\.LSTM; omit it"):
        HighwayBP(lstm_state="ch").bind(gru, tokens_loss)
    with pytest.raises(ValueError, match=r"batched = True: the steps of a Recurrent are one product in any case"):
        HighwayBP(batched=True).bind(lstm, tokens_loss)
    with pytest.raises(ValueError, match=r"lstm_state = 'oc': must be one of co, ch"):
        HighwayBP(lstm_state="oc")

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(2, 2)

    with pytest.raises(TypeError, match=r"^HighwayBP cannot see into the recurrent layers of this Own; pass a fastbp"):
        HighwayBP().bind(Own(), tokens_loss)

    class Pooled(Recurrent):
        def compute(self, x, run):
            return super().compute(x, run).mean(0)

    with pytest.raises(TypeError, match=r"^HighwayBP cannot see into the recurrent layers of this Pooled; pass a"):
        HighwayBP().bind(Pooled(net.stem, net.layers, net.head, last_step=True), tokens_loss)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    for run in (net, HighwayBP().bind(net, tokens_loss).forward):
        with pytest.raises(TypeError, match=r"^Recurrent: x is a PackedSequence, but all sequences of a batch have"):
            run(packed)
    assert HighwayBP().exact(net) is None, "without `steps` nobody knows how many rounds are exact"
    net.steps = 3
    with pytest.raises(ValueError, match="a sequence of 4 steps for a Recurrent with steps=3"):
        HighwayBP(iterations=1).bind(net, tokens_loss).backward(x, y)


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (
            nn.parallel.DistributedDataParallel,
            "it would average no gradients, whether it is there before `bind` or comes after;",
        ),
        (nn.DataParallel, r"it would split no batch; pass the Recurrent \(its `\.module`\)$"),
        (torch.compile, "nothing would be compiled; pass the Recurrent that torch.compile was given$"),
    ],
    ids=["DistributedDataParallel", "DataParallel", "compiled"],
)
def test_a_wrapped_net_is_told_from_another(wrap, told, process_group):
    model, _, _ = net_and_batch("gru")
    wrapped = wrap(model)
    said = f"^HighwayBP runs the layers of a Recurrent itself, past this {type(wrapped).__name__}, so that {told}"
    with pytest.raises(TypeError, match=said):
        HighwayBP().bind(wrapped, tokens_loss)


def test_decorrelation_takes_what_is_linear_in_it():
    model, x, y = net_and_batch("gru", steps=6)
    estimator = DecorrelatedBP(inner=HighwayBP(iterations=2)).bind(model, tokens_loss)
    estimator.backward(x, y)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    estimator.finalize()


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM], ids=["GRU", "LSTM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flops_of_torchs_layers_are_those_of_their_matrices(kind, dtype):
    """Forward: every matrix once per step; backward: twice, but for the gradient of the state before the first."""
    layer, x = kind(5, 7, dtype=dtype), torch.randn(6, 3, 5, dtype=dtype, requires_grad=True)
    w_ih, w_hh = layer.weight_ih_l0.numel(), layer.weight_hh_l0.numel()
    with Counter() as forward:
        out = layer(x)[0]
    with Counter() as backward:
        out.sum().backward()
    assert not forward.blind
    assert not backward.blind
    assert forward.total == 2 * 6 * 3 * (w_ih + w_hh), "forward"
    whole = 4 * 6 * 3 * (w_ih + w_hh)
    assert whole - 4 * 3 * w_hh <= backward.total <= whole, f"backward: {backward.total}, {whole} at most"


def test_flops_of_cudnns_kernel_are_counted_by_the_same_formula():
    x, h = torch.empty(6, 3, 5, device="meta"), torch.empty(1, 3, 7, device="meta")
    weights = [torch.empty(shape, device="meta") for shape in ((21, 5), (21, 7), (21,), (21,))]
    buffer = torch.empty(1, device="meta")
    with Counter() as counter:
        torch.ops.aten._cudnn_rnn(x, weights, 4, buffer, h, None, 3, 7, 0, 1, False, 0.0, True, False, [], None)
    assert counter.total == 2 * 6 * 3 * 21 * (5 + 7)


def test_flops_of_a_step_grow_by_one_product_per_round():
    torch.manual_seed(0)
    model = make_model("gru", (20,), 9, {"width": 8})
    x, y = torch.randint(9, (4, 20)), torch.randint(9, (4, 20))
    counts = [step_flops(HighwayBP(iterations=k).bind(model, tokens_loss), x, y) for k in (1, 2, 5)]
    assert counts[1] - counts[0] == 2 * 20 * 4 * 24 * 8, f"one more round: {counts[1] - counts[0]}"
    assert counts[2] - counts[1] == 3 * (counts[1] - counts[0])
    assert step_flops(Backprop().bind(model, tokens_loss), x, y) < counts[0]


def test_it_works_without_triton():
    program = """
import sys
sys.modules["triton"] = None
import torch
from fastbp import HighwayBP
from fastbp.models import make_model
from fastbp.recipe import Recipe
model = make_model("gru", (1, 4, 4), 3, {"width": 4})
HighwayBP(iterations=2).bind(model, Recipe().make_loss()).backward(torch.randn(2, 1, 4, 4), torch.tensor([0, 1]))
assert model.layers[0].weight_hh_l0.grad.any()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", KINDS)
def test_the_device_gives_the_processors_gradient(kind, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # which cuDNN's layers otherwise compute in
    model, x, y = net_and_batch(kind, steps=50)
    model, x = model.float(), x.float()
    for k in (0, 3, 60):
        method = HighwayBP(iterations=k, lstm_state=KINDS[kind][2])
        want = gradients(model, x, y, method)
        got = gradients(copy.deepcopy(model).cuda(), x.cuda(), y.cuda(), method)
        for name, grad in want.items():
            torch.testing.assert_close(got[name].cpu(), grad, rtol=2e-3, atol=1e-5)
