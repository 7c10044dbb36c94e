"""The one protocol: a `Method` is a value, bound to a model it becomes a `GradientEstimator`.

Every method replaces the gradient of the loss by an estimate. An estimator, given a batch, leaves an estimate of
dL/dp in `p.grad`; data, optimizer, schedule, clock, evaluation and checkpoints are the same for all methods and
belong to the training loop. Read this file first.
"""

from __future__ import annotations

import copy
import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import compress, product
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastbp.knobs import coerce_fields, nearest

LossFn = Callable[[Tensor, Tensor], Tensor]
M = TypeVar("M", bound="Method")


@dataclass(frozen=True)
class EpochPlan:
    """What a method asks of the recipe for one epoch; the plans of nested methods multiply.

    Attributes:
        lr_scale: factor on the recipe's learning rate, all parameter groups alike.
        batch_scale: factor on the recipe's batch size.
        kind: names epochs whose steps do other work than usual, so that each kind is warmed up and counted by itself.
    """

    lr_scale: float = 1.0
    batch_scale: float = 1.0
    kind: str = ""

    def __mul__(self, other: EpochPlan) -> EpochPlan:
        kind = "+".join(part for part in (self.kind, other.kind) if part)
        return EpochPlan(self.lr_scale * other.lr_scale, self.batch_scale * other.batch_scale, kind)


@dataclass(frozen=True)
class Method(ABC):
    """A method as a value: a frozen dataclass of hyper-parameters, equal, hashable, picklable, JSON-able.

    Fields annotated with a domain of `fastbp.knobs` are the method's searchable knobs. A method that acts on top of
    another one has a field `inner: Method = Backprop()`; one that has not is a leaf.
    """

    def __post_init__(self) -> None:
        coerce_fields(self)
        inner = getattr(self, "inner", self)
        if not isinstance(inner, Method):
            raise TypeError(f"{type(self).__name__}.inner = {inner!r}: expected a method, such as Backprop()")

    @abstractmethod
    def bind(self, model: nn.Module, loss_fn: LossFn) -> GradientEstimator:
        """Attach the method to a model, before the optimizer is made.

        Args:
            model: the user's model; it stays the object to optimise and to evaluate.
            loss_fn: `loss_fn(model(x), y)` is the scalar mean loss of a batch.

        Raises:
            TypeError: the method cannot see into this model or does not combine with its inner method.
            ValueError: a setting is impossible for this model. In both cases the model is untouched.
        """

    @abstractmethod
    def exact(self, model: nn.Module) -> Method | None:
        """The same method at the setting where its estimate is the gradient; None where there is none.

        The result keeps the method's plan and machinery, so that a run with it is the control that separates what
        the estimate costs or brings from what the plan (learning rate, batch size) brings.
        """

    @property
    def name(self) -> str:
        """The short name in `METHODS`, or `module:Class` for a method of somebody else's."""
        return next(
            (k for k, v in _methods().items() if v is type(self)),
            f"{type(self).__module__}:{type(self).__qualname__}",
        )

    @property
    def epoch_period(self) -> int:
        """Epochs after which the kinds of epoch repeat, such as 2 where every second one drops; `inner` included."""
        inner = getattr(self, "inner", None)
        return inner.epoch_period if isinstance(inner, Method) else 1

    def to_dict(self) -> dict[str, Any]:
        """The method as JSON-able nested dictionaries; `method_from_dict` is the inverse."""
        out: dict[str, Any] = {"method": self.name}
        for f in fields(self):
            value = getattr(self, f.name)
            out[f.name] = (
                value.to_dict() if isinstance(value, Method) else list(value) if isinstance(value, tuple) else value
            )
        return out

    @classmethod
    def from_dict(cls: type[M], data: dict[str, Any]) -> M:
        """The inverse of `to_dict`; missing fields take their defaults.

        Raises:
            TypeError: the dictionary describes another class than the one `from_dict` was called on.
        """
        method = method_from_dict(data)
        if not isinstance(method, cls):
            raise TypeError(f"{data.get('method')!r} is a {type(method).__name__}, not a {cls.__name__}")
        return method


