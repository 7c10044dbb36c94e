"""Decorrelated backpropagation: every layer learns to whiten its input, so that its weights learn in fewer steps.

Idea        A layer applies W R x instead of W x. R starts at the identity and is trained, without backprop, by a local
            rule that drives the second moment of R x towards the identity; W gets the gradient taken through R.
Exact when  decor_lr = 0 (R stays the identity to the bit; the statistics are still computed: the control arm).
Needs       Linear and Conv2d layers that are called as modules. Wraps `inner`.
Cost        Per layer of input width F, output width o and n sampled rows: 4 o F^2 for W R and its backward, and
            4 n F^2 (n < F) or 2 n F^2 + 2 F^3 for the update of R; memory F^2 per layer (fp32).
Departs     W R is folded into the weight (same mathematics, one layer call); bias and padding_mode are kept; samples
            are drawn without replacement, at least one; the variance term scales rows of R, as the paper's rule says
            (the authors' code scales columns); layers wider than `max_features` stay plain, and a warning lists them.
Not for     Wide inputs with small batches (F^2 dominates: 3x3 convolutions of late layers on small images); inputs
            with a large mean, unless decor_lr is far below 2 over the top eigenvalue of the second moment.
Reference   Dalm, Offergeld, Ahmad, van Gerven (2024), arXiv:2405.02385.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from fastbp.knobs import Choice, LogUniform, require
from fastbp.method import GradientEstimator, LossFn, Method, WrappingEstimator, parts
from fastbp.methods.backprop import Backprop
from fastbp.methods.ddg import DDG

_SAFE_STEP = 0.5  # decor_lr x top eigenvalue of the off-diagonal second moment; the rule diverges above 2


@dataclass(frozen=True)
class DecorrelatedBP(Method):
    """Layer inputs are whitened by a learned matrix R = I + D (arXiv:2405.02385, equations 4 to 6).

    Attributes:
        decor_lr: step size of R, `R <- R - decor_lr M R`; 1e-4 in the authors' configurations.
        kappa: weight in [0, 1] of unit variance against decorrelation; 1e-2 in the authors' configurations.
        sample_fraction: share in (0, 1] of the images (Conv2d) or rows (Linear) that R learns from in a step; 0.1 in
            the authors' configurations.
        interval: R is updated in every `interval`-th step; `decor_lr` is not rescaled.
        structure: `full`, one dense matrix per layer (per group of a grouped convolution).
        max_features: layers with a wider input stay plain.
        inner: the method that computes the gradient.
    """

    decor_lr: Annotated[float, LogUniform(1e-6, 1e-2)] = 1e-4
    kappa: Annotated[float, LogUniform(1e-3, 0.5)] = 1e-2
    sample_fraction: Annotated[float, Choice((0.01, 0.03, 0.1, 0.3, 1.0))] = 0.1
    interval: Annotated[int, Choice((1, 4, 16))] = 1
    structure: str = "full"
    max_features: int = 4608
    inner: Method = Backprop()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "decor_lr", self.decor_lr >= 0, "must not be negative; 0 is backprop")
        require(self, "kappa", 0 <= self.kappa <= 1, "must be in [0, 1]")
        require(self, "sample_fraction", 0 < self.sample_fraction <= 1, "must be in (0, 1]")
        require(self, "interval", self.interval >= 1, "must be at least 1")
        require(self, "structure", self.structure == "full", "must be 'full'")
        require(self, "max_features", self.max_features >= 1, "must be at least 1")

    def bind(self, model: nn.Module, loss_fn: LossFn) -> GradientEstimator:
        if any(isinstance(part, DecorrelatedBP) for part in parts(self.inner)):
            raise TypeError("DecorrelatedBP in DecorrelatedBP: the weights already are W R")
        if any(isinstance(part, DDG) and part.weights == "mixed" for part in parts(self.inner)):
            raise TypeError(
                "DecorrelatedBP on DDG(weights='mixed'): the layers apply W R, a copy that does not follow W; "
                "use weights='stash' or 'replay'"
            )
        layers = decorrelated_layers(model, self.max_features)
        return _DecorrelatedBP(self, self.inner.bind(model, loss_fn), layers)

    def exact(self, model: nn.Module) -> Method | None:
        inner = self.inner.exact(model)
        return None if inner is None else replace(self, decor_lr=0.0, inner=inner)


def decorrelated_layers(model: nn.Module, max_features: int) -> dict[str, nn.Linear | nn.Conv2d]:
    """The layers that get a matrix R, by path in the model.

    Left out: layers wider than `max_features` (with one warning that lists them), frozen weights (R would move what
    the layer computes), weights shared between layers, subclasses with a forward of their own (they may see another
    input than the layer's), and the projections of `nn.MultiheadAttention`, which reads their weights without calling
    them.

    Raises:
        TypeError: no layer is left.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    unseen = {
        id(part) for module in model.modules() if isinstance(module, nn.MultiheadAttention) for part in module.modules()
    }
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    wide: list[str] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, nn.Linear | nn.Conv2d) or id(layer) in unseen or parametrize.is_parametrized(layer):
            continue
        if (
            not layer.weight.requires_grad
            or uses[id(layer.weight)] > 1
            or type(layer).forward not in (nn.Linear.forward, nn.Conv2d.forward)
        ):
            continue
        if features(layer) > max_features:
            wide.append(f"{path} ({features(layer)})")
        else:
            layers[path] = layer
    if not layers:
        raise TypeError(
            f"DecorrelatedBP: {type(model).__name__} has no Linear or Conv2d layer with at most {max_features} input "
            "features that is called as a module; raise max_features or use another model"
        )
    if wide:
        warnings.warn(
            f"DecorrelatedBP leaves {len(wide)} layer(s) with more than max_features = {max_features} input features "
            f"plain: {', '.join(wide)}",
            stacklevel=3,
        )
    return layers


