"""Data: whole data sets on the device, batches in an order that is a pure function of (seed, epoch).

    data = load_dataset("digits", device="cpu")
    for x, y in data.batches(64, seed=0, epoch=3, augment="crop"): ...

There is no loader process: a data set lies on the device as uint8, a batch is gathered, augmented and
normalised there, and nothing waits for the device. The sources are in `fastbp.sources`.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastbp.knobs import nearest
from fastbp.sources import SOURCES, Split, whole

AUGMENTATIONS = ("none", "flip", "crop", "flip_crop")


@dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, resident on one device.

    Attributes:
        name: the spec it was loaded by.
        train, val, test: disjoint and fixed; images uint8 (N, C, H, W), text int64 (N, T).
        classes: number of classes, or the size of the vocabulary.
        input_shape: of one example, (C, H, W) or (T,).
        mean, std: per channel, of the training images, in units of the stored values; empty for text.
        dtype: of the images in a batch.
    """

    name: str
    train: Split
    val: Split
    test: Split
    classes: int
    input_shape: tuple[int, ...]
    kind: Literal["image", "text"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: torch.dtype = torch.float32

    @property
    def device(self) -> torch.device:
        return self.train.x.device

    def to(self, device: torch.device | str) -> Dataset:
        return replace(self, train=self.train.to(device), val=self.val.to(device), test=self.test.to(device))

    def steps(self, batch_size: int) -> int:
        """Number of batches that `batches(batch_size, ...)` yields in an epoch."""
        return len(_bounds(len(self.train), batch_size))

    def batches(
        self, batch_size: int, *, seed: int, epoch: int, augment: str = "none"
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch of training batches: every example once, in an order given by (seed, epoch) alone.

        The order does not depend on batch size or augmentation, and the augmentation of an example is a
        function of (seed, epoch, its index in `train`) alone. The last batch may be short, but it never holds
        a single example, which batch normalisation could not use: that one joins the batch before.

        Args:
            batch_size: at least 2; may differ from epoch to epoch.
            seed: the run's seed.
            epoch: 0-based.
            augment: "none"; "crop" shifts by up to an eighth of the size, zeros at the border; "flip" mirrors
                left to right with probability 1/2; "flip_crop" crops, then flips.

        Returns:
            x (B, *input_shape), normalised to mean 0 and standard deviation 1 over `train`, in `dtype`; text
            int64 tokens.
            y int64 (B,); for text (B, T).

        Raises:
            ValueError: batch_size or augment is not one of these.
        """
        bounds = _bounds(len(self.train), batch_size)
        if augment not in AUGMENTATIONS:
            raise ValueError(
                f"augment = {augment!r}{nearest(augment, AUGMENTATIONS)}; known: {', '.join(AUGMENTATIONS)}"
            )
        if augment != "none" and self.kind != "image":
            raise ValueError(f"augment = {augment!r}: {self.name} has no images; use 'none'")
        return self._batches(bounds, seed, epoch, augment)

    def _batches(
        self, bounds: list[tuple[int, int]], seed: int, epoch: int, augment: str
    ) -> Iterator[tuple[Tensor, Tensor]]:
        n, device = len(self.train), self.device
        order = _move(torch.randperm(n, generator=_generator(seed, epoch, 0)), device)
        flips = shifts = None
        if "flip" in augment:
            flips = _move(torch.randint(2, (n,), generator=_generator(seed, epoch, 1)) == 1, device)
        if "crop" in augment:
            pads = _pads(self.input_shape)
            generator = _generator(seed, epoch, 2)
            shifts = _move(torch.stack([torch.randint(2 * p + 1, (n,), generator=generator) for p in pads]), device)
        for start, end in bounds:
            index = order[start:end]
            x = self.train.x[index]
            if shifts is not None:
                x = _crop(x, shifts[:, start:end])
            if flips is not None:
                x = torch.where(flips[start:end, None, None, None], x.flip(3), x)
            yield self._normalised(x), self.train.y[index]

    def eval_batches(self, split: Literal["val", "test"], batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation or test examples in their stored order, normalised as in training, not augmented."""
        if split not in ("val", "test"):
            raise ValueError(f"split = {split!r}: expected 'val' or 'test'")
        whole(self.name, "batch_size", batch_size, 1)
        part: Split = getattr(self, split)
        return (
            (self._normalised(part.x[i : i + batch_size]), part.y[i : i + batch_size])
            for i in range(0, len(part), batch_size)
        )

    def dummy_batch(self, batch_size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """Random x and y for warm-up, in a batch's shape, dtype and device; the global RNG is left alone."""
        generator = torch.Generator().manual_seed(seed)
        shape = (batch_size, *self.input_shape)
        if self.kind == "text":
            x, y = (torch.randint(self.classes, shape, generator=generator) for _ in range(2))
        else:
            x = torch.randn(shape, generator=generator).to(self.dtype)
            y = torch.randint(self.classes, (batch_size,), generator=generator)
        return x.to(self.device), y.to(self.device)

    def _normalised(self, x: Tensor) -> Tensor:
        if self.kind == "text":
            return x
        mean, std = self._scale
        return (x - mean).div_(std).to(self.dtype)

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        """Mean and std (C, 1, 1) on the device, in float32 at least: half precision would blur the values."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        mean, std = (_move(torch.tensor(v, dtype=dtype)[:, None, None], self.device) for v in (self.mean, self.std))
        return mean, std


def load_dataset(spec: str, *, device: torch.device | str, dtype: torch.dtype = torch.float32, **args: Any) -> Dataset:
    """Load a data set onto a device.

    Args:
        spec: digits, cifar10, cifar100, folder:PATH, text:PATH or synthetic, see `fastbp.sources`.
        device: where it is to lie, whole.
        dtype: of the images in a batch.
        args: `limit`, the number of training examples to keep (the first of the fixed order, stratified for
            images; all where there are fewer), and the arguments of the source.

    Raises:
        ValueError: unknown data set or argument (the message has the nearest name), or an impossible value.
        ImportError: the source needs a library that is not installed.
        OSError: a download failed.
    """
    name, _, path = spec.partition(":")
    if name not in SOURCES:
        raise ValueError(f"no data {spec!r}{nearest(name, SOURCES)}; known: {', '.join(SOURCES)}")
    source = SOURCES[name]
    accepted = list(inspect.signature(source).parameters)
    if bool(path) != ("path" in accepted):
        raise ValueError(f"data {spec!r}: {f'a path is missing, {name}:PATH' if not path else f'{name} takes no path'}")
    known = [a for a in accepted if a != "path"] + ["limit"]
    for key in args:
        if key not in known:
            raise ValueError(f"data {spec!r} has no argument {key!r}{nearest(key, known)}; known: {', '.join(known)}")
    if not dtype.is_floating_point:
        raise ValueError(f"data {spec!r}: dtype = {dtype}: expected a floating-point type")
    limit = args.pop("limit", None)
    if limit is not None:
        whole(name, "limit", limit, 2)
    splits = source(path, **args) if path else source(**args)
    train = splits.train if limit is None else splits.train.first(limit)
    kind = "image" if train.x.dtype == torch.uint8 else "text"
    mean, std = channel_statistics(train.x) if kind == "image" else ((), ())
    shape = tuple(train.x.shape[1:])
    data = Dataset(spec, train, splits.val, splits.test, splits.classes, shape, kind, mean, std, dtype)
    return data.to(device)


def channel_statistics(x: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of uint8 images (N, C, H, W), exact, from a histogram.

    A constant channel has standard deviation 1 here, so that it becomes 0.
    """
    values = torch.arange(256, dtype=torch.float64)
    means, stds = [], []
    for channel in range(x.shape[1]):
        weight = torch.bincount(x[:, channel].flatten(), minlength=256).double()
        weight /= weight.sum()
        means.append(float(weight @ values))
        stds.append(float(weight @ (values - means[-1]) ** 2) ** 0.5 or 1.0)
    return tuple(means), tuple(stds)


def _bounds(n: int, batch_size: int) -> list[tuple[int, int]]:
    """Start and end of each batch; a single example left over joins the batch before."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 2:
        raise ValueError(f"batch_size = {batch_size!r}: expected a whole number, at least 2 (batch normalisation)")
    starts = list(range(0, n, batch_size))
    if n % batch_size == 1 and len(starts) > 1:
        starts.pop()
    return list(zip(starts, [*starts[1:], n], strict=True))


def _pads(input_shape: tuple[int, ...]) -> tuple[int, int]:
    """Largest shift in rows and columns: an eighth of the size, 4 for 32 pixels."""
    return max(1, input_shape[1] // 8), max(1, input_shape[2] // 8)


def _crop(x: Tensor, shifts: Tensor) -> Tensor:
    """Windows of the zero-padded images x (B, C, H, W) that begin at row and column shifts (2, B)."""
    (rows, columns), (height, width) = _pads(tuple(x.shape[1:])), x.shape[2:]
    windows = pad(x, (columns, columns, rows, rows)).unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(x), device=x.device), :, shifts[0], shifts[1]]


def _move(x: Tensor, device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _generator(*values: int) -> torch.Generator:
    """A CPU generator seeded by a 64-bit mix (splitmix64): neighbouring values give unrelated streams."""
    mask, state = (1 << 64) - 1, 0
    for value in values:
        state = ((state ^ (value & mask)) + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return torch.Generator().manual_seed(state)