class GradientEstimator(ABC):
    """A method bound to one model: born complete, it holds all of the method's state.

    Attributes:
        model: the user's object; what to optimise, evaluate and save.
        period: steps after which the work of a step repeats, so that its cost can be averaged.
        latency: steps until every parameter gets its first gradient.
        devices: where it runs, the model's own device first; empty: there alone.
        ranks: processes that share the work and must take every step together.
        variants: kinds of step that stand for all, equally often, where chance decides what a step computes; else 1.
    """

    model: nn.Module
    period: int = 1  # steps after which the work of a step repeats
    latency: int = 0  # steps until every parameter gets its first gradient
    devices: Sequence[torch.device] = ()
    ranks: int = 1
    variants: int = 1

    def choose(self, variant: int) -> None:  # noqa: B027 (most methods leave nothing to chance)
        """Make every step until `start_epoch` one of this kind, 0..variants-1, because its cost is being counted."""

    def prepare(self, x: Tensor, y: Tensor) -> None:  # noqa: B027 (most methods have nothing to decide)
        """Decide what depends on the shape of a batch, off the clock and without a trace; before the optimizer is made.

        Args:
            x: one batch of inputs, of any values.
            y: its labels.
        """

    def param_groups(self) -> list[dict[str, Any]]:
        """What to hand to the optimizer; a group's `lr_scale` is a factor on its learning rate, applied by the loop."""
        return [{"params": list(self.model.parameters())}]

    @abstractmethod
    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """Run one batch forward, add the gradient estimate to `p.grad`, return the detached mean loss.

        `p.grad` stays None where this step has no update for `p`: the optimizer then skips it wholly, without
        momentum and weight decay. Nothing here waits for the device.
        """

    def start_epoch(self, epoch: int) -> EpochPlan:
        """Announce the 0-based epoch; returns what the method asks of the recipe for it."""
        return EpochPlan()

    def drain(self, *, final: bool) -> Iterator[None]:
        """Gradients still in flight at the end of an epoch, one optimizer step per item.

        Used as `for _ in estimator.drain(final=last_epoch): optimizer.step()`; empty for all methods but delayed ones.
        """
        return iter(())

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The complete, current model on one device, to evaluate or save it."""
        yield self.model

    def share(self, total: Tensor) -> Tensor:
        """A sum of the losses that `backward` returned, as every process that takes part must know it."""
        return total

    def table(self) -> list[dict[str, float]]:
        """What the method decided about this model, to be shown before training; rows of equal keys, often none."""
        return []

    def metrics(self) -> dict[str, float]:
        """Numbers about the method itself, read once per epoch, off the clock."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything beyond the model's own state that exact resuming needs, complete at epoch boundaries."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, but was given {sorted(state)}")

    def finalize(self) -> nn.Module:
        """Called once after training: the plain, deployable model without a trace of the method."""
        return self.model


class WrappingEstimator(GradientEstimator):
    """An estimator on top of another: forwards everything; a subclass overrides what differs and calls `super()`."""

    def __init__(self, method: Method, inner: GradientEstimator) -> None:
        self.method = method
        self.inner = inner
        self.period, self.latency, self.ranks = inner.period, inner.latency, inner.ranks

    @property
    def model(self) -> nn.Module:  # type: ignore[override]
        return self.inner.model

    @property
    def devices(self) -> Sequence[torch.device]:  # type: ignore[override]
        return self.inner.devices

    @property
    def variants(self) -> int:  # type: ignore[override]
        return self.inner.variants

    def choose(self, variant: int) -> None:
        self.inner.choose(variant)

    def prepare(self, x: Tensor, y: Tensor) -> None:
        self.inner.prepare(x, y)

    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups()

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner.backward(x, y)

    def start_epoch(self, epoch: int) -> EpochPlan:
        return self.inner.start_epoch(epoch)

    def drain(self, *, final: bool) -> Iterator[None]:
        return self.inner.drain(final=final)

    def whole(self) -> AbstractContextManager[nn.Module]:
        return self.inner.whole()

    def share(self, total: Tensor) -> Tensor:
        return self.inner.share(total)

    def table(self) -> list[dict[str, float]]:
        return self.inner.table()

    def metrics(self) -> dict[str, float]:
        return self.inner.metrics()

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])

    def finalize(self) -> nn.Module:
        return self.inner.finalize()