def features(layer: nn.Linear | nn.Conv2d) -> int:
    """F: the number of inputs that one output of the layer sees (per group of a convolution)."""
    return layer.weight[0].numel()


class Decorrelation(nn.Module):
    """Parametrization of a weight: the layer applies A = W R = W + W D; D = 0 is W to the bit.

    Attributes:
        D: buffer R - I, shape (G, F, F) for G groups; float32, or float64 for a float64 weight.
    """

    D: Tensor

    def __init__(self, groups: int, features: int, weight: Tensor) -> None:
        super().__init__()
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.register_buffer("D", torch.zeros(groups, features, features, dtype=dtype, device=weight.device))

    def forward(self, W: Tensor) -> Tensor:
        groups, features, _ = self.D.shape
        return W + torch.bmm(W.reshape(groups, -1, features), self.D.to(W.dtype)).view_as(W)

    @torch.no_grad()
    def whiten(self, rows_GnF: Tensor, decor_lr: float, kappa: float) -> None:
        """One update `R <- R - decor_lr M R` from the layer's input rows, in the cheaper of two associations.

        Args:
            rows_GnF: input rows x, shape (G, n, F); not centred.
            decor_lr: step size.
            kappa: weight of the variance term: M = (1-kappa) offdiag(K) + kappa (diag(K) - I), K = mean of z z^T,
                z = R x.
        """
        with torch.autocast(self.D.device.type, enabled=False):  # R is learnt in full precision, whatever the model's
            self.D = self.D - decor_lr * update_direction(
                rows_GnF.to(self.D.dtype), self.D, kappa
            )  # graphs keep the old


def update_direction(rows_GnF: Tensor, D: Tensor, kappa: float) -> Tensor:
    """M R, shape (G, F, F), for R = I + D and the rows of a batch, without forming M when n < F.

    With s_i = K_ii: M R = (1-kappa) K R + diag((2 kappa - 1) s - kappa) R, and K R = Z^T (Z R) / n.
    """
    n, width = rows_GnF.shape[1:]
    Z = rows_GnF + rows_GnF @ D.mT
    if n < width:
        KR = Z.mT @ (Z + Z @ D) / n
        diagonal = Z.square().mean(dim=1)
    else:
        K = Z.mT @ Z / n
        KR = K + K @ D
        diagonal = K.diagonal(dim1=1, dim2=2)
    row_scale = ((2 * kappa - 1) * diagonal - kappa).unsqueeze(2)
    direction = (1 - kappa) * KR + row_scale * D
    direction.diagonal(dim1=1, dim2=2).add_(row_scale.squeeze(2))  # row_scale x I
    return direction


def decorrelation_loss(rows_GnF: Tensor, D: Tensor, kappa: float) -> Tensor:
    """((1-kappa) sum C_ij^2 + kappa sum (K_ii - 1)^2) / F^2, summed over groups: a scalar tensor."""
    n, width = rows_GnF.shape[1:]
    Z = rows_GnF + rows_GnF @ D.mT
    K = Z.mT @ Z / n
    diagonal = K.diagonal(dim1=1, dim2=2)
    off = K.square().sum() - diagonal.square().sum()
    return ((1 - kappa) * off + kappa * (diagonal - 1).square().sum()) / width**2


def top_eigenvalue(rows_GnF: Tensor, iterations: int = 8) -> Tensor:
    """The largest eigenvalue (modulus) of offdiag(K), K the second moment of the rows, by power iteration: a scalar.

    The rule is stable only while decor_lr times this is below 2.
    """
    diagonal = rows_GnF.square().mean(dim=1).unsqueeze(2)
    v = torch.ones_like(diagonal)
    norm = v.new_zeros(())
    for _ in range(iterations):
        v = v / v.norm(dim=1, keepdim=True).clamp_min(1e-30)
        v = rows_GnF.mT @ (rows_GnF @ v) / rows_GnF.shape[1] - diagonal * v
        norm = v.norm(dim=1).amax()
    return norm


