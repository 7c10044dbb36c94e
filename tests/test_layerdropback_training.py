"""LayerDropBack in real loops: accumulation, autocast, clipping, checkpointing, tying, groups, the last batch."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastbp import HighwayBP, LayerDropBack
from fastbp.config import RunConfig, Task
from fastbp.masks import dropped_mask, pool_masks, pool_pattern, prefix_mask, prefix_top
from fastbp.recipe import Recipe
from fastbp.run import Run, set_lr
from fastbp.units import droppable_units
from test_layerdropback import OPTIMIZERS, batches, conv_net, cross_entropy, dropping

EPOCH = 2


def plain_net(dtype=torch.float64):
    """Without batch norm, so that micro-batches add up to the batch."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GELU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 3)
    ).to(dtype)


def masked(model, method, step, x, y):
    """The slow truth: the whole gradient of the batch, then None or a scale for every unit, from the mask functions."""
    model.zero_grad()
    cross_entropy(model(x), y).backward()
    units, p = droppable_units(model, method.unit), method.drop_rate
    steps = range(step, step + 1)
    scales = [1.0] * len(units)
    if method.unit == "prefix":
        (mask,) = prefix_mask(method.seed, EPOCH, steps, len(units), p).tolist()
        top = prefix_top(len(units), p)
        scales = [min(4.0, (top + 1) / (i + 1)) if i < top else 1.0 for i in range(len(units))]
    elif method.pool:
        sizes = [max(q.numel() for q in u.parameters) for u in units]
        pattern = pool_pattern(method.seed, EPOCH, steps, method.pool).item()
        mask = pool_masks(method.seed, sizes, p, method.pool)[pattern].tolist()
    else:
        (mask,) = dropped_mask(method.seed, EPOCH, steps, torch.tensor([u.index for u in units]), p).tolist()
    for unit, drop, scale in zip(units, mask, scales, strict=True):
        for q in unit.parameters:
            q.grad = None if drop else scale * q.grad
    return sum(mask)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_accumulated_micro_batches_are_one_step(kind, set_to_none):  # I14
    """The sum over micro-batches equals the gradient of the whole batch under the same mask."""
    micro = 3
    methods = [
        LayerDropBack(seed=1),
        LayerDropBack(seed=1, unit="tensor", pool=2),
        LayerDropBack(seed=2, unit="prefix"),
    ]
    for method in methods:
        ours, slow = plain_net(), plain_net()
        optimizers = [OPTIMIZERS[kind](list(m.parameters())) for m in (ours, slow)]
        x, y = batches(1, torch.float64, size=6)[0]
        for model, optimizer in zip((ours, slow), optimizers, strict=True):  # fused sgd wants a first step of all
            model.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
        estimator = method.bind(ours, lambda output, y: cross_entropy(output, y) / micro)
        estimator.start_epoch(EPOCH)
        dropped = 0
        for step, (x, y) in enumerate(batches(6, torch.float64, size=6)):
            optimizers[0].zero_grad(set_to_none=set_to_none)
            for part in zip(x.chunk(micro), y.chunk(micro), strict=True):
                estimator.backward(*part)
            assert estimator.step == step + 1, f"{micro} micro-batches counted as {estimator.step - step} steps"
            dropped += masked(slow, method, step, x, y)
            for (name, a), b in zip(ours.named_parameters(), slow.parameters(), strict=True):
                assert (a.grad is None) == (b.grad is None), f"step {step}: {name} is masked otherwise"
                if a.grad is not None:
                    torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12, msg=f"{name}: not the sum")
            for optimizer in optimizers:
                optimizer.step()
        for (name, a), b in zip(ours.named_parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10, msg=f"{method.unit}: {name} after six steps")
        assert dropped > 3, f"{method}: only {dropped} units were dropped"


