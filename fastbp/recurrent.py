"""`Recurrent`: a net over time, `head(layers(stem(x)))`, whose layers are torch's own GRU and LSTM.

Its forward and plain backpropagation are torch's (cuDNN on a GPU). A layer's steps share their weights, so it is no
`Chain` of blocks; `HighwayBP` sees into it all the same and spreads the gradient over time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

_SETTINGS = {  # of a layer: what it must be, and what to do instead
    "num_layers": (1, "give `layers` one module per layer"),
    "bidirectional": (False, "only layers that run forward in time are supported"),
    "proj_size": (0, "only layers without a projection are supported"),
    "batch_first": (False, "the layers get (T, B, features), whatever the stem and the head get"),
}


class Recurrent(nn.Module):
    """A net over time: `head(layers(stem(x)))`.

    Args:
        stem: takes x to one vector per step, (B, T, features); `nn.Identity()` for nothing.
        layers: an `nn.ModuleList` (or a list) of `nn.GRU` and `nn.LSTM` with one layer each, steps first
            (`batch_first=False`), the lowest first. They start at the state zero.
        head: takes the top layer's last output (B, features), or all of them (B, T, features).
        last_step: which of the two the head gets.
        residual: from the second layer on, whether a layer's input is added to its output.
        steps: the longest sequence of the training data, where that is known; `HighwayBP.exact` needs it.

    Raises:
        TypeError: a part is not a module, or a layer is no GRU or LSTM.
        ValueError: there is no layer, its settings are not those above, or widths do not fit.
    """

    def __init__(
        self,
        stem: nn.Module,
        layers: nn.ModuleList | Sequence[nn.Module],
        head: nn.Module,
        *,
        last_step: bool,
        residual: bool = False,
        steps: int | None = None,
    ) -> None:
        super().__init__()
        for name, part in (("stem", stem), ("head", head)):
            if not isinstance(part, nn.Module):
                raise TypeError(
                    f"Recurrent: {name} must be an nn.Module (nn.Identity() for none), got {type(part).__name__}"
                )
        if not isinstance(layers, nn.ModuleList | list | tuple):
            raise TypeError(
                f"Recurrent: layers must be an nn.ModuleList of nn.GRU and nn.LSTM, got {type(layers).__name__}"
            )
        _check_layers(list(layers), residual)
        if steps is not None and steps < 1:
            raise ValueError(f"Recurrent: steps = {steps}: must be at least 1")
        self.stem = stem
        self.layers = layers if isinstance(layers, nn.ModuleList) else nn.ModuleList(layers)
        self.head = head
        self.last_step, self.residual, self.steps = last_step, residual, steps

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x, lambda layer, h: layer(h)[0])

    def compute(self, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        """The forward with every layer run by `run(layer, h)`: (T, B, features in) to (T, B, features out)."""
        if isinstance(x, nn.utils.rnn.PackedSequence):
            raise TypeError(
                "Recurrent: x is a PackedSequence, but all sequences of a batch have one length here: pass a tensor "
                "(B, T, features), of sequences of equal length or padded ones (pad_packed_sequence(x, "
                "batch_first=True)[0]) with a loss that leaves the padding out"
            )
        h = self.stem(x).transpose(0, 1)
        for i, layer in enumerate(self.layers):
            out = run(layer, h)
            h = h + out if self.residual and i else out
        return self.head(h[-1] if self.last_step else h.transpose(0, 1))

    def extra_repr(self) -> str:
        return f"last_step={self.last_step}, residual={self.residual}, steps={self.steps}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for layer in self.layers:
            layer.flatten_parameters()  # type: ignore[operator]  # a copy's weights are apart; cuDNN wants one piece


def _check_layers(layers: list[nn.Module], residual: bool) -> None:
    if not layers:
        raise ValueError("Recurrent: layers is empty, at least one nn.GRU or nn.LSTM is needed")
    width = None
    for i, layer in enumerate(layers):
        kind = type(layer).__name__
        if type(layer) not in (nn.GRU, nn.LSTM):
            raise TypeError(f"Recurrent: layers[{i}] is a {kind}; only nn.GRU and nn.LSTM themselves are supported")
        for name, (want, instead) in _SETTINGS.items():
            got = getattr(layer, name)
            if got != want:
                raise ValueError(f"Recurrent: layers[{i}] is a {kind} with {name}={got}, expected {want}: {instead}")
        if layer.dropout:  # has no effect within a single layer
            raise ValueError(
                f"Recurrent: layers[{i}] is a {kind} with dropout={layer.dropout}: dropout between layers is not "
                "supported; put an nn.Dropout into the stem or the head"
            )
        if width is not None and layer.input_size != width:
            raise ValueError(f"Recurrent: layers[{i}] takes {layer.input_size} features, layers[{i - 1}] gives {width}")
        if residual and i and layer.input_size != layer.hidden_size:
            raise ValueError(
                f"Recurrent: residual=True needs layers of equal width from the second on; layers[{i}] takes "
                f"{layer.input_size} features and gives {layer.hidden_size}"
            )
        width = layer.hidden_size


class PixelSteps(nn.Module):
    """Images (B, C, H, W) as sequences of pixels, row by row: (B, H W / step, step C).

    Args:
        step: pixels per time step, a divisor of H W; W makes a step of a row.
    """

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        pixels = x.flatten(2).transpose(1, 2)
        return pixels.reshape(len(x), -1, self.step * x.shape[1])

    def extra_repr(self) -> str:
        return f"step={self.step}"
