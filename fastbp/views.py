"""`as_chain`: somebody else's model seen as a `Chain`, without changing the model.

A view is a new module whose parts *are* the model's own submodules and parameters: it computes the same
numbers in the same order, its gradients land in the model's parameters, and hooks on the model's layers fire
once per forward. Hooks on the model itself or on its containers (a block, a stage) do not fire, as the view
calls what is inside them. Nothing in a view works in place on a block's input or output, whatever the model
does there.

A view sees the layers that the model has when it is made: replace a classifier first, then call `as_chain`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbp.chain import AddReLU, Chain, Replace, Residual, ShortcutAdd

_INSTEAD = (
    "pass a fastbp.Chain, an nn.Sequential of fastbp.Residual blocks, "
    "or a plain ResNet or VisionTransformer of torchvision or timm"
)
_PASSING = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout2d,
)  # may hand on their input's memory


def as_chain(model: nn.Module) -> Chain:
    """The Chain view of a model; a `Chain` is returned as it is.

    Accepted: `Chain`; `nn.Sequential`, where plain children before the first `Residual` become the stem,
    those after the last one the head, those between them blocks without residual path (nested Sequentials and
    Chains that hold a `Residual` are unrolled; where there is none at all, every child becomes such a block);
    ResNet with BasicBlock or Bottleneck and VisionTransformer of torchvision and timm, attention and MLP as
    two blocks.

    Raises:
        TypeError: another class (subclasses included, as their forward may differ), or a variant that a view
            does not reproduce; the message says what to pass instead.
        ValueError: an empty `nn.Sequential`.
    """
    if _is(model, Chain):
        return model  # type: ignore[return-value]
    if _is(model, nn.Sequential):
        return _sequential(model)
    view = _VIEWS.get(_name(model))
    if view is None:
        raise TypeError(f"as_chain cannot see into a {_name(model)}: {_INSTEAD}")
    if getattr(model, "grad_checkpointing", False):
        _refuse(model, "gradient checkpointing is on; call model.set_grad_checkpointing(False)")
    return view(model)


def _sequential(model: nn.Module) -> Chain:
    steps = list(_steps(model))
    at = [i for i, step in enumerate(steps) if isinstance(step, Residual)]
    if not at:
        return Chain(nn.Identity(), [_plain(step) for step in steps], nn.Identity())
    stem, middle, head = steps[: at[0]], steps[at[0] : at[-1] + 1], steps[at[-1] + 1 :]
    blocks = [step if isinstance(step, Residual) else _plain(step) for step in middle]
    return Chain(_run(stem), blocks, _keeping(_run(head)))


def _steps(module: nn.Module, outermost: bool = True) -> Iterator[nn.Module]:
    """The steps of a Sequential in order; what is nested is taken apart where it holds a `Residual`."""
    inside: Iterable[nn.Module] | None = None
    if outermost or (not isinstance(module, Residual) and any(isinstance(m, Residual) for m in module.modules())):
        if isinstance(module, Chain) and _is(module, Chain):
            inside = (module.stem, *module.blocks, module.head)
        elif isinstance(module, nn.Sequential) and _is(module, nn.Sequential):
            inside = module
    if inside is None:
        yield module
    else:
        for child in inside:
            yield from _steps(child, outermost=False)


def _plain(step: nn.Module) -> Residual:
    return Residual(_keeping(step), Replace())


def _run(steps: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*steps) if steps else nn.Identity()


def _keeping(step: nn.Module) -> nn.Module:
    """The step, on a copy of its input where it begins in place (`nn.ReLU(inplace=True)`)."""
    for leaf in (m for m in step.modules() if not any(m.children())):
        if getattr(leaf, "inplace", False):
            return _OnCopy(step)
        if not isinstance(leaf, _PASSING):
            break
    return step


class _OnCopy(nn.Module):
    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        return self.step(x.clone())


def _torchvision_resnet(model: Any) -> Chain:
    stem = nn.Sequential(model.conv1, model.bn1, model.relu, model.maxpool)
    blocks = []
    for block in _stages(model):
        first = [block.conv1, block.bn1, block.relu, block.conv2, block.bn2]
        if _kind(model, block, "torchvision.models.resnet", "BasicBlock", "Bottleneck") == "Bottleneck":
            first += [block.relu, block.conv3, block.bn3]
        blocks.append(_post_activation(model, first, block.downsample, block.relu))
    return Chain(stem, blocks, nn.Sequential(model.avgpool, nn.Flatten(1), model.fc))


def _timm_resnet(model: Any) -> Chain:
    stem = nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool)
    blocks = []
    for b in _stages(model):
        if _kind(model, b, "timm.models.resnet", "BasicBlock", "Bottleneck") == "BasicBlock":
            branch, last = [b.conv1, b.bn1, b.drop_block, b.act1, b.aa, b.conv2, b.bn2], b.act2
        else:
            branch = [b.conv1, b.bn1, b.act1, b.conv2, b.bn2, b.drop_block, b.act2, b.aa, b.conv3, b.bn3]
            last = b.act3
        optional = [module for module in (b.se, b.drop_path) if module is not None]
        blocks.append(_post_activation(model, branch + optional, b.downsample, last))
    return Chain(stem, blocks, _TimmResNetHead(model))


def _stages(model: Any) -> Iterator[Any]:
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        yield from stage


def _post_activation(model: Any, branch: list[nn.Module], shortcut: nn.Module | None, last: nn.Module) -> Residual:
    """One block `relu(shortcut(x) + branch(x))`, its last activation out of place."""
    if type(last) is not nn.ReLU:
        _refuse(model, f"its blocks end in {type(last).__name__}, only ReLU is supported")
    merge = AddReLU() if shortcut is None else ShortcutAdd(shortcut, relu=True)
    return Residual(nn.Sequential(*branch), merge)


class _TimmResNetHead(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.global_pool, self.fc, self.drop_rate = model.global_pool, model.fc, float(model.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        x = self.global_pool(x)
        if self.drop_rate:  # the pool's flag, not the view's own: it follows model.train() and model.eval()
            x = F.dropout(x, p=self.drop_rate, training=self.global_pool.training)
        return self.fc(x)


def _torchvision_vit(model: Any) -> Chain:
    blocks = []
    for block in model.encoder.layers:
        _kind(model, block, "torchvision.models.vision_transformer", "EncoderBlock")
        blocks += [Residual(_TorchvisionAttention(block)), Residual(nn.Sequential(block.ln_2, block.mlp))]
    return Chain(_TorchvisionTokens(model), blocks, nn.Sequential(model.encoder.ln, _FirstToken(), model.heads))


class _TorchvisionTokens(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.conv_proj, self.class_token = model.conv_proj, model.class_token
        self.pos_embedding, self.dropout = model.encoder.pos_embedding, model.encoder.dropout

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv_proj(x).flatten(2).permute(0, 2, 1)
        tokens = torch.cat([self.class_token.expand(len(x), -1, -1), tokens], dim=1)
        return self.dropout(tokens + self.pos_embedding)


class _TorchvisionAttention(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.ln_1, self.self_attention, self.dropout = block.ln_1, block.self_attention, block.dropout

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        return self.dropout(self.self_attention(h, h, h, need_weights=False)[0])


class _FirstToken(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


def _timm_vit(model: Any) -> Chain:
    if model.dynamic_img_size:
        _refuse(model, "dynamic_img_size is on; make it with dynamic_img_size=False")
    if model.pos_embed is None:
        _refuse(model, "it has no position embedding; make it with pos_embed='learn'")
    blocks = []
    for b in model.blocks:
        _kind(model, b, "timm.models.vision_transformer", "Block")
        blocks.append(Residual(nn.Sequential(b.norm1, b.attn, b.ls1, b.drop_path1)))
        blocks.append(Residual(nn.Sequential(b.norm2, b.mlp, b.ls2, b.drop_path2)))
    return Chain(_TimmTokens(model), blocks, _TimmViTHead(model))


class _TimmTokens(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.patch_embed, self.pos_drop = model.patch_embed, model.pos_drop
        self.patch_drop, self.norm_pre = model.patch_drop, model.norm_pre
        self.cls_token, self.reg_token, self.pos_embed = model.cls_token, model.reg_token, model.pos_embed
        self.position_first = model.no_embed_class

    def forward(self, x: Tensor) -> Tensor:
        prefix = [t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token) if t is not None]
        x = self.patch_embed(x)
        if self.position_first:
            x = x + self.pos_embed
        if prefix:
            x = torch.cat([*prefix, x], dim=1)
        if not self.position_first:
            x = x + self.pos_embed
        return self.norm_pre(self.patch_drop(self.pos_drop(x)))


class _TimmViTHead(nn.Module):
    def __init__(self, model: Any) -> None:
        from timm.models.vision_transformer import global_pool_nlc

        super().__init__()
        self.norm, self.attn_pool, self.fc_norm = model.norm, model.attn_pool, model.fc_norm
        self.head_drop, self.head = model.head_drop, model.head
        self.prefix, self.include_prefix = model.num_prefix_tokens, model.pool_include_prefix
        self.pool_type, self.pool = model.global_pool, global_pool_nlc

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self.attn_pool is not None:
            x = self.attn_pool(x if self.include_prefix else x[:, self.prefix :])
        else:
            x = self.pool(x, self.pool_type, self.prefix, self.include_prefix)
        return self.head(self.head_drop(self.fc_norm(x)))


def _is(model: Any, kind: type[nn.Module]) -> bool:
    """Whether the model runs `kind`'s own forward; subclasses that only construct differently count."""
    return isinstance(model, kind) and type(model).forward is kind.forward


def _name(module: Any) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _kind(model: Any, block: Any, module: str, *classes: str) -> str:
    """The block's class name, which must be one of those of the library."""
    if _name(block) not in [f"{module}.{name}" for name in classes]:
        _refuse(model, f"its blocks are {_name(block)}, only {' and '.join(classes)} of {module} are supported")
    return type(block).__name__


def _refuse(model: Any, why: str) -> NoReturn:
    raise TypeError(f"as_chain cannot reproduce this {_name(model)}: {why}, or {_INSTEAD}")


_VIEWS: dict[str, Callable[[Any], Chain]] = {
    "torchvision.models.resnet.ResNet": _torchvision_resnet,
    "torchvision.models.vision_transformer.VisionTransformer": _torchvision_vit,
    "timm.models.resnet.ResNet": _timm_resnet,
    "timm.models.vision_transformer.VisionTransformer": _timm_vit,
}
