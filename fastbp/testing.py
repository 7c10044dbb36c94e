"""The conformance suite: what every method must keep, for ours and for anyone's.

    from fastbp.testing import check_method
    check_method(MyMethod(strength=0.3))

Whole trajectories are compared, not single gradients: a lost random state or a corrupted second step passes a
one-gradient test. Everything runs in float64 on the CPU in about a second.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastbp.chain import Chain, Residual
from fastbp.method import EpochPlan, GradientEstimator, Method, method_from_dict
from fastbp.methods import Backprop

ModelFactory = Callable[[], nn.Module]
Recipe = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

EPOCHS = 5
BATCHES = 4
TOLERANCE = 1e-9


def small_net() -> nn.Module:
    """A residual net on 1x8x8 images with batch norm and dropout, in float64: all that trips a method up."""

    def branch() -> nn.Module:
        return nn.Sequential(
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, bias=False),
            nn.Dropout(0.1),
            nn.Conv2d(6, 6, 1),
        )

    torch.manual_seed(0)
    head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    return Chain(nn.Conv2d(1, 6, 3, padding=1), [Residual(branch()) for _ in range(4)], head).double()


def small_batch(index: int, size: int) -> tuple[Tensor, Tensor]:
    """Batch number `index` of a learnable toy task: x (size, 1, 8, 8) float64, y (size,) in 0..3."""
    generator = torch.Generator().manual_seed(1000 + index)
    y = torch.randint(4, (size,), generator=generator)
    x = torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64)
    for quadrant in range(4):
        row, column = 4 * (quadrant // 2), 4 * (quadrant % 2)
        x[y == quadrant, :, row : row + 4, column : column + 4] += 1.5
    return x, y


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The default recipe: Nesterov momentum and weight decay, so that a wrong None or zero gradient shows."""
    return torch.optim.SGD(parameters, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3)


def check_method(
    method: Method, recipe: Recipe = sgd, make_model: ModelFactory = small_net, batch=small_batch
) -> list[str]:
    """Run the whole suite on one method; returns the names of the checks that ran.

    Args:
        method: any method, combinations included.
        recipe: makes the optimizer from the model's parameters.
        make_model: makes the same model each time, weights included.
        batch: `batch(index, size)` gives batch number `index`, always the same.

    Raises:
        AssertionError: a property does not hold; the message says which and what was found.
    """
    suite = _Suite(method, recipe, make_model, batch)
    checks = [
        suite.is_a_value,
        suite.exact_is_backprop,
        suite.learns,
        suite.resumes,
        suite.evaluation_leaves_no_trace,
        suite.finalizes,
        suite.keeps_frozen,
        suite.refusal_is_clean,
    ]
    for check in checks:
        check()
    return [check.__name__ for check in checks]


@dataclass
class _Suite:
    method: Method
    recipe: Recipe
    make_model: ModelFactory
    batch: Callable[[int, int], tuple[Tensor, Tensor]]

    def is_a_value(self) -> None:
        method = self.method
        assert pickle.loads(pickle.dumps(method)) == method, f"{method}: changed by pickling"
        assert hash(pickle.loads(pickle.dumps(method))) == hash(method), f"{method}: equal values hash differently"
        if "<locals>" not in type(method).__qualname__:
            assert method_from_dict(method.to_dict()) == method, f"{method}: to_dict and back gives another method"

    def exact_is_backprop(self) -> None:
        exact = self.method.exact(self.make_model())
        if exact is None:
            return
        mine = _Training(self, exact)
        losses = mine.train(EPOCHS)
        reference = _Training(self, Backprop(), plans=mine.plans).train(EPOCHS)
        worst = _distance(losses, reference)
        assert worst <= TOLERANCE, f"{exact}: losses differ from backprop's by {worst:.3g} at the exact setting"

    def learns(self) -> None:
        losses = _Training(self, self.method).train(EPOCHS)
        first, last = sum(losses[:BATCHES]) / BATCHES, sum(losses[-BATCHES:]) / BATCHES
        assert last < first, f"{self.method}: mean loss went from {first:.4g} to {last:.4g} in {EPOCHS} epochs"

    def resumes(self) -> None:
        whole = _Training(self, self.method).train(EPOCHS)
        for stop in range(1, EPOCHS):
            first = _Training(self, self.method)
            losses = first.train(stop)
            second = _Training(self, self.method)
            torch.manual_seed(99)
            second.load(first.save(), stop)
            losses += second.train(EPOCHS)
            worst = _distance(losses, whole)
            assert worst == 0, f"{self.method}: stopping after epoch {stop} and resuming moves losses by {worst:.3g}"

    def evaluation_leaves_no_trace(self) -> None:
        plain = _Training(self, self.method).train(EPOCHS)
        evaluated = _Training(self, self.method, evaluate=True).train(EPOCHS)
        worst = _distance(plain, evaluated)
        assert worst == 0, f"{self.method}: evaluating between steps moves the losses by {worst:.3g}"

    def finalizes(self) -> None:
        before = self.make_model()
        training = _Training(self, self.method)
        training.train(EPOCHS)
        model = training.estimator.model.eval()
        x, _ = self.batch(0, 8)
        with torch.no_grad():
            expected = model(x)
            plain = training.estimator.finalize()
            worst = (plain(x) - expected).abs().max().item()
        assert worst <= 1e-12, f"{self.method}: finalize changed the outputs by {worst:.3g}"
        assert list(plain.state_dict()) == list(before.state_dict()), (
            f"{self.method}: finalize left other state_dict keys"
        )
        assert _types(plain) == _types(before), f"{self.method}: finalize left other classes: {_types(plain)}"
        assert [n for n, _ in plain.named_parameters()] == [n for n, _ in before.named_parameters()], (
            f"{self.method}: finalize left the parameters in another order"
        )
        assert all(p.requires_grad for p in plain.parameters()), f"{self.method}: finalize left frozen parameters"
        assert not _hooks(plain), f"{self.method}: finalize left hooks on {_hooks(plain)}"
        pickle.dumps(plain)

    def keeps_frozen(self) -> None:
        training = _Training(self, self.method, frozen=2)
        before = {name: p.clone() for name, p in training.frozen.items()}
        training.train(EPOCHS)
        training.estimator.finalize()
        for name, p in training.frozen.items():
            assert not p.requires_grad, f"{self.method}: unfroze {name}"
            assert p.grad is None, f"{self.method}: gave frozen {name} a gradient"
            assert torch.equal(p, before[name]), f"{self.method}: moved frozen {name}"

    def refusal_is_clean(self) -> None:
        model = _Opaque().double()
        before = (_types(model), list(model.state_dict()), [p.requires_grad for p in model.parameters()])
        try:
            self.method.bind(model, functional.cross_entropy)
        except (TypeError, ValueError) as refusal:
            after = (_types(model), list(model.state_dict()), [p.requires_grad for p in model.parameters()])
            assert after == before and not _hooks(model), f"{self.method}: refused a model but changed it"
            assert str(refusal), f"{self.method}: refused a model without a reason"


