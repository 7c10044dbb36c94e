"""Where a batch has fewer rows than a linear layer has outputs, R meets the rows: the same numbers for less work."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastbp import DecorrelatedBP
from fastbp.methods.decorrelated import plain_state_dict
from fastbp.whitening import decorrelation_of


def net(features=12, outputs=40):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, outputs), nn.Tanh(), nn.Linear(outputs, 10)).double()


def bound(model, **settings):
    estimator = DecorrelatedBP(sample_fraction=1.0, decor_lr=0.05, **settings).bind(model, cross_entropy)
    for layer in estimator.layers.values():
        D = decorrelation_of(layer).D
        D.copy_(0.1 * torch.randn(D.shape, generator=torch.Generator().manual_seed(3), dtype=D.dtype))
    return estimator


def batch(n, features=12):
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, features, generator=generator, dtype=torch.float64), torch.arange(n) % 10


@pytest.mark.parametrize("settings", [{}, {"structure": "block", "block_size": 5}], ids=["full", "block"])
@pytest.mark.parametrize("n", [3, 39, 41])
def test_forward_gradients_and_updates_are_those_of_the_folded_weight(n, settings, monkeypatch):
    x, y = batch(n)
    results = []
    for fold in (False, True):
        model = net()
        estimator = bound(model, **settings)
        if fold:  # the slow truth: R in the weight, whatever the batch
            for layer in estimator.layers.values():
                for key in [k for k, hook in layer._forward_pre_hooks.items() if hook.__name__ == "before"]:
                    del layer._forward_pre_hooks[key]
        loss = estimator.backward(x, y)
        matrices = [decorrelation_of(layer).D.clone() for layer in estimator.layers.values()]
        results.append((loss, [p.grad for p in model.parameters()], matrices))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)


def flops_of(n):
    estimator = DecorrelatedBP(interval=10**6).bind(net(64, 512), cross_entropy)
    with FlopCounterMode(display=False) as counter:
        estimator.backward(*batch(n, 64))
    return counter.get_total_flops()


def test_few_rows_cost_what_they_should():
    """Layer 1 (64 to 512, n < 512): 2 n F^2 forward and none back, as x needs no gradient; layer 2 folds (n > 10)."""
    n, layers = 16, 6 * 16 * 512 * 10 + 4 * 16 * 64 * 512
    assert flops_of(n) == layers + 2 * n * 64**2 + 4 * 10 * 512**2


def test_a_copy_of_the_model_uses_its_own_matrices():
    model = net()
    bound(model)
    x, _ = batch(3)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            decorrelation_of(layer).D.zero_()
    plain = net()
    plain.load_state_dict(plain_state_dict(twin))
    torch.testing.assert_close(twin(x), plain(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(twin(x), model(x))


def test_the_weight_is_whole_outside_calls_even_after_one_that_failed():
    model = net()
    bound(model)
    whole = model[0].weight.detach().clone()
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 7, dtype=torch.float64))
    assert torch.equal(model[0].weight, whole)
    model(batch(3)[0])
    assert torch.equal(model[0].weight, whole), "W R is W after a call on few rows"


def test_under_activation_checkpointing():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net()

        def forward(self, x):
            return checkpoint(self.net, x, use_reentrant=False)

    x, y = batch(3)
    plain, saved = net(), Checkpointed()
    bound(plain).backward(x, y)
    bound(saved).backward(x, y)
    for p, q in zip(plain.parameters(), saved.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)


def test_a_cached_weight_is_whole_for_calls_of_any_size():
    model = net()
    bound(model)
    few, many = batch(3)[0], batch(50)[0]
    want = model(few), model(many)
    for first, second in ((0, 1), (1, 0)):
        with torch.nn.utils.parametrize.cached():
            got = {i: model((few, many)[i]) for i in (first, second)}
        torch.testing.assert_close((got[0], got[1]), want, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_compiled_and_under_autocast():
    x, y = batch(3)
    plain, compiled = net().float(), net().float()
    bound(plain).backward(x.float(), y)
    bound(compiled)
    torch._dynamo.reset()
    out = torch.compile(compiled, backend="aot_eager")(x.float())
    cross_entropy(out, y).backward()
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = plain(x.float())
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), plain(x.float()), rtol=0.05, atol=0.05)
