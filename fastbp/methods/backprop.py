"""Backprop: the gradient itself, the baseline of everything.

Idea        Reverse-mode differentiation of the loss through the whole model.
Exact when  Always.
Needs       Any model. Leaf.
Cost        One forward, about two forwards' worth of backward; memory: all saved activations.
Departs     Nowhere.
Not for     Nothing: the arm that every other one has to beat.
Reference   Rumelhart, Hinton, Williams (Nature 1986), doi:10.1038/323533a0.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fastbp.method import GradientEstimator, LossFn, Method


@dataclass(frozen=True)
class Backprop(Method):
    """Plain backpropagation as a method, so that the baseline runs through the same lines as all others."""

    def bind(self, model: nn.Module, loss_fn: LossFn) -> GradientEstimator:
        return _Backprop(model, loss_fn)

    def exact(self, model: nn.Module) -> Backprop:
        return self


class _Backprop(GradientEstimator):
    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        self.model = model
        self.loss_fn = loss_fn

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        loss = self.loss_fn(self.model(x), y)
        loss.backward()
        return loss.detach()
