"""What the ranks of tests/test_stage.py run: many short trainings, one process group after another."""

import sys
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from fastbp import DDG, LayerDropBack, stage
from fastbp.stage import Link
from test_ddg import OPTIMIZERS, batches, bind, conv_net

HELD = "sends held for the next receive"  # as with nccl, here over gloo
CUTS = {2: (2,), 3: (1, 3), 4: (1, 2, 3)}  # as the simulator cuts conv_net into equal numbers of blocks


def cases():
    """Name to (modules, method, optimizer, stop): every K, mode and optimizer; drains, and a stop and resume inside."""
    out = {}
    for K, cuts in CUTS.items():
        for mode in ("stash", "mixed", "replay"):
            for kind in OPTIMIZERS:
                drain = "end" if kind == "sgd" else "never"
                method = DDG(modules=K, weights=mode, drain=drain, cuts=cuts)
                out[f"{K} {mode} {kind}"] = (method, kind, None)
    shrunk = DDG(modules=3, cuts=CUTS[3], shrink=0.5, lr_power=0.5, undelayed_epochs=1)
    out["shrink, lr scale, undelayed"] = (shrunk, "sgd", None)
    out["dropped layers"] = (LayerDropBack(unit="tensor", inner=DDG(modules=2, cuts=CUTS[2])), "sgd", None)
    for mode in ("stash", "mixed", "replay"):
        out[f"resumed {mode}"] = (DDG(modules=3, weights=mode, cuts=CUTS[3]), "sgd", 5)
    for K, drain in ((2, "never"), (3, "epoch"), (4, "never")):
        out[f"{HELD}, K = {K}"] = (DDG(modules=K, drain=drain, cuts=CUTS[K]), "sgd", None)
    return out


def ddg_of(method):
    return method if isinstance(method, DDG) else method.inner


def in_processes(method):
    from dataclasses import replace

    from fastbp.method import nest, parts

    return nest(replace(p, processes=True) if isinstance(p, DDG) else p for p in parts(method))


class HeldLink(Link):
    """Holds sends as with nccl, though gloo carries them."""

    def __init__(self, *args):
        super().__init__(*args)
        self.fused = True


def first_epoch(name):
    """Batches of the first epoch; one is less than the delay."""
    return 1 if name.startswith(HELD) else 5


def train(method, kind, stop, data, folder=None, first=5):
    """Two epochs of 5 and 4 batches, the last one short; with `stop`, anew from a saved state after so many batches."""
    model = conv_net()
    estimator = bind(model, method)
    estimator.prepare(*data[0])
    optimizer = OPTIMIZERS[kind](estimator.param_groups())
    losses, step = [], 0
    for epoch, items in enumerate((data[:first], data[first:])):
        plan = estimator.start_epoch(epoch)
        for x, y in items:
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * plan.lr_scale * group.get("lr_scale", 1.0)
            optimizer.zero_grad(set_to_none=True)
            losses.append(estimator.backward(x, y))
            optimizer.step()
            step += 1
            if step == stop:
                model, estimator, optimizer = resumed(method, kind, model, estimator, optimizer, folder)
                estimator.start_epoch(epoch)
        for _ in estimator.drain(final=epoch == 1):
            optimizer.step()
    total = estimator.share(torch.stack(losses).double())
    return total, estimator.finalize().state_dict()


def resumed(method, kind, model, estimator, optimizer, folder):
    with estimator.whole() as whole:
        saved = {k: v.clone() for k, v in whole.state_dict().items()}
    path = folder / f"state{dist.get_rank() if dist.is_initialized() else ''}.pt"
    torch.save({"model": saved, "optimizer": optimizer.state_dict(), "method": estimator.state_dict()}, path)
    state = torch.load(path, weights_only=True)
    model = conv_net(seed=9)
    estimator = bind(model, method, seed=123)
    estimator.prepare(*batches(1)[0])
    optimizer = OPTIMIZERS[kind](estimator.param_groups())
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    estimator.load_state_dict(state["method"])
    return model, estimator, optimizer


def data():
    return batches(8) + batches(1, size=2, seed=3)


def main(rank, folder):
    torch.set_num_threads(1)
    results = {}
    for i, (name, (method, kind, stop)) in enumerate(cases().items()):
        K = ddg_of(method).modules
        if rank >= K:
            continue
        file = f"file://{folder / f'group{i}'}"
        dist.init_process_group("gloo", init_method=file, rank=rank, world_size=K, timeout=timedelta(seconds=120))
        with mock.patch.object(stage, "Link", HeldLink if name.startswith(HELD) else Link):
            results[name] = train(in_processes(method), kind, stop, data(), folder, first_epoch(name))
        dist.barrier()
        dist.destroy_process_group()
    torch.save(results, folder / f"rank{rank}.pt")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
