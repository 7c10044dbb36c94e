"""DDG with one process per module: every rank runs the same loop and its own module, and talks to its neighbours.

The group is torch.distributed's default one: gloo on CPUs, nccl on GPUs. Rank k holds module k. Every rank draws the
same batches, as they depend on seed and epoch alone; the first uses the inputs, the last one the labels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastbp.method import EpochPlan, LossFn
from fastbp.methods.ddg import DDG, Cutter, DelayedEstimator

if TYPE_CHECKING:
    from fastbp.delayed import DelayedModule

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_HEADER = 10  # dtype, channels last, number of dimensions, up to 7 sizes


class Link:
    """Both directions between two neighbouring ranks.

    With nccl, whose sends wait for the receiver, a send is held and issued together with the next receive on the link,
    so that two neighbours cannot wait for each other; with gloo it leaves at once. Type and shape travel once per key.

    Args:
        peer: the neighbour's rank.
        device: where received tensors go.
    """

    def __init__(self, peer: int, device: torch.device) -> None:
        self.peer, self.device = peer, device
        self.fused = device.type == "cuda"  # over nccl, whatever the group calls itself
        self.held: list[Tensor] = []
        self.working: list[tuple[Any, Tensor]] = []  # sends that may still read their tensor
        self.told: dict[tuple[str, int], tuple[torch.dtype, bool, tuple[int, ...]]] = {}  # what the peer knows of us
        self.layouts: dict[tuple[str, int], tuple[torch.dtype, bool, tuple[int, ...]]] = {}  # and we of it

    def push(self, key: tuple[str, int], tensor: Tensor) -> None:
        """Send a tensor of this kind, of a batch of so many examples.

        Raises:
            ValueError: its type or shape is not that of the first one of this key, or cannot be told.
        """
        if key not in self.told:
            self._send(torch.tensor(_header(key, tensor), device=self.device))
            self.told[key] = (tensor.dtype, _channels_last(tensor), tuple(tensor.shape))
        dtype, last, shape = self.told[key]
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            raise ValueError(
                f"DDG.processes = True: the {key[0]} of {key[1]} examples changed from {_described(dtype, shape)} to "
                f"{_described(tensor.dtype, tensor.shape)}, which its receiver cannot know; pad to one size, or set "
                "processes to False"
            )
        self._send(tensor.detach().contiguous(memory_format=torch.channels_last if last else torch.contiguous_format))
        if not self.fused:
            self.flush()

    def pull(self, key: tuple[str, int]) -> Tensor:
        """Receive the neighbour's next tensor, of this key."""
        if key not in self.layouts:
            head = self._receive(torch.zeros(_HEADER, dtype=torch.int64, device=self.device)).tolist()
            self.layouts[key] = (_DTYPES[head[0]], bool(head[1]), tuple(head[3 : 3 + head[2]]))
        dtype, last, shape = self.layouts[key]
        form = torch.channels_last if last else torch.contiguous_format
        return self._receive(torch.empty(shape, dtype=dtype, device=self.device, memory_format=form))

    def flush(self) -> None:
        """Issue what is held."""
        self._issue([])

    def _send(self, tensor: Tensor) -> None:
        self.held.append(tensor)

    def _receive(self, buffer: Tensor) -> Tensor:
        receive = dist.P2POp(dist.irecv, _memory(buffer), self.peer)
        for work in self._issue([receive]):
            work.wait()
        return buffer

    def _issue(self, receives: list[dist.P2POp]) -> list[Any]:
        """Start held sends and these receives together; returns the works of the receives."""
        sends = [dist.P2POp(dist.isend, _memory(tensor), self.peer) for tensor in self.held]
        if not sends and not receives:
            return []
        self._forget()
        works = dist.batch_isend_irecv(sends + receives)
        if len(works) < len(sends) + len(receives):  # nccl: one work for the whole batch
            self.working += [(work, tensor) for work in works for tensor in self.held]
            self.held = []
            return works
        self.working += list(zip(works, self.held, strict=False))
        self.held = []
        return works[len(sends) :]

    def _forget(self) -> None:
        """Wait for the sends of an earlier iteration and let their tensors go."""
        while len(self.working) > 4:
            work, _ = self.working.pop(0)
            work.wait()


