"""Decorrelated backpropagation: every layer learns to whiten its input, so that its weights learn in fewer steps.

Idea        A layer applies W R x instead of W x. R starts at the identity and is trained, without backprop, by a local
            rule that drives the second moment of R x towards the identity; W gets the gradient taken through R.
Exact when  decor_lr = 0 (R stays the identity to the bit; the statistics are still computed: the control arm).
Needs       Linear and Conv2d layers that are called as modules, timm's convolutions with "same" padding or standardised
            weights included. Wraps `inner`. Pretrained weights are loaded before `bind`.
Cost        Per layer of input width F, output width o and n sampled rows: 4 o F^2 for W R and its backward (4 F^2 per
            row of the batch in a linear layer with fewer rows than outputs, where R meets the rows); per update of R,
            6 n F^2 (n < F), 4 n F^2 + 2 F^3 (n <= 2 F) or 2 n F^2 + 6 F^3. Memory F^2 per layer (fp32).
            structure = block divides that by F / block_size, channel by the square of the kernel positions. Overhead on
            two CPU threads where R learns from one image, full and block: CIFAR ResNet-18, batch 32: 290 and 17 %; at
            64 px ResNet-18 and 50, batch 16: 1549 and 84 %, 723 and 96 %, VGG-16, batch 8: 337 and 229 %; at 224 px
            ViT-Ti, batch 8: 23 and 12 %, AlexNet, batch 16: 169 and 16 %; a literal two-stage layer: 1246, 4335,
            2144, 796, 75 and 874 % (benchmarks/dbp_overhead.py; GPU: not measured).
Departs     W R is folded into the weight (same mathematics, one layer call); bias and padding_mode are kept; samples
            are drawn without replacement, at least one; the variance term scales rows of R, as the paper's rule says
            (the authors' code scales columns); layers wider than `max_features` stay plain, and a warning lists them;
            R is updated at the end of the backward pass, before the optimizer moves W instead of after; a sample that
            is not finite moves nothing.
            structure, rule = normalized, center, gain and preserve_function are not in the paper; all are off.
Not for     Wide inputs with small batches (F^2 dominates: 3x3 convolutions of late layers on small images; use
            structure = block); inputs with a large mean, unless decor_lr is far below 2 over the top eigenvalue of the
            second moment or center is set; the qkv of BEiT, EVA-02 and SwinV2, whose weight is read without a call.
            Short trainings of small nets: ResNet-20, 2048 images of 16 px, 5 epochs, one CPU thread, 3 seeds
            (sweeps/decorrelation_strengths.yaml): 0.63 times as fast as backprop with an update in every step, 0.98
            with one in 16, no clear difference in accuracy. Crossed with each other: decor_lr 1e-3 instead of 1e-5 adds
            1.0 points [-0.4, 2.5], the learning rate .2 instead of .05 4.0, neither clear after correction; kappa (.01,
            .5), sample_fraction (.1, .3) and interval (1, 4) move 0.2 at most. An interval of 4 takes 0.69 of the time
            of 1, a sample_fraction of .3 1.19 of that of .1; both are clear.
Reference   Dalm, Offergeld, Ahmad, van Gerven (2024), arXiv:2405.02385.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from fastbp.knobs import Choice, LogUniform, require
from fastbp.layer_inputs import Layer, channel_rows, groups_of, input_rows, readable_layers
from fastbp.measurement import measuring
from fastbp.method import GradientEstimator, LossFn, Method, WrappingEstimator, parts
from fastbp.methods.backprop import Backprop
from fastbp.methods.ddg import DDG
from fastbp.units import wrappings
from fastbp.whitening import (
    RULES,
    STRUCTURES,
    Decorrelation,
    Layout,
    Rule,
    bracket,
    decorrelation_losses,
    decorrelation_of,
    directions,
    gain,
    layout,
    meet_few_rows,
    top_eigenvalue,
)

_SAFE_STEP = 0.5  # decor_lr x top eigenvalue of the off-diagonal second moment; the rule diverges above 2
_LOSSES = ("loss", "off_diagonal", "variance", "loss_of_input")


@dataclass(frozen=True)
class DecorrelatedBP(Method):
    """Layer inputs are whitened by a learned matrix R = I + D (arXiv:2405.02385, equations 4 to 6).

    With gradient accumulation over a batches use `interval` = a, or a multiple: R then moves once per optimizer step,
    after its last batch. On a `DistributedDataParallel` model the update is averaged over the ranks, whose matrices
    stay equal. For a moving average of the weights, average `plain_state_dict(model)`: the mean of W R is not the mean
    of W times the mean of R.

    `estimator.report(x)` lists for every layer what it costs and, on a batch x, how far R x is from white.

    Attributes:
        decor_lr: step size of R, `R <- R - decor_lr M R`; 1e-4 in the authors' configurations.
        kappa: weight in [0, 1] of unit variance against decorrelation; 1e-2 in the authors' configurations.
        sample_fraction: share in (0, 1] of the images (Conv2d) or rows (Linear) that R learns from in a step; 0.1 in
            the authors' configurations.
        interval: R is updated in every `interval`-th step; `decor_lr` is not rescaled.
        structure: `full`, one dense matrix per layer (per group of a grouped convolution); `block`, square blocks of
            whole channels; `channel`, one matrix over the channels that all kernel positions share.
        block_size: the widest block, in features; for structure `block`.
        max_features: layers whose matrices would be wider stay plain.
        layers: which layers get a matrix: `all`, `conv`, `linear`, or a regular expression searched for in their path.
        rule: `standard` (the paper's) or `normalized` (the authors' code: the off-diagonal part over F - 1, the
            variance part doubled).
        center: the rule sees the covariance of the sample instead of its second moment; the input is not shifted.
        gain: R is rescaled at every update so that it keeps the length of its input (arXiv:2407.10780).
        preserve_function: W absorbs the inverse of every update of R, so that W R does not move by it.
        inner: the method that computes the gradient.
    """

    decor_lr: Annotated[float, LogUniform(1e-6, 1e-2)] = 1e-4
    kappa: Annotated[float, LogUniform(1e-3, 0.5)] = 1e-2
    sample_fraction: Annotated[float, Choice((0.01, 0.03, 0.1, 0.3, 1.0))] = 0.1
    interval: Annotated[int, Choice((1, 4, 16))] = 1
    structure: str = "full"
    block_size: int = 256
    max_features: int = 4608
    layers: str = "all"
    rule: str = "standard"
    center: bool = False
    gain: bool = False
    preserve_function: bool = False
    inner: Method = Backprop()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "decor_lr", self.decor_lr >= 0, "must not be negative; 0 is backprop")
        require(self, "kappa", 0 <= self.kappa <= 1, "must be in [0, 1]")
        require(self, "sample_fraction", 0 < self.sample_fraction <= 1, "must be in (0, 1]")
        require(self, "interval", self.interval >= 1, "must be at least 1")
        require(self, "structure", self.structure in STRUCTURES, f"must be one of {', '.join(STRUCTURES)}")
        require(self, "block_size", self.block_size >= 1, "must be at least 1")
        require(self, "max_features", self.max_features >= 1, "must be at least 1")
        require(self, "layers", _is_pattern(self.layers), "must be all, conv, linear or a regular expression")
        require(self, "rule", self.rule in RULES, f"must be one of {', '.join(RULES)}")

    def bind(self, model: nn.Module, loss_fn: LossFn) -> GradientEstimator:
        inner = parts(self.inner)
        if any(isinstance(part, DecorrelatedBP) for part in inner):
            raise TypeError("DecorrelatedBP in DecorrelatedBP: the weights already are W R")
        if any(isinstance(part, DDG) and part.weights == "mixed" for part in inner):
            raise TypeError(
                "DecorrelatedBP on DDG(weights='mixed'): the layers apply W R, a copy that does not follow W; "
                "use weights='stash' or 'replay'"
            )
        if any(isinstance(part, DDG) and part.processes for part in inner):
            raise TypeError(
                "DecorrelatedBP on DDG(processes=True): its matrices would live in other processes than its rule; "
                "use processes=False"
            )
        if self.preserve_function and any(isinstance(part, DDG) for part in inner):
            raise TypeError(
                "DecorrelatedBP(preserve_function=True) on DDG: it would move weights that batches in flight still "
                "need; use preserve_function=False"
            )
        if _data_parallel(model) and (self.gain or self.preserve_function):
            raise TypeError(
                "DecorrelatedBP on DistributedDataParallel: gain and preserve_function are of one rank's sample and "
                "would part the ranks; use gain=False and preserve_function=False"
            )
        layers = readable_layers(
            model,
            choose=self.layers,
            max_features=self.max_features,
            width=lambda layer: self._layout(layer).width,
            who="DecorrelatedBP",
        )
        loss = _EndOfForward(loss_fn)
        return _DecorrelatedBP(self, self.inner.bind(model, loss), layers, loss)

    def _layout(self, layer: Layer) -> Layout:
        return layout(layer.weight, groups_of(layer), self.structure, self.block_size)

    def exact(self, model: nn.Module) -> Method | None:
        """The same machinery with matrices that stay the identity."""
        inner = self.inner.exact(model)
        return None if inner is None else replace(self, decor_lr=0.0, gain=False, inner=inner)


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that `finalize` would leave, of a model that still trains: weights are W R, keys the plain ones.

    The tensors are detached; weights that R multiplies are new, the others share storage with the model.
    """
    state = dict(model.state_dict())
    out: dict[str, Tensor] = {}
    bound = {path: layer for path, layer in model.named_modules() if _is_decorrelated(layer)}
    for key, value in state.items():
        path, mark, rest = key.partition("parametrizations.weight.")
        layer = bound.get(path.removesuffix("."))
        if not mark or layer is None:
            out[key] = value
        elif rest == "original":
            out[f"{path}weight"] = layer.weight.detach()  # type: ignore[union-attr]
    return out


