"""FLOPs that a step executes, forward and backward, counted in torch's dispatcher on a copy of the model.

Counted are matrix products, convolutions and attention with torch's own formulas, two FLOPs per multiply-add;
elementwise work is not.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import flop_counter
from torch.utils._python_dispatch import TorchDispatchMode

from fastbp.method import GradientEstimator

_COUNTED_PERIODS = 2
_MORE_PERIODS = 8  # where two differ: a method that does not say so


def step_flops(estimator: GradientEstimator, x: Tensor, y: Tensor) -> float | None:
    """Mean FLOPs of `estimator.backward(x, y)`, once its warm-up is over; None where the counter is blind.

    Where chance decides what a step computes, the mean is over `estimator.variants` kinds of step that stand for all.

    Args:
        estimator: bound to a copy that may be thrown away, after `start_epoch` and a few steps.
        x: inputs of one full batch.
        y: its labels.
    """
    if any(isinstance(module, nn.RNNBase) for module in estimator.model.modules()) and _blind(estimator, x, y):
        return None
    if estimator.variants > 1:
        return _mean_over_variants(estimator, x, y) or None
    _period(estimator, x, y)  # what is done once, such as a first look at the statistics, is not counted
    periods = [_period(estimator, x, y) for _ in range(_COUNTED_PERIODS)]
    if len(set(periods)) > 1 or estimator.ranks > 1:  # ranks may differ, and must take every step together
        periods += [_period(estimator, x, y) for _ in range(_MORE_PERIODS)]
    return sum(periods) / len(periods) / estimator.period or None


def _mean_over_variants(estimator: GradientEstimator, x: Tensor, y: Tensor) -> float:
    """Every variant and every place in the period equally often; steps before fill a pipeline and do what is once."""
    variants = estimator.variants
    steps, before = math.lcm(estimator.period, variants), estimator.period + estimator.latency
    counts = []
    for step in range(-before, steps):
        estimator.choose(step % variants)
        counts.append(_count(estimator, x, y))
    return sum(counts[before:]) / steps


def _blind(estimator: GradientEstimator, x: Tensor, y: Tensor) -> bool:
    """Whether a step runs recurrent kernels without a formula."""
    with Counter() as counter:
        estimator.backward(x, y)
    return counter.blind


def _period(estimator: GradientEstimator, x: Tensor, y: Tensor) -> int:
    return sum(_count(estimator, x, y) for _ in range(estimator.period))


def _count(estimator: GradientEstimator, x: Tensor, y: Tensor) -> int:
    for parameter in estimator.model.parameters():
        parameter.grad = None
    with Counter() as counter:
        estimator.backward(x, y)
    return counter.total


class Counter(TorchDispatchMode):
    """Adds up the FLOPs of everything dispatched inside.

    Attributes:
        blind: whether a recurrent kernel without a formula was among it, so that the total is too low.

    `torch.utils.flop_counter.FlopCounterMode` does the same per module, but its hooks refuse `autograd.grad`, on which
    two of the methods stand.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.blind = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        self.blind |= func._overloadpacket in _OPAQUE
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return flop_counter.sdpa_flop_count(query, key, value)


def _attention_backward(grad_out: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return flop_counter.sdpa_backward_flop_count(grad_out, query, key, value)


def _convolution_backward(
    grad_out: Any,
    x: Any,
    w: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    *args: Any,
    **_: Any,
) -> int:
    """As many for the gradient of the input as for that of the weight, and for either as for the forward."""
    mask = args[-1]
    positions = x if transposed else grad_out
    return 2 * (mask[0] + mask[1]) * positions[0] * math.prod(positions[2:]) * math.prod(w)


def _cudnn_rnn(x: Any, weights: Any, *args: Any, **_: Any) -> int:
    """Every step multiplies with all matrices."""
    return 2 * math.prod(x[:-1]) * sum(math.prod(w) for w in weights if len(w) == 2)


def _cudnn_rnn_backward(x: Any, weights: Any, *args: Any, **_: Any) -> int:
    """As many for the gradients of inputs and states, which cuDNN always computes, and for those of the weights."""
    return (1 + args[-1][3]) * _cudnn_rnn(x, weights)


def _mkldnn_rnn(x: Any, w_input: Any, w_recurrent: Any, *args: Any, **_: Any) -> int:
    return _cudnn_rnn(x, [w_input, w_recurrent])


def _mkldnn_rnn_backward(x: Any, w_input: Any, w_recurrent: Any, *args: Any, **_: Any) -> int:
    """It always computes all gradients."""
    return 2 * _mkldnn_rnn(x, w_input, w_recurrent)


_FORMULAS: dict[Any, Any] = {
    **flop_counter.flop_registry,
    # torch's own counts a grouped convolution's weight gradient as if it were not grouped
    torch.ops.aten.convolution_backward: flop_counter.shape_wrapper(_convolution_backward),
    # torch's table misses attention on the CPU (pytorch issue 195460)
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.shape_wrapper(_attention),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.shape_wrapper(
        _attention_backward
    ),
}
_FORMULAS |= {
    getattr(torch.ops.aten, name): flop_counter.shape_wrapper(formula)
    for name, formula in {
        "_cudnn_rnn": _cudnn_rnn,
        "_cudnn_rnn_backward": _cudnn_rnn_backward,
        "mkldnn_rnn_layer": _mkldnn_rnn,
        "mkldnn_rnn_layer_backward": _mkldnn_rnn_backward,
    }.items()
}
_OPAQUE = {
    getattr(torch.ops.aten, name)
    for name in ("miopen_rnn", "miopen_rnn_backward", "_lstm_mps", "lstm_mps_backward")
    if hasattr(torch.ops.aten, name)
}