def input_rows(layer: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """What the weight of a layer sees of an input, one row per token or patch: shape (G, n, F).

    Args:
        layer: Linear (G = 1) or Conv2d (G = groups).
        x: input of the layer: (..., F) for Linear, (N, C, H, W) or (C, H, W) for Conv2d.
    """
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    if x.dim() == 3:
        x = x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    patches = functional.unfold(padded, layer.kernel_size, dilation=layer.dilation, stride=layer.stride)  # type: ignore[arg-type]
    return patches.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)


class _DecorrelatedBP(WrappingEstimator):
    method: DecorrelatedBP

    def __init__(
        self, method: DecorrelatedBP, inner: GradientEstimator, layers: dict[str, nn.Linear | nn.Conv2d]
    ) -> None:
        super().__init__(method, inner)
        self.layers = layers
        self.step = 0
        self.period = math.lcm(self.period, method.interval)
        self.orders = {path: list(layer._parameters) for path, layer in layers.items()}
        self.kept: dict[str, list[Tensor]] = {}
        self.chosen: dict[int, Tensor] = {}  # this step's sample, by number of rows
        self.generator = torch.Generator(device=next(inner.model.parameters()).device)
        self.generator.manual_seed(torch.initial_seed() % 2**63)
        self.top: dict[str, Tensor] = {}  # of each layer's first sample; read off the clock
        self.warned = False
        self.sampling = False
        self.hooks = []
        for path, layer in layers.items():
            groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
            parametrize.register_parametrization(
                layer, "weight", Decorrelation(groups, features(layer), layer.weight), unsafe=True
            )
            self.hooks.append(layer.register_forward_pre_hook(self._keep(path)))

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        self.sampling = self.step % self.method.interval == 0
        try:
            loss = super().backward(x, y)
            for path, inputs in self.kept.items():
                layer = self.layers[path]
                rows = torch.cat([input_rows(layer, kept) for kept in inputs], dim=1)
                matrix = decorrelation_of(layer)
                if path not in self.top:
                    with torch.autocast(rows.device.type, enabled=False):
                        self.top[path] = top_eigenvalue(rows.to(matrix.D.dtype))
                matrix.whiten(rows, self.method.decor_lr, self.method.kappa)
        finally:
            self.sampling = False
            self.kept.clear()
            self.chosen.clear()
        self.step += 1
        return loss

    def _keep(self, path: str):
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            if self.sampling and layer.training and torch.is_grad_enabled():
                self.kept.setdefault(path, []).append(self._sample(layer, args[0].detach()))

        return hook

    def _sample(self, layer: nn.Module, x: Tensor) -> Tensor:
        if isinstance(layer, nn.Linear):
            x = x.reshape(-1, x.shape[-1])
        elif x.dim() == 3:
            return x
        total = len(x)
        if total not in self.chosen:
            count = max(1, int(total * self.method.sample_fraction))
            self.chosen[total] = torch.randperm(total, generator=self.generator, device=x.device)[:count]
        return x[self.chosen[total]]

    def metrics(self) -> dict[str, float]:
        """Root mean square of the entries of D, mean and largest over layers; decor_lr times the top eigenvalue."""
        rms = torch.stack([decorrelation_of(layer).D.square().mean().sqrt() for layer in self.layers.values()])
        out = {**super().metrics(), "dbp/rms_D_mean": rms.mean().item(), "dbp/rms_D_max": rms.max().item()}
        if self.top:
            step, path = max((self.method.decor_lr * top.item(), path) for path, top in self.top.items())
            out["dbp/step_x_top_eigenvalue"] = step
            if step > _SAFE_STEP and not self.warned:
                self.warned = True
                warnings.warn(
                    f"DecorrelatedBP.decor_lr = {self.method.decor_lr:g} is too large for layer {path}: times the top "
                    f"eigenvalue of its input's off-diagonal second moment it is {step:.2g}, and R diverges above 2; "
                    f"use at most {self.method.decor_lr * _SAFE_STEP / step:.1g}",
                    stacklevel=2,
                )
        return out

    def state_dict(self) -> dict[str, Any]:
        """The matrices themselves are buffers of the model and travel in its state dict."""
        own = {"step": self.step, "generator": self.generator.get_state(), "top": dict(self.top)}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.step, self.top = state["step"], dict(state["top"])
        self.generator.set_state(state["generator"].cpu())

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


def decorrelation_of(layer: nn.Module) -> Decorrelation:
    """The matrix of a bound layer."""
    return next(part for part in layer.parametrizations.weight if isinstance(part, Decorrelation))  # type: ignore[union-attr]
