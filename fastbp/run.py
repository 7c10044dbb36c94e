"""One run: the one training loop, on the one clock, for every method alike.

A run is (task, recipe, method, seed); plain backprop goes through the same lines. `Run` is driven epoch by epoch, so
that a command line, a scheduler or a test can stand outside:

    run = Run(RunConfig(Task(), Recipe(epochs=3), LayerDropBack()))
    while not run.done:
        record = run.train_epoch()
    print(run.end().test_accuracy)
"""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from typing import Any

import torch
from torch import Tensor, nn

from fastbp.clock import Clock
from fastbp.config import RunConfig, load_task_data
from fastbp.data import Dataset
from fastbp.energy import energy_reader
from fastbp.environment import device_fingerprint, git_state, software_fingerprint
from fastbp.method import EpochPlan, parts, reseed, start_again
from fastbp.models import make_model
from fastbp.recipe import Recipe
from fastbp.record import EpochRecord, RunRecord, Status, utc_now
from fastbp.rehearsal import Rehearsal
from fastbp.seeding import mixed, seeded


class Run:
    """A run in progress. Construction loads data and model and binds the method; the first epoch warms up.

    Args:
        config: what to train.
        device: torch device; default the first CUDA device, else the CPU.
        threads: of torch on the CPU; default: as it is.
        exclusive: whether the caller guarantees that the device is this run's alone.
        attempt: 0 for the first try of this configuration.
        clock: for tests.
        data: an already loaded data set, on any device.

    Raises:
        TypeError, ValueError: a setting is impossible, or the method cannot see into the model.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        device: torch.device | str | None = None,
        threads: int | None = None,
        exclusive: bool = False,
        attempt: int = 0,
        clock: Clock | None = None,
        data: Dataset | None = None,
    ) -> None:
        self.config, self.recipe, self.method = config, config.recipe, config.method
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.exclusive, self.attempt = exclusive, attempt
        if threads is not None:
            torch.set_num_threads(threads)
        self.clock = clock or Clock(self.device)
        with self.clock.segment("setup"):
            self._setup(data)
        self.epoch = self.examples = self.steps = 0
        self.status: Status = "running"
        self.reason = ""
        self.resumed = self.warm = False
        self.last = EpochRecord(run_key=config.key, attempt=attempt)
        self.best_val_accuracy: float | None = None
        self.started_at, self._began = utc_now(), time.monotonic()

    def _setup(self, data: Dataset | None) -> None:
        task, recipe, seed = self.config.task, self.recipe, self.config.seed
        if data is None:
            data = load_task_data(task, recipe, self.device)
        self.data = data.to(self.device)
        model = self._make_model()
        self.parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.loss_fn = recipe.make_loss()
        with seeded(self.device, mixed(seed)):
            self.estimator = reseed(self.method, seed).bind(model, self.loss_fn)
        self._check_first_device()
        with recipe.precision_context(self.device):
            self.estimator.prepare(*self.data.dummy_batch(recipe.batch_size))
        self.devices = list(self.estimator.devices) or [self.device]
        if self.estimator.devices:
            self.clock.wait_for(self.devices)
        self.rehearsal = Rehearsal(self.config, self.devices, self._make_model)
        self.energy = energy_reader(*self.devices)
        self.optimizer = recipe.make_optimizer(self.estimator.param_groups())

    def _check_first_device(self) -> None:
        """The whole model is evaluated on the first of a method's devices."""
        devices, here = self.estimator.devices, self.data.device
        if devices and devices[0] != here:
            named = next((part for part in parts(self.method) if getattr(part, "devices", None)), self.method)
            raise ValueError(
                f"{type(named).__name__}.devices: the first is {devices[0]}, where the model is evaluated, but the "
                f"data of this run are on {here}; name that one first, or give the run the device {devices[0]}"
            )

    def _make_model(self) -> nn.Module:
        task, data = self.config.task, self.data
        model = make_model(task.model, data.input_shape, data.classes, task.model_args, self.config.seed)
        return model.to(self.device, self.recipe.dtype).train()

    @property
    def done(self) -> bool:
        return self.status != "running" or self.epoch >= self.recipe.epochs

    def train_epoch(self) -> EpochRecord:
        """Train one epoch, then evaluate; returns the state after it.

        Raises:
            RuntimeError: the run is done.
        """
        if self.done:
            raise RuntimeError(f"run {self.config.key} is {self.status} after {self.epoch} epochs; make a new one")
        if not self.warm:
            self.warm_up()
        plan = self.estimator.start_epoch(self.epoch)
        batch_size = self.recipe.batch_size_at(plan.batch_scale)
        if self.rehearsal.kind(plan) not in self.rehearsal.flops:
            self._warm_up_unforeseen(plan)
        loss, lr = self._train(batch_size, plan.lr_scale)
        self.epoch += 1
        record = EpochRecord(
            run_key=self.config.key,
            attempt=self.attempt,
            epoch=self.epoch - 1,
            examples=self.examples,
            steps=self.steps,
            batch_size=batch_size,
            lr=lr,
            train_loss=loss,
            peak_memory_bytes=self._peak_memory(),
            flops_executed=self._add_flops(self.rehearsal.kind(plan)),
            energy_joules=self.last.energy_joules,
            metrics={name: value for name, value in self.estimator.metrics().items() if math.isfinite(value)},
        )
        if math.isfinite(loss):
            self._evaluate_into(record)
        else:
            self.status = "diverged"
            self.reason = f"training loss {loss} in epoch {self.epoch - 1}; a smaller learning rate may help"
            record.train_loss = None
        self.last = dataclasses.replace(record, **self.clock.totals())
        return self.last

    def _train(self, batch_size: int, lr_scale: float) -> tuple[float, float]:
        """The loop that is timed; returns the mean loss over the epoch's examples and the first learning rate."""
        estimator, optimizer, recipe = self.estimator, self.optimizer, self.recipe
        final = self.epoch == recipe.epochs - 1
        batches = per_epoch = self.data.steps(batch_size)
        total = torch.zeros((), device=self.devices[-1], dtype=torch.float64)
        first_lr = recipe.lr_at(self.epoch) * lr_scale
        estimator.model.train()
        for place in self.devices:
            if place.type == "cuda":
                torch.cuda.reset_peak_memory_stats(place)
        order = self.data.batches(batch_size, seed=self.config.seed, epoch=self.epoch, augment=recipe.augment)
        joules = self.energy()
        with (
            seeded(self.devices, mixed(self.config.seed, self.epoch)),
            self.recipe.precision_context(self.device),
            self.clock.segment("train"),
        ):
            for i, (x, y) in enumerate(order):
                set_lr(optimizer, recipe.lr_at(self.epoch + i / per_epoch) * lr_scale)
                optimizer.zero_grad(set_to_none=True)
                loss = estimator.backward(x, y)
                optimizer.step()
                total += loss * len(y)
            for _ in estimator.drain(final=final):
                optimizer.step()
                batches += 1
        self._add_energy(joules)
        total = estimator.share(total)
        self.examples += len(self.data.train)
        self.steps += batches
        return total.item() / len(self.data.train), first_lr

    def warm_up(self) -> None:
        """Take a few steps of every kind to come on a copy of the model; see `fastbp.rehearsal`."""
        with self.clock.segment("warmup"):
            self.rehearsal.every_kind(self.data)
        self.warm = True
        gc.collect()  # hooks hold the copy in cycles, which would count as training memory

    def _warm_up_unforeseen(self, plan: EpochPlan) -> None:
        """The same for this epoch's plan, which what was trained so far has brought about."""
        self.optimizer.zero_grad(set_to_none=True)  # the copy needs the room, and the next step begins with this
        with self.clock.segment("warmup"):
            self.rehearsal.one_kind(self.data, self.epoch, plan, self.estimator.state_dict())
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def rewind(self, epoch: int) -> None:
        """Be about to train this epoch as if none had been trained, to time it; the weights stay as they are."""
        self.epoch, self.status = epoch, "running"
        plan = self.rehearsal.plans[epoch]
        if self.estimator.start_epoch(epoch) != plan:
            start_again(self.estimator, epoch, plan, self.rehearsal.untrained_state(self.data))

    def _evaluate_into(self, record: EpochRecord) -> None:
        last = self.done
        if last or self.epoch % self.recipe.eval_every_epochs == 0:
            with (
                self.clock.segment("eval"),
                self.recipe.precision_context(self.device),
                self.estimator.whole() as model,
            ):
                record.val_loss, record.val_accuracy = evaluate(model, self.data, "val", self.recipe)
                if last:
                    _, record.test_accuracy = evaluate(model, self.data, "test", self.recipe)
            self.best_val_accuracy = max(self.best_val_accuracy or 0.0, record.val_accuracy)

    def start_record(self) -> RunRecord:
        """The run's line at its start, status `running`."""
        return self._run_record(status="running")

    def end(self, status: Status | None = None, reason: str = "") -> RunRecord:
        """The run's last line.

        Args:
            status: what became of it; default `finished`, or `diverged` where it did.
            reason: one sentence for everything but `finished`.
        """
        if status is not None:
            self.status, self.reason = status, reason
        elif self.status == "running":
            self.status, self.reason = (
                ("finished", "") if self.done else ("stopped", f"ended after {self.epoch} epochs")
            )
        return self._run_record(status=self.status, reason=self.reason, ended_at=self._end_time())

    def _end_time(self) -> str:
        """Now, or what a clock that was set back since the start would have shown."""
        least = datetime.fromisoformat(self.started_at) + timedelta(seconds=time.monotonic() - self._began)
        return max(datetime.now(UTC), least).isoformat(timespec="seconds")

    def _run_record(self, **state: Any) -> RunRecord:
        commit, dirty = git_state()
        shared = {f.name for f in fields(RunRecord)} & {f.name for f in fields(EpochRecord)}
        measured = {name: getattr(self.last, name) for name in shared - {"kind", "schema_version"}}
        return RunRecord(
            **(measured | self.clock.totals()),
            **{k: v for k, v in self.config.to_dict().items() if k != "key"},
            epochs_done=self.epoch,
            parameters=self.parameters,
            best_val_accuracy=self.best_val_accuracy,
            exclusive=self.exclusive,
            resumed=self.resumed,
            device=device_fingerprint(self.device),
            workers=max(1, len({place for place in self.devices if place.type != "cpu"})),
            software=software_fingerprint(),
            git_commit=commit,
            git_dirty=dirty,
            started_at=self.started_at,
            **state,
        )

    def close(self) -> None:
        """Nothing here; a run over several processes ends them."""

    def split_table(self) -> list[dict[str, float]]:
        """Of a method that cuts the net into modules: one row each, where costs were measured; else empty."""
        return self.estimator.table()

    def state_dict(self) -> dict[str, Any]:
        """Everything that exact resuming needs, at an epoch boundary: tensors and plain values only."""
        with self.estimator.whole() as whole:
            model = dict(whole.state_dict())
        return {
            "run_key": self.config.key,
            "epoch": self.epoch,
            "examples": self.examples,
            "steps": self.steps,
            "status": self.status,
            "reason": self.reason,
            "best_val_accuracy": self.best_val_accuracy,
            "flops": dict(self.rehearsal.flops),
            "started_at": self.started_at,
            "last": dataclasses.asdict(self.last),
            "seconds": self.clock.totals(),
            "model": model,
            "optimizer": self.optimizer.state_dict(),
            "estimator": self.estimator.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken; every later number is as if the run had not stopped.

        Raises:
            ValueError: the state belongs to another configuration.
        """
        if state["run_key"] != self.config.key:
            raise ValueError(
                f"checkpoint belongs to run {state['run_key']}, this is run {self.config.key}: "
                "task, recipe, method or seed differ, or another version of fastbp saved it; start this run anew"
            )
        for name in ("epoch", "examples", "steps", "status", "reason", "best_val_accuracy", "started_at"):
            setattr(self, name, state[name])
        self.rehearsal.flops = dict(state["flops"])
        self.last = EpochRecord(**(state["last"] | {"attempt": self.attempt}))
        self.clock.load(state["seconds"])
        self.estimator.model.load_state_dict(state["model"])
        with self.recipe.precision_context(self.device):  # batches in flight go forward once more
            self.estimator.load_state_dict(state["estimator"])
        self.optimizer = self.recipe.make_optimizer(self.estimator.param_groups())  # the saved cuts may be others
        self.optimizer.load_state_dict(state["optimizer"])
        self.resumed = self.epoch > 0

    def _peak_memory(self) -> int | None:
        places = {place for place in self.devices if place.type == "cuda"}
        if not places:
            return None
        return max(sum(map(torch.cuda.max_memory_allocated, places)), self.last.peak_memory_bytes or 0)

    def _add_flops(self, kind: str) -> float | None:
        per_example = self.rehearsal.flops.get(kind)
        if per_example is None or (self.epoch > 1 and self.last.flops_executed is None):
            return None
        return (self.last.flops_executed or 0.0) + per_example * len(self.data.train)

    def _add_energy(self, before: float | None) -> None:
        after = self.energy()
        known = before is not None and after is not None and (self.epoch == 0 or self.last.energy_joules is not None)
        self.last.energy_joules = (self.last.energy_joules or 0.0) + after - before if known else None  # type: ignore[operator]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


@torch.no_grad()
def evaluate(model: nn.Module, data: Dataset, split: Any, recipe: Recipe) -> tuple[float, float]:
    """Mean cross entropy and accuracy (fraction of labels right) over a split, in eval mode; leaves no trace."""
    was_training = model.training
    model.eval()
    loss = torch.zeros((), device=data.device, dtype=torch.float64)
    right = torch.zeros((), device=data.device, dtype=torch.int64)
    labels = 0
    for x, y in data.eval_batches(split, recipe.eval_batch_size):
        logits: Tensor = model(x)
        loss += nn.functional.cross_entropy(logits.flatten(0, -2), y.flatten(), reduction="sum")
        right += (logits.argmax(-1) == y).sum()
        labels += y.numel()
    model.train(was_training)
    return loss.item() / labels, right.item() / labels
