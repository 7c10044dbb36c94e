"""How many rounds Highway-BP runs in which epoch, and what its two forms, deep and over time, share."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fastbp.measurement import beside_backprop
from fastbp.method import EpochPlan, GradientEstimator, LossFn

if TYPE_CHECKING:
    from fastbp.methods.highway import HighwayBP

_MEASURE_EVERY = 100  # steps


class Schedule:
    """What the steps of an epoch do: how many rounds, with which gamma, and when they measure their increments.

    Args:
        method: its settings.
        blocks: rounds that are exact; None where that depends on the batch.

    Attributes:
        iterations: rounds k of this epoch's steps.
        gamma: of this epoch.
        exact: whether this epoch is plain backprop.
    """

    def __init__(self, method: HighwayBP, blocks: int | None) -> None:
        self.method, self.blocks = method, blocks
        self._seen: Tensor | list[float] | None = None  # ratios of increment to sum, by round, measured last
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> EpochPlan:
        method, self._step = self.method, 0
        growing, warming = epoch < method.growing_epochs, epoch < method.gamma_epochs
        most = -(-method.iterations * (epoch + 1) // method.growing_epochs) if growing else method.iterations
        self.gamma = method.gamma * epoch / method.gamma_epochs if warming else method.gamma
        self.exact = 0 < method.exact_from <= epoch
        small = [m for m, ratio in enumerate(self._ratios(), start=1) if ratio < method.tolerance]
        self.iterations = min([most, *small])
        if not (method.growing_epochs or method.exact_from or method.tolerance):
            return EpochPlan()
        return EpochPlan(kind="exact" if self.exact else f"k={self.iterations}")

    def rounds(self) -> tuple[int, bool]:
        """Of the next step: how many rounds to run, and whether to hand the ratios to `saw`."""
        measure = self._step % _MEASURE_EVERY == 0 and self.iterations > 0
        self._step += 1
        return self.iterations, measure

    def compares(self) -> bool:
        """Whether the next step's gradient is compared with backprop's."""
        every = self.method.cosine_every
        return bool(every) and self._step % every == 0

    def saw(self, ratios: Tensor | None) -> None:
        """Of every round, the norm of its increment over the norm of the sum so far; stays on the device."""
        self._seen = ratios

    def _ratios(self) -> list[float]:
        if isinstance(self._seen, Tensor):
            self._seen = self._seen.tolist()
        return self._seen or []

    def metrics(self) -> dict[str, float]:
        """The rounds, and the increments of the step that looked at them last: growing ones mean cancelling blocks."""
        rounds = self.blocks if self.exact else self.iterations
        found = {} if rounds is None else {"highway/iterations": float(rounds)}
        ratios = [] if self.exact else self._ratios()
        if ratios:
            found |= {"highway/last_increment": ratios[-1], "highway/largest_increment": max(ratios)}
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"increments": self._ratios()} if self.method.tolerance else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seen = list(state["increments"])


class ScheduledEstimator(GradientEstimator):
    """Highway-BP bound to a model: its schedule, and the epochs that are plain backprop.

    Args:
        method: its settings.
        model: what to train.
        loss_fn: of its outputs.
        blocks: rounds that are exact; None where that depends on the batch.
    """

    def __init__(self, method: HighwayBP, model: nn.Module, loss_fn: LossFn, blocks: int | None) -> None:
        self.method = method
        self.model = model
        self.loss_fn = loss_fn
        self.schedule = Schedule(method, blocks)
        self.agreement: Tensor | None = None  # the last cosine and relative error of this epoch

    @abstractmethod
    def estimate(self, x: Tensor, y: Tensor, iterations: int, measure: bool) -> tuple[Tensor, Tensor | None]:
        """Add the estimate of so many rounds to the gradients; the loss, and the ratios of `Schedule.saw` if asked."""

    def forward(self, x: Tensor) -> Tensor:
        """The outputs with the graph of plain backprop."""
        return self.model(x)

    def start_epoch(self, epoch: int) -> EpochPlan:
        self.agreement = None
        return self.schedule.start_epoch(epoch)

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.schedule.exact:
            loss = self.loss_fn(self.forward(x), y)
            loss.backward()
            return loss.detach()
        if not self.schedule.compares():
            return self._step(x, y)
        places, loss = self.devices or [x.device], lambda: self.loss_fn(self.forward(x), y)
        out, self.agreement = beside_backprop(self.model, places, lambda: self._step(x, y), loss)
        return out

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        iterations, measure = self.schedule.rounds()
        loss, ratios = self.estimate(x, y, iterations, measure)
        if measure:
            self.schedule.saw(ratios)
        return loss.detach()

    def metrics(self) -> dict[str, float]:
        found = self.schedule.metrics()
        if self.agreement is not None:
            found["highway/cosine"], found["highway/relative_error"] = self.agreement.tolist()
        return found

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.method.tolerance:
            self.schedule.load_state_dict(state)
        else:
            super().load_state_dict(state)