class _Training:
    """The loop of `fastbp.run`, small, with everything a check wants to disturb."""

    def __init__(
        self,
        suite: _Suite,
        method: Method,
        *,
        plans: list[EpochPlan] | None = None,
        evaluate: bool = False,
        frozen: int = 0,
    ) -> None:
        model = suite.make_model().train()
        self.frozen = dict(list(model.named_parameters())[:frozen])
        for parameter in self.frozen.values():
            parameter.requires_grad_(False)
        torch.manual_seed(7)
        self.estimator: GradientEstimator = method.bind(model, functional.cross_entropy)
        self.optimizer = suite.recipe(list(model.parameters()))
        self.base_lr = self.optimizer.param_groups[0]["lr"]
        self.batch, self.evaluate, self.given = suite.batch, evaluate, plans
        self.plans: list[EpochPlan] = []
        self.epoch = 0

    def train(self, until: int) -> list[float]:
        losses = []
        while self.epoch < until:
            plan = self.estimator.start_epoch(self.epoch)
            self.plans.append(plan)
            plan = self.given[self.epoch] if self.given else plan
            for group in self.optimizer.param_groups:
                group["lr"] = self.base_lr * plan.lr_scale
            torch.manual_seed(self.epoch)  # dropout: a function of the epoch, as in `fastbp.run`
            for x, y in self._batches(int(8 * plan.batch_scale)):
                self.optimizer.zero_grad(set_to_none=True)
                losses.append(self.estimator.backward(x, y).item())
                self.optimizer.step()
                if self.evaluate:
                    self._evaluate(x)
            for _ in self.estimator.drain(final=self.epoch == EPOCHS - 1):
                self.optimizer.step()
            self.estimator.metrics()
            self.epoch += 1
        return losses

    def _batches(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(BATCHES):
            yield self.batch(self.epoch * BATCHES + i, size)

    @torch.no_grad()
    def _evaluate(self, x: Tensor) -> None:
        self.estimator.model.eval()
        self.estimator.model(x)
        self.estimator.model.train()

    def save(self) -> io.BytesIO:
        state = {
            "model": dict(self.estimator.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "estimator": self.estimator.state_dict(),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        buffer.seek(0)
        return buffer

    def load(self, buffer: io.BytesIO, epoch: int) -> None:
        state: dict[str, Any] = torch.load(buffer, weights_only=True)
        self.estimator.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.estimator.load_state_dict(state["estimator"])
        self.epoch = epoch


class _Opaque(nn.Module):
    """A model whose structure cannot be seen, with one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.only = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.only(x).tanh()


def _distance(a: list[float], b: list[float]) -> float:
    assert len(a) == len(b), f"{len(a)} losses against {len(b)}"
    return max(abs(p - q) for p, q in zip(a, b, strict=True))


def _types(model: nn.Module) -> list[str]:
    return [type(module).__qualname__ for module in model.modules()]


def _hooks(model: nn.Module) -> list[str]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [name for name, module in model.named_modules() for kind in kinds if getattr(module, kind)]
