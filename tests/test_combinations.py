"""The README's table of combinations against what `bind` does: every cell, and every nest of three."""

import ast
import itertools
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from fastbp import DDG, HighwayBP, Method, nest
from fastbp.method import method_class
from fastbp.testing import _Suite, sgd, small_batch, small_net

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def value(text: str) -> Method:
    """The method that a cell such as `ddg(weights="mixed")` means."""
    call = ast.parse(text.strip().strip("`") + ("" if text.strip().endswith(")`") else "()"), mode="eval").body
    assert isinstance(call, ast.Call)
    assert isinstance(call.func, ast.Name)
    return method_class(call.func.id)(**{k.arg: ast.literal_eval(k.value) for k in call.keywords})


def table() -> dict[tuple[Method, Method], bool]:
    """(outer, inner) to whether the README says that they combine."""
    rows = re.findall(r"^\|(.*)\|$", README[README.index("| `inner` |") :].partition("\n\n")[0], flags=re.MULTILINE)
    head, _, *body = ([cell.strip() for cell in row.split("|")] for row in rows)
    inner = [value(cell) for cell in head[1:]]
    found = {}
    for first, *cells in body:
        assert len(cells) == len(inner), first
        for method, cell in zip(inner, cells, strict=True):
            assert cell in ("yes", "no"), f"{first} on {method}: {cell!r}"
            found[value(first), method] = cell == "yes"
    return found


TABLE = table()
SUPPORTED = [nest(pair) for pair, yes in TABLE.items() if yes and not getattr(pair[1], "processes", False)]


def refusal(method: Method) -> str | None:
    """Why `bind` refuses a combination on a net that suits all; None where it does not."""
    try:
        method.bind(small_net(), cross_entropy)
    except TypeError as error:
        return str(error)
    except ValueError as error:  # the pair is fine, but here is no group of processes
        if "needs a torch.distributed group" not in str(error):
            raise
    return None


def test_the_table_has_every_method_on_every_other():
    outer, inner = {type(o).__name__ for o, _ in TABLE}, {type(i).__name__ for _, i in TABLE}
    assert outer == {"LayerDropBack", "DecorrelatedBP"}, f"who wraps: {outer}"
    assert inner == {"LayerDropBack", "DecorrelatedBP", "HighwayBP", "DDG"}, f"who is wrapped: {inner}"
    ddg = [method for _, method in TABLE if isinstance(method, DDG)]
    assert {method.weights for method in ddg} == {"stash", "mixed", "replay"}
    assert any(method.processes for method in ddg)


@pytest.mark.parametrize("pair", TABLE, ids=lambda pair: str(nest(pair)))
def test_the_table_is_what_bind_does(pair):
    why = refusal(nest(pair))
    assert (why is None) == TABLE[pair], f"{nest(pair)}: {why or 'bound'}, the README says yes: {TABLE[pair]}"
    if why is not None:
        assert len(why.splitlines()) == 1, why
        assert type(pair[0]).__name__ in why, why


def test_a_nest_of_three_works_where_each_two_of_it_do():
    for (a, b), c in itertools.product(TABLE, {inner for _, inner in TABLE}):
        if (b, c) not in TABLE or (a, c) not in TABLE:
            continue  # a leaf wraps nothing
        expected = TABLE[a, b] and TABLE[b, c] and TABLE[a, c]
        why = refusal(nest([a, b, c]))
        assert (why is None) == expected, f"{nest([a, b, c])}: {why or 'bound'}"


@pytest.mark.parametrize(
    "method", [HighwayBP(iterations=1), HighwayBP(combination="min_residual"), *SUPPORTED], ids=str
)
def test_a_gradient_scaler_scales_in_the_loss(method):
    """A power of two changes no digit: the weights are those without a scaler."""
    ours, plain = small_net(), small_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    torch.manual_seed(0)  # of which rows a whitening matrix learns from
    scaled = method.bind(ours, lambda out, y: scaler.scale(cross_entropy(out, y)))
    torch.manual_seed(0)
    unscaled = method.bind(plain, cross_entropy)
    optimizers = [torch.optim.SGD(estimator.model.parameters(), lr=0.1) for estimator in (scaled, unscaled)]
    for epoch in range(3):
        for estimator in (scaled, unscaled):
            estimator.start_epoch(epoch)
        for step in range(3):
            x, y = small_batch(3 * epoch + step, 8)
            for estimator, optimizer in zip((scaled, unscaled), optimizers, strict=True):
                optimizer.zero_grad()
                torch.manual_seed(step)
                estimator.backward(x, y)
            if any(p.grad is not None for p in ours.parameters()):
                scaler.step(optimizers[0])
                scaler.update()
            optimizers[1].step()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("method", SUPPORTED, ids=str)
def test_a_supported_pair_trains_and_is_backprop_at_its_exact_setting(method):
    suite = _Suite(method, sgd, small_net, small_batch)
    suite.learns()
    suite.exact_is_backprop()
