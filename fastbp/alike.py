"""Blocks that are alike, run as one: their weights stacked, every layer applied to all of them in one call.

L small kernels become one large one: `bmm` for linear layers, the layers folded into the batch for attention. What
is known to be the same function blockwise is in `_RULES`; a block with anything else in it, with active dropout, a
hook or a parametrization runs by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from fastbp.chain import Add, Residual
from fastbp.layers import SelfAttention

Step = Callable[[Tensor], Tensor]  # (L, *shape of a block's input) to (L, *shape of its output)


@dataclass(frozen=True)
class Alike:
    """At least two blocks of one structure.

    Attributes:
        members: their numbers, rising.
        run: all their branches as one function of the stacked inputs, with the parameters of the moment.
    """

    members: tuple[int, ...]
    run: Step


def alike_blocks(blocks: Sequence[Residual]) -> list[Alike]:
    """Sets of blocks that can be run as one: equal structure and sizes, on one device, a plain sum as merge."""
    sets: dict[Hashable, list[int]] = {}
    for i, block in enumerate(blocks):
        structure = _structure(block.branch) if type(block.merge) is Add else None
        if structure is not None:
            sets.setdefault(structure, []).append(i)
    return [
        Alike(tuple(members), _together([blocks[i].branch for i in members]))
        for members in sets.values()
        if len(members) > 1
    ]


def _structure(module: nn.Module) -> Hashable | None:
    """Equal for modules that differ in the values of their parameters alone; None for one that must run by itself."""
    rule = _RULES.get(_path(type(module)))
    if rule is None or not rule.fits(module) or _hooked(module):
        return None
    inside = [_structure(child) for child in module.children()]
    if None in inside:
        return None
    sizes = tuple((name, p.shape, p.dtype, p.device) for name, p in module.named_parameters(recurse=False))
    facts = tuple(getattr(module, name) for name in rule.facts)
    return (_path(type(module)), module.extra_repr(), facts, sizes, tuple(inside))


def _hooked(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def _together(modules: Sequence[nn.Module]) -> Step:
    return _RULES[_path(type(modules[0]))].join(modules)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _stacked(modules: Sequence[Any], name: str) -> Tensor:
    return torch.stack([getattr(module, name) for module in modules])


def _in_a_row(columns: Sequence[Sequence[nn.Module]]) -> Step:
    steps = [_together(column) for column in columns]
    return lambda x: reduce(lambda h, step: step(h), steps, x)


def _sequential(modules: Sequence[Any]) -> Step:
    return _in_a_row(list(zip(*modules, strict=True)))


def _mlp(modules: Sequence[Any]) -> Step:
    """timm's Mlp, whose children are called in another order than registered."""
    return _in_a_row([[getattr(m, name) for m in modules] for name in ("fc1", "act", "drop1", "norm", "fc2", "drop2")])


def _feed_forward(modules: Sequence[Any]) -> Step:
    """Of a layer of nn.TransformerEncoder."""
    names = ("linear1", "activation", "dropout", "linear2", "dropout2")
    return _in_a_row([[getattr(m, name) for m in modules] for name in names])


def _as_it_is(modules: Sequence[Any]) -> Step:
    return modules[0]


def _nothing(modules: Sequence[Any]) -> Step:
    return lambda x: x


def _linear(modules: Sequence[Any], prefix: str = "") -> Step:
    weights, biases = f"{prefix}weight", f"{prefix}bias"
    biased = getattr(modules[0], biases) is not None

    def run(x: Tensor) -> Tensor:
        rows, weight = x.flatten(1, -2), _stacked(modules, weights).mT
        out = torch.baddbmm(_stacked(modules, biases)[:, None], rows, weight) if biased else torch.bmm(rows, weight)
        return out.unflatten(1, x.shape[1:-1])

    return run


def _layer_norm(modules: Sequence[Any]) -> Step:
    first = modules[0]

    def run(x: Tensor) -> Tensor:
        out = F.layer_norm(x, first.normalized_shape, eps=first.eps)
        if first.weight is not None:
            out = out * _per_block(_stacked(modules, "weight"), x)
        return out if first.bias is None else out + _per_block(_stacked(modules, "bias"), x)

    return run


def _layer_scale(modules: Sequence[Any]) -> Step:
    return lambda x: x * _per_block(_stacked(modules, "gamma"), x)