def test_when_a_step_begins():
    model = plain_net()
    estimator = dropping(model, LayerDropBack())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, y = batches(1, torch.float64)[0]

    def steps_after(*actions):
        estimator.start_epoch(EPOCH)
        model.zero_grad()
        for action in actions:
            estimator.backward(x, y)
            action()
        estimator.backward(x, y)
        return estimator.step

    def nothing():
        pass

    def evaluate():
        with torch.no_grad():
            model.eval()(x)
        model.train()

    def step_and_clear_to_zero(optimizer=optimizer):
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    fused = torch.optim.SGD(model.parameters(), 0.1, fused=True)  # leaves no trace on the weights' versions

    assert steps_after(nothing, nothing) == 1, "three micro-batches"
    assert steps_after(evaluate) == 1, "an evaluation between two micro-batches"
    assert steps_after(optimizer.step) == 2, "a step without clearing: the gradients of two steps add up"
    assert steps_after(step_and_clear_to_zero) == 2, "a step, gradients cleared to zero"
    assert steps_after(partial(step_and_clear_to_zero, fused)) == 2, "a fused step, gradients cleared to zero"
    assert steps_after(lambda: fused.zero_grad(set_to_none=False)) == 2, "a skipped step, gradients cleared to zero"
    assert steps_after(model.zero_grad) == 2, "a skipped step (loss scaling found an overflow), gradients cleared"
    assert steps_after(lambda: estimator.start_epoch(4)) == 1, "an epoch begins with its step 0"
    state = estimator.state_dict()
    estimator.load_state_dict(state)
    before = estimator.step
    estimator.backward(x, y)
    assert estimator.step == before + 1, "a resumed run begins a step"


def test_a_failed_backward_is_not_a_step():
    model = plain_net()
    estimator = dropping(model, LayerDropBack(seed=3))
    x, y = batches(1, torch.float64)[0]
    estimator.backward(x, y)
    with pytest.raises(RuntimeError):
        estimator.backward(x[:, :1], y)
    estimator.backward(x, y)
    assert estimator.step == 1, "the failed micro-batch began a step"
    model.zero_grad()
    with pytest.raises(RuntimeError):
        estimator.backward(x[:, :1], y)
    assert estimator.step == 1, "the failed step was counted"
    assert all(p.requires_grad for p in model.parameters()), "a flag was not restored"
    assert not any(p._backward_hooks for p in model.parameters()), "a hook was left"


def test_autocast_and_clipping():
    """bf16 autocast: kept gradients are backprop's to the bit; the clipped norm is that of the kept ones."""
    ours = conv_net()
    plain = copy.deepcopy(ours)
    estimator = dropping(ours, LayerDropBack(seed=2))
    kept = dropped = 0
    for x, y in batches(8):
        for model in (ours, plain):
            model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = estimator.backward(x, y)
            want = cross_entropy(plain(x), y)
            want.backward()
        assert torch.equal(loss, want.detach()), f"loss {loss} instead of {want}"
        squares = 0.0
        for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
            if a.grad is None:
                dropped += 1
                continue
            kept += 1
            assert a.grad.dtype == torch.float32
            assert torch.equal(a.grad, b.grad), f"{name}: off by {(a.grad - b.grad).abs().max():.3g} under autocast"
            squares += b.grad.double().square().sum().item()
        norm = nn.utils.clip_grad_norm_(ours.parameters(), 1e-3)
        assert norm.item() == pytest.approx(squares**0.5), "the norm is not that of the kept gradients"
        total = sum(p.grad.double().square().sum().item() for p in ours.parameters() if p.grad is not None)
        assert total**0.5 == pytest.approx(1e-3, rel=1e-3), "clipping left another norm"
    assert kept > 10
    assert dropped > 10


def test_loss_scaling_skips_a_step_and_the_next_one_has_its_own_mask():
    model = conv_net()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    overflow = []
    loss_fn = lambda output, y: scaler.scale(cross_entropy(output, y) * (torch.inf if overflow else 1.0))  # noqa: E731
    estimator = LayerDropBack(seed=4).bind(model, loss_fn)
    estimator.start_epoch(EPOCH)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    units = droppable_units(model, "layer")
    masks = dropped_mask(4, EPOCH, range(6), torch.tensor([u.index for u in units]), 0.5).tolist()
    for step, (x, y) in enumerate(batches(6)):
        overflow[:] = [True] if step == 2 else []
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.zero_grad()
        estimator.backward(x, y)
        got = [unit.parameters[0].grad is None for unit in units]
        assert got == masks[step], f"step {step}: dropped {got}, not {masks[step]}"
        scaler.step(optimizer)
        scaler.update()
        moved = any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        assert moved == (step != 2), f"step {step}: weights {'moved' if moved else 'did not move'}"


