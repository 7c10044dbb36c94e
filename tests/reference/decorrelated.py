"""Decorrelated backprop as two stages, z = R x and y = W z, with R <- R - eps M R and M from the full K."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TwoStageLinear(nn.Module):
    """`nn.Linear` as R, then W."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.W = nn.Parameter(layer.weight.detach().clone())
        self.b = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        self.R = [torch.eye(layer.in_features, dtype=layer.weight.dtype)]
        self.z: list[Tensor] = []  # of the last forward, one matrix (n, F) per group

    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x, self.R[0])
        self.z = [z.detach().reshape(-1, z.shape[-1])]
        return F.linear(z, self.W, self.b)


class TwoStageConv(nn.Module):
    """`nn.Conv2d` with zero padding as a convolution with R (F output channels), then 1x1 with W."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = [layer]  # its settings, not its weights
        self.W = nn.Parameter(layer.weight.detach().clone())
        self.b = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        width = layer.weight[0].numel()
        self.R = [torch.eye(width, dtype=layer.weight.dtype) for _ in range(layer.groups)]
        self.z: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        layer, groups = self.layer[0], len(self.R)
        channels, outputs = x.shape[1] // groups, len(self.W) // groups
        y = []
        self.z = []
        for g in range(groups):
            kernel = self.R[g].reshape(-1, channels, *layer.kernel_size)
            x_g = x[:, g * channels : (g + 1) * channels]
            z = F.conv2d(x_g, kernel, None, layer.stride, layer.padding, layer.dilation)
            self.z.append(z.detach().permute(0, 2, 3, 1).reshape(-1, kernel.shape[0]))
            W_g = self.W[g * outputs : (g + 1) * outputs].reshape(outputs, -1, 1, 1)
            y.append(F.conv2d(z, W_g, None if self.b is None else self.b[g * outputs : (g + 1) * outputs]))
        return torch.cat(y, dim=1)


def two_stage(model: nn.Sequential) -> nn.Sequential:
    """A copy of a Sequential with every Linear and Conv2d in two stages."""
    layers = []
    for layer in model:
        kind = {nn.Linear: TwoStageLinear, nn.Conv2d: TwoStageConv}.get(type(layer))
        layers.append(layer if kind is None else kind(layer))
    return nn.Sequential(*layers)


def whiten(R: Tensor, K: Tensor, eps: float, kappa: float) -> Tensor:
    """R after one update, K the second moment of z = R x."""
    width = len(K)
    M = torch.zeros_like(K)
    for i in range(width):
        for j in range(width):
            M[i, j] = kappa * (K[i, i] - 1) if i == j else (1 - kappa) * K[i, j]
    return R - eps * M @ R


def step(model: nn.Sequential, x: Tensor, y: Tensor, loss_fn, lr: float, eps: float, kappa: float) -> float:
    """One step of plain SGD on W and b, then one update of every R from all of its rows; returns the loss."""
    loss = loss_fn(model(x), y)
    parameters = list(model.parameters())
    for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
        p.data -= lr * g
    for layer in model:
        if isinstance(layer, TwoStageLinear | TwoStageConv):
            layer.R = [whiten(R, z.T @ z / len(z), eps, kappa) for R, z in zip(layer.R, layer.z, strict=True)]
    return loss.item()


def patches(layer: nn.Conv2d, x: Tensor) -> list[Tensor]:
    """The rows that every group of a convolution sees, a matrix (n, F) each, by looping over positions."""
    pad_h, pad_w = layer.padding if not isinstance(layer.padding, str) else (0, 0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, (pad_w, pad_w, pad_h, pad_h), mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = layer.kernel_size, layer.stride, layer.dilation
    height, width = x.shape[2] - dh * (kh - 1), x.shape[3] - dw * (kw - 1)
    channels = x.shape[1] // layer.groups
    rows = []
    for g in range(layer.groups):
        group = []
        for image in x[:, g * channels : (g + 1) * channels]:
            for i in range(0, height, sh):
                for j in range(0, width, sw):
                    patch = image[:, i : i + dh * (kh - 1) + 1 : dh, j : j + dw * (kw - 1) + 1 : dw]
                    group.append(patch.reshape(-1))
        rows.append(torch.stack(group))
    return rows


class OptimizerSide:
    """The same method outside the model: the layers hold A = W R; W, R and the optimizer of W are kept beside them."""

    def __init__(self, model: nn.Sequential, make_optimizer, eps: float, kappa: float) -> None:
        self.model, self.eps, self.kappa = model, eps, kappa
        self.layers = [layer for layer in model if isinstance(layer, nn.Linear | nn.Conv2d)]
        self.W = [nn.Parameter(layer.weight.detach().clone()) for layer in self.layers]
        weights = {id(layer.weight) for layer in self.layers}
        others = [p for p in model.parameters() if id(p) not in weights]
        self.R = []
        for layer in self.layers:
            one = torch.eye(layer.weight[0].numel(), dtype=layer.weight.dtype)
            self.R.append(torch.stack([one] * getattr(layer, "groups", 1)))
        self.optimizer = make_optimizer([*self.W, *others])

    def step(self, x: Tensor, y: Tensor, loss_fn) -> float:
        """One step of the optimizer on W and the rest, then one update of every R; returns the loss."""
        inputs: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach())) for layer in self.layers
        ]
        self.model.zero_grad()
        loss = loss_fn(self.model(x), y)
        loss.backward()
        for hook in hooks:
            hook.remove()
        for layer, W, R in zip(self.layers, self.W, self.R, strict=True):
            gA = layer.weight.grad.reshape(len(R), -1, R.shape[-1])
            W.grad = (gA @ R.mT).reshape(W.shape)
        self.optimizer.step()
        for i, (layer, W) in enumerate(zip(self.layers, self.W, strict=True)):
            rows = patches(layer, inputs[i]) if isinstance(layer, nn.Conv2d) else [inputs[i]]
            z = [part @ R.T for part, R in zip(rows, self.R[i], strict=True)]
            self.R[i] = torch.stack(
                [whiten(R, z_g.T @ z_g / len(z_g), self.eps, self.kappa) for R, z_g in zip(self.R[i], z, strict=True)]
            )
            A = W.detach().reshape(len(self.R[i]), -1, self.R[i].shape[-1]) @ self.R[i]
            layer.weight.data.copy_(A.reshape(W.shape))
        return loss.item()