def _per_block(values: Tensor, x: Tensor) -> Tensor:
    """(L, *features) to (L, 1, ..., *features), as many axes as x."""
    return values.view(len(values), *[1] * (x.dim() - values.dim()), *values.shape[1:])


def _attention(modules: Sequence[Any], qkv: Step, out: str, causal: bool, heads: int) -> Step:
    """The layers' axis is folded into the batch: attention itself has no weights."""
    project = _together([getattr(m, out) for m in modules])
    q_norm, k_norm, norm = ([getattr(m, name, nn.Identity()) for m in modules] for name in ("q_norm", "k_norm", "norm"))
    norm_q, norm_k, norm_out = _together(q_norm), _together(k_norm), _together(norm)

    def run(x: Tensor) -> Tensor:  # (L, batch, tokens, features)
        q, k, v = qkv(x).unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)  # each (L, batch, heads, tokens, ...)
        q, k, v = (part.flatten(0, 1) for part in (norm_q(q), norm_k(k), v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return project(norm_out(mixed.transpose(1, 2).flatten(2).unflatten(0, x.shape[:2])))

    return run


def _own_attention(modules: Sequence[Any]) -> Step:
    return _attention(modules, _together([m.qkv for m in modules]), "out", modules[0].causal, modules[0].heads)


def _timm_attention(modules: Sequence[Any]) -> Step:
    return _attention(modules, _together([m.qkv for m in modules]), "proj", False, modules[0].num_heads)


def _torch_attention(modules: Sequence[Any]) -> Step:
    """Of the views' self-attention by an nn.MultiheadAttention, which has one matrix for queries, keys and values."""
    attentions = [m.attention for m in modules]
    run = _attention(attentions, _linear(attentions, "in_proj_"), "out_proj", False, attentions[0].num_heads)
    if attentions[0].batch_first:
        return run
    return lambda x: run(x.transpose(1, 2)).transpose(1, 2)


def _one_matrix(module: Any) -> bool:
    return module.in_proj_weight is not None and module.bias_k is None and not (module.add_zero_attn or module.dropout)


def _always(module: Any) -> bool:
    return True


def _out_of_place(module: Any) -> bool:
    return not getattr(module, "inplace", False)


@dataclass(frozen=True)
class _Rule:
    """How modules of one class run as one.

    Attributes:
        join: makes the function from the modules.
        fits: whether a module is one that `join` reproduces.
        facts: attributes beside sizes and `extra_repr` in which modules must agree.
    """

    join: Callable[[Sequence[Any]], Step]
    fits: Callable[[Any], bool] = _always
    facts: tuple[str, ...] = ()


_ELEMENTWISE = (nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid)
_RULES: dict[str, _Rule] = {
    **{_path(kind): _Rule(_as_it_is, _out_of_place) for kind in _ELEMENTWISE},
    _path(nn.Identity): _Rule(_nothing),
    _path(nn.Dropout): _Rule(_nothing, lambda m: m.p == 0),
    _path(nn.Sequential): _Rule(_sequential),
    _path(nn.Linear): _Rule(_linear),
    _path(nn.LayerNorm): _Rule(_layer_norm),
    _path(SelfAttention): _Rule(_own_attention, facts=("heads", "causal")),
    _path(NonDynamicallyQuantizableLinear): _Rule(_linear),
    _path(nn.MultiheadAttention): _Rule(_as_it_is, _one_matrix, ("num_heads", "batch_first")),  # run by what holds it
    "fastbp.views_torch._SelfAttention": _Rule(_torch_attention),
    "fastbp.views_torch._FeedForward": _Rule(_feed_forward, lambda m: isinstance(m.activation, nn.Module)),
    "torchvision.models.vision_transformer.MLPBlock": _Rule(_sequential),
    "timm.layers.norm.LayerNorm": _Rule(_layer_norm, lambda m: not getattr(m, "_fast_norm", False)),
    "timm.layers.layer_scale.LayerScale": _Rule(_layer_scale, _out_of_place),
    "timm.layers.mlp.Mlp": _Rule(_mlp),
    "timm.layers.attention.Attention": _Rule(
        _timm_attention, lambda m: getattr(m, "gate", None) is None, ("num_heads", "head_dim")
    ),
}