class _DecorrelatedBP(WrappingEstimator):
    method: DecorrelatedBP

    def __init__(
        self, method: DecorrelatedBP, inner: GradientEstimator, layers: dict[str, Layer], loss: _EndOfForward
    ) -> None:
        super().__init__(method, inner)
        loss.reached = self._forward_ends
        self.layers = layers
        self.rule = Rule(method.decor_lr, method.kappa, method.rule, method.center, method.gain)
        self.step = 0
        self.period = math.lcm(self.period, method.interval)
        self.orders = {path: list(layer._parameters) for path, layer in layers.items()}
        self.kept: dict[str, list[Tensor]] = {}
        self.seen: frozenset[str] = frozenset()  # layers that the forward sampled, once it is over
        self.chosen: dict[int, Tensor] = {}  # this step's sample, by number of rows
        self._choose: Callable[[int], Tensor] = torch.compiler.disable(self._draw)  # type: ignore[assignment]
        self.totals: set[int] = set()  # numbers of rows met in the last sampled step
        self.generator = torch.Generator(device=next(inner.model.parameters()).device)
        self.seed = torch.initial_seed() % 2**63
        self.top: dict[str, Tensor] = {}  # of each layer's first sample; read off the clock
        self.sizes: dict[str, int] = {}  # rows of each layer's last sample
        self.warned = False
        self.sampling = False
        self.hooks = []
        for path, layer in layers.items():
            matrices = method._layout(layer)
            with _parameters_untouched():
                parametrize.register_parametrization(
                    layer, "weight", Decorrelation(matrices, layer.weight), unsafe=True
                )
            self.hooks.append(layer.register_forward_pre_hook(self._keep(path), with_kwargs=True))
            if isinstance(layer, nn.Linear):  # after the hook that keeps x, as R learns from what it has not met
                self.hooks += meet_few_rows(layer)
        self.ranks_of = _data_parallel(inner.model)
        if self.ranks_of is not None:  # every rank has all of D: broadcasting it with each forward would be in vain
            names = {id(buffer): name for name, buffer in self.ranks_of.module.named_buffers()}
            self.ranks_of.parameters_to_ignore |= {names[id(decorrelation_of(layer).D)] for layer in layers.values()}

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        self.sampling = (self.step + 1) % self.method.interval == 0
        if self.sampling:
            self.chosen = {total: self._choose(total) for total in self.totals}
            self.totals.clear()
        try:
            loss = super().backward(x, y)
            if self.kept:
                self._update()
        finally:
            self.sampling = False
            self.seen = frozenset()
            self.kept.clear()
            self.chosen.clear()
        self.step += 1
        return loss

    @torch.no_grad()
    def _update(self) -> None:
        """One update of every matrix from this step's sample."""
        matrices = [decorrelation_of(self.layers[path]) for path in self.kept]
        with torch.autocast(matrices[0].D.device.type, enabled=False):  # learnt in full precision, whatever the model's
            rows = [
                self.rule.prepare(self._rows(path, matrix), matrix.D)
                for path, matrix in zip(self.kept, matrices, strict=True)
            ]
            for path, sample in zip(self.kept, rows, strict=True):
                self.sizes[path] = sample.shape[1]
                if path not in self.top:
                    self.top[path] = self.rule.scale(sample.shape[2]) * top_eigenvalue(sample)
            moves = directions(self.rule, rows, [matrix.D for matrix in matrices])
            self._average(moves)
            for path, matrix, sample, move in zip(self.kept, matrices, rows, moves, strict=True):
                grown = gain(sample, matrix.D) if self.method.gain else None
                finite = move.sum().isfinite()  # a batch that overflows, as under a GradScaler, would end R for good
                if self.method.preserve_function:
                    self._absorb(self.layers[path], matrix, sample, grown, finite)
                D = torch.where(finite, self.rule.next_D(matrix.D, move, grown), matrix.D)
                matrix.D = matrix.layout.without_padding(D)

    def _rows(self, path: str, matrix: Decorrelation) -> Tensor:
        """The kept inputs of a layer as rows (matrices, n, F); a layer that was called twice has rows of both calls."""
        layer = self.layers[path]
        if matrix.layout.taps > 1:
            return torch.cat([channel_rows(layer, kept) for kept in self.kept[path]], dim=1)
        return matrix.layout.rows(torch.cat([input_rows(layer, kept) for kept in self.kept[path]], dim=1))

    def _average(self, moves: list[Tensor]) -> None:
        """The mean over the ranks of a DistributedDataParallel model: M R is linear in the second moment."""
        if self.ranks_of is not None:
            for move in moves:
                dist.all_reduce(move, group=self.ranks_of.process_group)
                move /= dist.get_world_size(self.ranks_of.process_group)

    def _absorb(self, layer: Layer, matrix: Decorrelation, rows: Tensor, grown: Tensor | None, finite: Tensor) -> None:
        """W <- W (I - decor_lr M)^-1 / g, so that W R stays as it is when R becomes g (I - decor_lr M) R."""
        W: Tensor = layer.parametrizations.weight.original  # type: ignore[union-attr]
        off, diagonal = self.rule.weights(matrix.layout.width)
        step = -self.method.decor_lr * bracket(rows, matrix.D, off, diagonal)
        step.diagonal(dim1=1, dim2=2).add_(1.0)
        split = matrix.layout.split(W).to(step.dtype)
        kept = torch.linalg.solve_ex(step, split, left=False)[0]
        kept = matrix.layout.join(kept if grown is None else kept / grown, W).to(W.dtype)
        W.data.copy_(torch.where(finite, kept, W))

    def _keep(self, path: str):
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            learns = self.sampling and layer.training and torch.is_grad_enabled() and not measuring()
            if learns and path not in self.seen:  # activation checkpointing runs layers again: once is enough
                self.kept.setdefault(path, []).append(
                    self._sample(layer, (args[0] if args else kwargs["input"]).detach())
                )

        return hook

    def _note(self, path: str):
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            self.kept.setdefault(path, []).append(self._sample(layer, (args[0] if args else kwargs["input"]).detach()))

        return hook

    def _forward_ends(self) -> None:
        self.seen = frozenset(self.kept)

    def _sample(self, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            x = x.reshape(-1, x.shape[-1])
        elif x.dim() == 3:
            return x
        total = len(x)
        self.totals.add(total)
        if total not in self.chosen:
            self.chosen[total] = self._choose(total)
        return x[self.chosen[total].to(x.device)]

    def _draw(self, total: int) -> Tensor:
        """Which rows of so many this step learns from: a pure function of the seed, the step and the number."""
        count = max(1, int(total * self.method.sample_fraction))
        self.generator.manual_seed((self.seed + 1_000_003 * self.step + total) % 2**63)
        return torch.randperm(total, generator=self.generator, device=self.generator.device)[:count]

    def metrics(self) -> dict[str, float]:
        """Root mean square of the entries of D, mean and largest over layers; decor_lr times the top eigenvalue."""
        rms = torch.stack([decorrelation_of(layer).D.square().mean().sqrt().cpu() for layer in self.layers.values()])
        out = {**super().metrics(), "dbp/rms_D_mean": rms.mean().item(), "dbp/rms_D_max": rms.max().item()}
        if not self.top:
            return out
        step, path = max((self.method.decor_lr * top.item(), path) for path, top in self.top.items())
        out["dbp/step_x_top_eigenvalue"] = step
        if not self.warned:
            self.warned = True
            self._warn(step, path)
        return out

    def _warn(self, step: float, path: str) -> None:
        if step > _SAFE_STEP:
            warnings.warn(
                f"DecorrelatedBP.decor_lr = {self.method.decor_lr:g} is too large for layer {path}: times the top "
                f"eigenvalue of its input's off-diagonal second moment it is {step:.2g}, and R diverges above 2; "
                f"use at most {_rounded_down(self.method.decor_lr * _SAFE_STEP / step):.1g}",
                stacklevel=3,
            )
        silent = [path for path in self.layers if path not in self.top]
        if silent:
            warnings.warn(
                f"DecorrelatedBP: {len(silent)} layer(s) were never called as modules and stay plain (their weights "
                f"are read by another module): {', '.join(silent)}",
                stacklevel=3,
            )

    def report(self, x: Tensor | None = None) -> list[dict[str, Any]]:
        """One row per layer: F, matrices, bytes of R, rows of the last sample, step x top eigenvalue, rms of D.

        Args:
            x: a batch of inputs; its sample, in evaluation mode, adds how far R x is from white, and leaves no trace:
                `off_diagonal` = sum of C_ij^2 / F^2, `variance` = sum of (K_ii - 1)^2 / F^2, `loss` = (1-kappa) times
                the one plus kappa times the other, and `loss_of_input`, which is the loss at R = I. None for a layer
                that the model does not call.
        """
        losses: dict[str, dict[str, Any]] = {} if x is None else self._losses(x)
        none: dict[str, Any] = {} if x is None else dict.fromkeys(_LOSSES)
        return [
            {
                "layer": path,
                "features": (D := decorrelation_of(layer).D).shape[-1],
                "matrices": len(D),
                "bytes": D.nbytes,
                "rows": self.sizes.get(path, 0),
                "step_x_top_eigenvalue": self.method.decor_lr * self.top[path].item() if path in self.top else None,
                "rms_D": D.square().mean().sqrt().item(),
                **losses.get(path, none),
            }
            for path, layer in self.layers.items()
        ]

    def _losses(self, x: Tensor) -> dict[str, dict[str, float]]:
        """The losses of every layer that a forward in evaluation mode calls."""
        before = self.kept, self.totals, self.chosen
        self.kept, self.totals, self.chosen = {}, set(), {}
        modes = [(module, module.training) for module in self.model.modules()]
        notes = [(layer, self._note(path)) for path, layer in self.layers.items()]
        hooks = [layer.register_forward_pre_hook(note, prepend=True, with_kwargs=True) for layer, note in notes]
        try:
            with self.whole() as model:  # to the end: the matrices have to be where x is
                model.eval()(x)  # with a graph: without one torch's encoder layers call none of their parts
                with torch.autocast(self.generator.device.type, enabled=False), torch.no_grad():
                    return {path: self._losses_of(path) for path in self.kept}
        finally:
            self.kept, self.totals, self.chosen = before
            for hook in hooks:
                hook.remove()
            for module, training in modes:
                module.training = training

    def _losses_of(self, path: str) -> dict[str, float]:
        matrix = decorrelation_of(self.layers[path])
        rows = self.rule.prepare(self._rows(path, matrix), matrix.D)
        padding = matrix.layout.padding * matrix.layout.groups
        found = decorrelation_losses(rows, matrix.D, self.method.kappa, padding)
        plain = decorrelation_losses(rows, torch.zeros_like(matrix.D), self.method.kappa, padding)
        return dict(zip(_LOSSES, map(Tensor.item, (*found, plain[0])), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """The matrices themselves are buffers of the model and travel in its state dict."""
        return {**super().state_dict(), "step": self.step, "seed": self.seed, "top": dict(self.top)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.step, self.seed, self.top = state["step"], state["seed"], dict(state["top"])

    def finalize(self) -> nn.Module:
        model = super().finalize()
        for hook in self.hooks:
            hook.remove()
        for path, layer in self.layers.items():
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
            own = layer._parameters
            for name in self.orders[path]:  # parametrizing moved the weight behind the bias
                own[name] = own.pop(name)
        return model


class _EndOfForward:
    """A loss that says when it is asked for: the forward is over then, and what runs again is recomputation."""

    def __init__(self, loss_fn: LossFn) -> None:
        self.loss_fn = loss_fn
        self.reached: Callable[[], None] = lambda: None

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        self.reached()
        return self.loss_fn(output, y)


def _data_parallel(model: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel around or inside what torch.compile wrapped; None where there is none."""
    return next((wrapper for wrapper in wrappings(model) if isinstance(wrapper, DistributedDataParallel)), None)


@contextmanager
def _parameters_untouched() -> Iterator[None]:
    """Registering sets a parameter to itself, by `set_`, which drops the hooks DistributedDataParallel has on it."""
    setter = parametrize._maybe_set
    parametrize._maybe_set = lambda dest, src: None if dest is src else setter(dest, src)
    try:
        yield
    finally:
        parametrize._maybe_set = setter


def _is_decorrelated(layer: nn.Module) -> bool:
    return parametrize.is_parametrized(layer, "weight") and any(
        isinstance(part, Decorrelation)
        for part in layer.parametrizations.weight  # type: ignore[union-attr]
    )


def _rounded_down(value: float) -> float:
    """To one significant digit."""
    digit = 10.0 ** math.floor(math.log10(value))
    return math.floor(value / digit) * digit


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