class _TiedBody(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


@pytest.mark.parametrize("unit", ["layer", "tensor", "prefix"])
def test_a_weight_shared_in_the_body_has_one_coin(unit):
    model = _TiedBody()
    plain = copy.deepcopy(model)
    owners = [u.name for u in droppable_units(model, unit) if any(p is model.first.weight for p in u.parameters)]
    assert owners == ["first.weight" if unit == "tensor" else "first"], f"the shared weight is in {owners}"
    estimator = dropping(model, LayerDropBack(unit=unit, lr_policy="none"))
    seen = set()
    for i in range(12):
        torch.manual_seed(i)
        x, y = torch.randn(5, 4), torch.randint(0, 3, (5,))
        for net in (model, plain):
            net.zero_grad()
        estimator.backward(x, y)
        cross_entropy(plain(x), y).backward()
        seen.add(model.first.weight.grad is None)
        for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            assert a.grad is None or torch.equal(a.grad, b.grad), f"{name} is not the gradient through both uses"
    assert seen == {True, False}, f"the shared weight was dropped or kept only: {seen}"


def test_ratios_of_parameter_groups_stay():  # I9
    model = conv_net()
    groups = [{"params": list(model[:4].parameters()), "lr_scale": 0.1}, {"params": list(model[4:].parameters())}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    estimator = LayerDropBack(drop_rate=0.75).bind(model, cross_entropy)
    for epoch in range(6):
        plan = estimator.start_epoch(epoch)
        set_lr(optimizer, 0.2 * plan.lr_scale)
        low, high = (group["lr"] for group in optimizer.param_groups)
        factor = 4.0 if epoch in (2, 4) else 1.0
        assert (low, high) == pytest.approx((0.02 * factor, 0.2 * factor)), f"epoch {epoch}: rates {low}, {high}"


def test_batches_of_a_dropping_epoch():  # I9, I10
    """floor(B k) examples per step, all of them once, never one alone; the schedule goes by epochs, not steps."""
    recipe = Recipe(epochs=3, batch_size=33, lr=0.1)
    method = LayerDropBack(batch_scale=1.5, lr_policy="double")
    run = Run(RunConfig(Task(data_args={"limit": 146}, model="resnet_tiny", model_args={"blocks": 1}), recipe, method))
    run.warm_up()
    sizes, inner = [], run.estimator.backward
    run.estimator.backward = lambda x, y: (sizes.append(len(y)), inner(x, y))[1]
    per_epoch, records = [], []
    for _ in range(3):
        sizes.clear()
        records.append(run.train_epoch())
        per_epoch.append(list(sizes))
    total = len(run.data.train)
    assert [sum(epoch) for epoch in per_epoch] == [total] * 3, f"examples per epoch: {[sum(e) for e in per_epoch]}"
    assert max(per_epoch[0]) in (33, 34), f"a full epoch's batches: {per_epoch[0]}"
    assert set(per_epoch[2][:-1]) == {49}, f"a dropping epoch's batches: {per_epoch[2]}"
    assert min(per_epoch[2]) >= 2, "a batch of one example"
    rates = [record.lr for record in records]
    want = [recipe.lr_at(0), recipe.lr_at(1), 2 * recipe.lr_at(2)]
    assert rates == pytest.approx(want), f"learning rates {rates} instead of {want}"


def graph_below(model, x, y, estimator):
    """Names of the leaf layers whose output has a graph, in order of the forward, and the number of saved tensors."""
    seen, handles = {}, []
    for name, layer in model.named_modules():
        if not list(layer.children()):
            record = partial(lambda name, module, args, out: seen.__setitem__(name, out.grad_fn is not None), name)
            handles.append(layer.register_forward_hook(record))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        estimator.backward(x, y)
    for handle in handles:
        handle.remove()
    return seen, len(saved)


@pytest.mark.parametrize("name", ["chain", "vit"])
def test_prefix_builds_no_graph_below_the_cut(name):
    if name == "chain":
        from fastbp.nets import resnet_tiny

        torch.manual_seed(0)
        model = resnet_tiny((1, 8, 8), 3, blocks=3, width=4)
        x = torch.randn(4, 1, 8, 8)
    else:
        timm = pytest.importorskip("timm")
        settings = dict(img_size=16, patch_size=8, embed_dim=12, depth=3, num_heads=2, num_classes=3)
        model = timm.create_model("vit_tiny_patch16_224", **settings)
        x = torch.randn(4, 3, 16, 16)
    y = torch.tensor([0, 1, 2, 0])
    estimator = dropping(model, LayerDropBack(unit="prefix", drop_rate=0.6))
    saved_at = {}
    for _ in range(30):
        model.zero_grad()
        graphs, saved = graph_below(model, x, y, estimator)
        cut = sum(estimator.dropped)
        names = [unit.name for unit in estimator.units]
        below = {n for n in names[:cut] if n in graphs}
        wrong = {n for n in below if graphs[n]}
        assert not wrong, f"cut {cut}: {sorted(wrong)} lie below it and have a graph"
        above = {n for n in names[cut:] if n in graphs}
        without = {n for n in above if not graphs[n]}
        assert not without, f"cut {cut}: {sorted(without)} lie above it and have no graph"
        saved_at[cut] = saved
    cuts = sorted(saved_at)
    assert len(cuts) > 5, f"only the cuts {cuts} were seen"
    counts = [saved_at[cut] for cut in cuts]
    assert counts == sorted(counts, reverse=True), f"tensors saved for backward at the cuts {cuts}: {counts}"
    assert counts[-1] < 0.5 * counts[0], f"the highest cut {cuts[-1]} still saves {counts[-1]} of {counts[0]} tensors"


def test_prefix_scales_on_top_of_highway():
    from fastbp.nets import resnet_tiny

    torch.manual_seed(0)
    ours = resnet_tiny((1, 6, 6), 3, blocks=2, width=4)
    alone = copy.deepcopy(ours)
    x, y = torch.randn(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])
    inner = HighwayBP(iterations=1)
    estimator = dropping(ours, LayerDropBack(unit="prefix", inner=inner))
    inner.bind(alone, cross_entropy).backward(x, y)
    full = {id(a): b.grad for a, b in zip(ours.parameters(), alone.parameters(), strict=True)}
    top, checked = prefix_top(len(estimator.units), 0.5), 0
    for _ in range(4):
        ours.zero_grad()
        estimator.backward(x, y)
        for position, unit in enumerate(estimator.units):
            scale = min(4.0, (top + 1) / (position + 1)) if position < top else 1.0
            for p in unit.parameters:
                if p.grad is not None:
                    checked += 1
                    torch.testing.assert_close(p.grad, scale * full[id(p)], msg=f"{unit.name}: not {scale} x")
    assert checked > 10


class _Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4)) for _ in range(4)]
        self.body, self.head, self.use_reentrant = nn.ModuleList(layers), nn.Linear(4, 3), use_reentrant

    def forward(self, x):
        for i, part in enumerate(self.body):
            plain = self.use_reentrant is None or i == 0
            x = part(x) if plain else checkpoint(part, x, use_reentrant=self.use_reentrant)
        return self.head(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # torch itself, where all below is dropped
def test_activation_checkpointing():
    """The non-reentrant kind changes nothing; the reentrant kind is refused, in full and in dropping epochs."""
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    plain, checkpointed = _Checkpointed(None), _Checkpointed(False)
    for unit in ("tensor", "layer", "prefix"):
        one, two = (dropping(model, LayerDropBack(unit=unit)) for model in (plain, checkpointed))
        dropped = 0
        for _ in range(10):
            plain.zero_grad()
            checkpointed.zero_grad()
            assert torch.equal(one.backward(x, y), two.backward(x, y))
            for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
                assert (a.grad is None) == (b.grad is None), f"{unit}: {name} is masked otherwise"
                dropped += a.grad is None
                assert a.grad is None or torch.equal(a.grad, b.grad), f"{unit}: {name} has another gradient"
        assert dropped > 10
    for epoch in (0, EPOCH):
        model = _Checkpointed(True)
        estimator = LayerDropBack().bind(model, cross_entropy)
        estimator.start_epoch(epoch)
        message = r"^LayerDropBack on reentrant activation checkpointing: .*; checkpoint with use_reentrant=False$"
        with pytest.raises(ValueError, match=message):
            [(model.zero_grad(), estimator.backward(x, y)) for _ in range(20)]
        assert all(p.requires_grad for p in model.parameters()), "a flag was not restored"
    LayerDropBack(mask=False).bind(_Checkpointed(True), cross_entropy).backward(x, y)
