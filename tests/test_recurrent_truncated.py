"""Highway-BP without a highway (gamma = 1) and a loss on the last step: truncated backpropagation, at its price."""

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastbp import HighwayBP, Recurrent
from fastbp.cell_rounds import LayerRounds
from fastbp.flops import Counter, step_flops
from fastbp.highway_recurrent import highway_layer

KINDS = {"gru": (nn.GRU, "co"), "lstm": (nn.LSTM, "co"), "lstm-ch": (nn.LSTM, "ch")}


def net(kind, *, residual=False, last_step=True):
    torch.manual_seed(3)
    widths = (3, 4, 4, 4) if residual else (3, 4, 2, 5)
    layers = [KINDS[kind][0](a, b) for a, b in pairwise(widths)]
    head = nn.Linear(widths[-1], 3)
    return Recurrent(nn.Linear(2, 3), layers, head, last_step=last_step, residual=residual).double()


def batch(steps, size=2):
    return torch.randn(size, steps, 2, dtype=torch.float64), torch.arange(size) % 3


def before(layer, x):
    """The state after x, without a graph; None, which is zero, after nothing."""
    state = layer(x)[1] if len(x) else None
    return tuple(s.detach() for s in state) if isinstance(state, tuple) else state if state is None else state.detach()


def truncated(model, x, y, k):
    """By autograd, layer by layer from the top: every output's gradient through the k + 1 cells that end in it."""
    h = [model.stem(x).transpose(0, 1)]
    stem_out = h[0]
    h[0] = stem_out.detach()
    for i, layer in enumerate(model.layers):
        out = layer(h[-1])[0].detach()
        h.append(h[-1] + out if model.residual and i else out)
    top = h[-1].clone().requires_grad_()
    head = list(model.head.parameters())
    G, *found = torch.autograd.grad(cross_entropy(model.head(top[-1]), y), [top, *head])
    grads = dict(zip(head, found, strict=True))
    for i, layer in reversed(list(enumerate(model.layers))):
        weights, dx = list(layer.parameters()), torch.zeros_like(h[i])
        grads |= {w: torch.zeros_like(w) for w in weights}
        for t in range(len(h[i])):
            start = max(0, t - k)
            some = h[i][start : t + 1].clone().requires_grad_()
            last = layer(some, before(layer, h[i][:start]))[0][-1]
            dx_t, *found = torch.autograd.grad(last, [some, *weights], G[t])
            dx[start : t + 1] += dx_t
            for w, grad in zip(weights, found, strict=True):
                grads[w] += grad
        G = G + dx if model.residual and i else dx
    stem = list(model.stem.parameters())
    grads |= dict(zip(stem, torch.autograd.grad(stem_out, stem, G), strict=True))
    return {name: grads[p] for name, p in model.named_parameters()}


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_a_stack_is_truncated_backpropagation(kind, residual):
    model = net(kind, residual=residual)
    x, y = batch(9)
    for k in range(8):
        want = truncated(model, x, y, k)
        model.zero_grad()
        HighwayBP(iterations=k, gamma=1.0, lstm_state=KINDS[kind][1]).bind(model, cross_entropy).backward(x, y)
        for name, p in model.named_parameters():
            error = ((p.grad - want[name]).norm() / want[name].norm()).item()
            assert error < 1e-12, f"k={k}: {name} is {error:.3g} from truncated backpropagation"


@pytest.mark.parametrize("min_residual", [False, True], ids=["sum", "min_residual"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_steps_that_are_left_out_change_nothing(kind, min_residual):
    make, state = KINDS[kind]
    for steps, k, first in ((1, 0, 0), (9, 0, 8), (9, 3, 8), (9, 3, 5), (9, 4, 2), (30, 4, 17), (30, 2, 29)):
        torch.manual_seed(0)
        layer = make(3, 5).double()
        x = torch.randn(steps, 2, 3, dtype=torch.float64, requires_grad=True)
        G = torch.randn(steps, 2, 5, dtype=torch.float64)
        G[:first] = 0
        growth = [], []
        rounds = [LayerRounds(k, 1.0, state, min_residual, some) for some in growth]
        outs = highway_layer(layer, x, rounds[0]), highway_layer(layer, x, rounds[1], first)
        whole, window = (torch.autograd.grad(out, [x, *layer.parameters()], G) for out in outs)
        for a, b in zip(window, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14, msg=f"{steps} steps, k={k}, first={first}")
        torch.testing.assert_close(growth[1], growth[0])
        assert not window[0][: max(0, first - k)].any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_highway_needs_the_steps_before(kind):
    """With gamma < 1 a last step's gradient reaches every step, so `first` must not cut anything off."""
    make, state = KINDS[kind]
    torch.manual_seed(0)
    layer, x = make(3, 5).double(), torch.randn(9, 2, 3, dtype=torch.float64, requires_grad=True)
    outs = [highway_layer(layer, x, LayerRounds(2, 0.5, state), first) for first in (0, 8)]
    whole, told = (torch.autograd.grad(out[-1].sum(), x)[0] for out in outs)
    assert torch.equal(whole, told)
    assert whole[0].any()


def test_the_backward_costs_the_last_steps_alone():
    """What longer sequences add to a step is the forward, of an LSTM twice: its cell state is not kept."""
    for kind, forwards in (("gru", 1), ("lstm", 2)):
        model = net(kind)
        counts = {}
        for name, method in (("truncated", HighwayBP(2, gamma=1.0)), ("highway", HighwayBP(2))):
            estimator = method.bind(model, cross_entropy)
            counts[name] = step_flops(estimator, *batch(60)) - step_flops(estimator, *batch(40))
        with Counter() as long, torch.no_grad():
            model(batch(60)[0])
        with Counter() as short, torch.no_grad():
            model(batch(40)[0])
        forward = long.total - short.total
        stem = 2 * 20 * 2 * model.stem.weight.numel()  # and as much for its weight's gradient
        assert counts["truncated"] == forwards * (forward - stem) + 2 * stem, f"{kind}: {counts}"
        assert counts["highway"] > 3 * forward


def test_with_a_loss_at_every_step_all_steps_count():
    model = net("gru", last_step=False)
    x, y = batch(9)[0], torch.randint(3, (2, 9))
    estimator = HighwayBP(iterations=1, gamma=1.0).bind(model, lambda h, t: cross_entropy(h.flatten(0, 1), t.flatten()))
    estimator.backward(x.requires_grad_(), y)
    assert x.grad.any(2).all(), f"every step's input gets a gradient: {x.grad.norm(dim=(0, 2))}"