def start_again(estimator: GradientEstimator, epoch: int, plan: EpochPlan, state: dict[str, Any]) -> bool:
    """Start the epoch that had this plan in this state, from which steps since may have led the estimator away.

    Returns:
        whether it has this plan again; not so where the plan rests on more than the state.
    """
    if estimator.start_epoch(epoch) == plan:
        return True
    estimator.load_state_dict(copy.deepcopy(state))
    return estimator.start_epoch(epoch) == plan


def parts(method: Method) -> list[Method]:
    """The methods of a combination, outermost first; plain backprop is the empty list.

    >>> from fastbp import DDG, LayerDropBack
    >>> [type(part).__name__ for part in parts(LayerDropBack(inner=DDG(modules=2)))]
    ['LayerDropBack', 'DDG']
    """
    from fastbp.methods.backprop import Backprop

    if isinstance(method, Backprop):
        return []
    inner = getattr(method, "inner", None)
    return [method, *(parts(inner) if isinstance(inner, Method) else [])]


def nest(methods: Iterable[Method]) -> Method:
    """The inverse of `parts`: wraps from the outermost inwards, `Backprop()` innermost where no leaf is given.

    Raises:
        TypeError: a leaf stands before another method.
    """
    from fastbp.methods.backprop import Backprop

    result: Method | None = None
    for method in reversed(list(methods)):
        if any(f.name == "inner" for f in fields(method)):
            result = replace(method, inner=result or Backprop())  # type: ignore[call-arg]
        elif result is None:
            result = method
        else:
            raise TypeError(f"{type(method).__name__} is a leaf: it cannot wrap {type(result).__name__}")
    return result or Backprop()


def ablations(method: Method) -> list[Method]:
    """All 2^n sub-combinations of a combination of n methods, the whole first, plain backprop last."""
    whole = parts(method)
    return [nest(compress(whole, keep)) for keep in product((True, False), repeat=len(whole))]


def reseed(method: Method, seed: int) -> Method:
    """The same combination with random choices of its own for every run: `seed` is mixed into every field `seed`.

    Seed 0 changes nothing. Equal on every rank of a distributed run, as it depends on the two numbers alone.
    """
    return nest(
        replace(part, seed=part.seed + 1_000_003 * seed) if any(f.name == "seed" for f in fields(part)) else part  # type: ignore[attr-defined,call-arg]
        for part in parts(method)
    )


def uncompared(method: Method) -> Method:
    """The same combination without the steps that only measure, `cosine_every`: what its own work costs."""
    return nest(
        replace(part, cosine_every=0) if any(f.name == "cosine_every" for f in fields(part)) else part  # type: ignore[call-arg]
        for part in parts(method)
    )


def method_from_dict(data: dict[str, Any]) -> Method:
    """The inverse of `Method.to_dict`; also builds a method from the mapping of a sweep file.

    Args:
        data: `{"method": name, field: value, ..., "inner": {...}}`, name a key of `METHODS` or `package.module:Class`.

    Raises:
        ValueError: unknown name or field, or a value that the method refuses; the message has the nearest valid name.
    """
    data = dict(data)
    kind = method_class(data.pop("method", None))
    names = [f.name for f in fields(kind)]
    for key in data:
        if key not in names:
            raise ValueError(f"{kind.__name__} has no field {key!r}{nearest(key, names)}")
    values = {k: method_from_dict(v) if k == "inner" and isinstance(v, dict) else v for k, v in data.items()}
    if isinstance(values.get("inner"), str):
        values["inner"] = method_from_dict({"method": values["inner"]})
    return kind(**values)


def method_class(name: Any) -> type[Method]:
    """The class behind a short name or an importable path `package.module:Class`.

    Raises:
        ValueError: there is no such method; the message has the nearest valid name.
    """
    known = _methods()
    if not isinstance(name, str):
        raise ValueError(f"method: expected a name, got {name!r}; one of {', '.join(known)}, or package.module:Class")
    if ":" in name:
        module, _, attribute = name.partition(":")
        try:
            kind = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"method {name!r} cannot be imported: {error}") from error
        if not (isinstance(kind, type) and issubclass(kind, Method) and is_dataclass(kind)):
            raise ValueError(f"{name!r} is not a frozen dataclass derived from fastbp.Method")
        return kind
    if name not in known:
        raise ValueError(
            f"no method {name!r}{nearest(name, known)}; known: {', '.join(known)}, or package.module:Class"
        )
    return known[name]


def _methods() -> dict[str, type[Method]]:
    from fastbp.methods import METHODS

    return METHODS