class StageDDG(DelayedEstimator):
    """Module `rank` of K in this process."""

    def __init__(self, method: DDG, model: nn.Module, cutter: Cutter, loss_fn: LossFn) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError(
                f"DDG.processes = True: needs a torch.distributed group of {method.modules} ranks, one per module; "
                f"start the script with torchrun --nproc-per-node {method.modules} and call init_process_group first"
            )
        if dist.get_world_size() != method.modules:
            raise ValueError(
                f"DDG.modules = {method.modules}: the group has {dist.get_world_size()} ranks; one per module is needed"
            )
        super().__init__(method, model, cutter, loss_fn)
        self.k, self.ranks = dist.get_rank(), method.modules
        tensor = next(model.parameters())
        self.place = tensor.device
        self.before = Link(self.k - 1, self.place) if self.k > 0 else None
        self.after = Link(self.k + 1, self.place) if self.k < method.modules - 1 else None
        self.inbox: Tensor | None = None  # an error signal received ahead of its use
        self._agree_on_seed()
        self.cut()

    def own(self, k: int) -> bool:
        return k == self.k

    @property
    def module(self) -> DelayedModule:
        return self.modules[0]

    def prepare(self, x: Tensor, y: Tensor) -> None:
        """Rank 0 measures, all take its cuts."""
        if self.cutter.cuts is None:
            decided: list[Any] = [None, None]
            if self.k == 0:
                self.cutter.measure(x, y)
                decided = [self.cutter.cuts, self.cutter.rows]
            dist.broadcast_object_list(decided, src=0, device=self.place if self.place.type == "cuda" else None)
            self.cutter.decide(decided[0])
            self.cutter.rows = decided[1]
        self.cut()

    def start_epoch(self, epoch: int) -> EpochPlan:
        """All ranks begin together: waiting for one that evaluates is nobody's training time."""
        plan = super().start_epoch(epoch)
        self._settle()
        dist.barrier()
        return plan

    def backward(self, x: Tensor, y: Tensor) -> Tensor:
        """As everywhere; the loss is the last rank's, the others return 0."""
        if not self.modules:
            self.prepare(x, y)
        h = x if self.before is None else self.before.pull(("activation", len(x)))
        h = self.module.forward(self.step, h)
        loss = torch.zeros((), device=self.place)
        if self.after is None:
            loss = self.module.queue[-1].y = self.loss_fn(h, y)
        else:
            self.after.push(("activation", len(x)), h)
        self._tick()
        return loss.detach()

    def drain(self, *, final: bool) -> Iterator[None]:
        if self.method.drain == "epoch" or (self.method.drain == "end" and final):
            for _ in range(self.latency):
                for parameter in self.model.parameters():
                    parameter.grad = None
                self._tick()
                if self.before is not None:
                    self.before.flush()  # no activation comes any more with which a held signal would leave
                yield

    def _tick(self) -> None:
        entry = self.module.due(self.step)
        if entry is not None:
            size = len(entry.x)
            delta = None if self.after is None else self._signal(size)
            delta = self.module.backward(entry, delta)
            if self.before is not None:
                assert delta is not None
                self.before.push(("signal", size), delta)
        else:
            self.module.rest()
        self.step += 1

    def _signal(self, size: int) -> Tensor:
        """The error signal of a batch, received at the moment of its use unless it was fetched before."""
        assert self.after is not None
        if self.inbox is not None:
            signal, self.inbox = self.inbox, None
            return signal
        return self.after.pull(("signal", size))

    def _settle(self) -> None:
        """Fetch the one signal that may be under way and let the held ones go, so that nothing is on the wire."""
        for link in (self.before, self.after):
            if link is not None:
                link.flush()
        if self.after is None or not self.modules or self.inbox is not None or not self.module.queue:
            return
        head = self.module.queue[0]
        if self.module.delay and head.step == self.step - self.module.delay:  # due next, so the successor has made it
            self.inbox = self.after.pull(("signal", len(head.x)))

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """Every rank gets the other modules' weights and buffers from their owners."""
        self._settle()
        for owner, net in enumerate(self.cutter.nets() if self.modules else []):
            for tensor in (*net.parameters(), *net.buffers()):
                data = tensor.data.contiguous()
                dist.broadcast(data, src=owner)
                if owner != self.k:
                    tensor.data.copy_(data)
        yield self.model

    def share(self, total: Tensor) -> Tensor:
        total = total.to(self.place)
        dist.broadcast(total, src=self.ranks - 1)
        return total

    def metrics(self) -> dict[str, float]:
        return {"ddg/batches_in_flight": float(len(self.module.queue)) if self.modules else 0.0}

    def state_dict(self) -> dict[str, Any]:
        self._settle()
        return super().state_dict()

    def inbox_state(self) -> list[Tensor | None]:
        return [self.inbox]

    def load_inbox(self, inbox: list[Tensor | None]) -> None:
        self.inbox = None if inbox[0] is None else inbox[0].to(self.place)

    def finalize(self) -> nn.Module:
        """The complete model on every rank."""
        with self.whole():
            pass
        self.inbox = None
        return super().finalize()

    def _agree_on_seed(self) -> None:
        seed = torch.tensor([self.seed % 2**31], dtype=torch.int64, device=self.place)
        dist.broadcast(seed, src=0)
        self.seed = int(seed)


def _header(key: tuple[str, int], tensor: Tensor) -> list[int]:
    if tensor.dtype not in _DTYPES or tensor.dim() > _HEADER - 3:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise ValueError(
            f"DDG.processes = True: the {key[0]} is {_described(tensor.dtype, tensor.shape)}, but between processes "
            f"only {known} in up to {_HEADER - 3} dimensions can be sent; cut elsewhere, or set processes to False"
        )
    head = [_DTYPES.index(tensor.dtype), int(_channels_last(tensor)), tensor.dim(), *tensor.shape]
    return head + [0] * (_HEADER - len(head))


def _described(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """For a sentence: `float32 (4, 3)`."""
    return f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"


def _channels_last(tensor: Tensor) -> bool:
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def _memory(tensor: Tensor) -> Tensor:
    """The tensor's elements in the order of its memory, for a transfer of plain bytes."""
    return tensor.permute(0, 2, 3, 1) if _channels_last(tensor) else tensor
