"""Where data comes from: every source gives three disjoint, fixed splits on the CPU.

    digits          1 797 handwritten digits, embedded: the test set of the UCI Optical Recognition of
                    Handwritten Digits data (E. Alpaydin and C. Kaynak, 1998; CC BY 4.0), 8x8 grey values
                    0..16, the same images in the same order as scikit-learn's `load_digits`
    cifar10         CIFAR-10 and CIFAR-100 (A. Krizhevsky, 2009) through torchvision, downloaded where there
    cifar100        is a network
    folder:PATH     an image folder, see `fastbp.folder`
    text:PATH       characters of a UTF-8 text file
    synthetic       Gaussian class prototypes with noise

Splits never depend on a run's seed. Validation images are carved from the training images by one fixed
stratified permutation; where a source has no test images, they are carved the same way.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Split:
    """Examples and their targets, in a fixed order.

    Attributes:
        x: images uint8 (N, C, H, W), or tokens int64 (N, T).
        y: labels int64 (N,), or the next tokens int64 (N, T).
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device | str) -> Split:
        return Split(self.x.to(device), self.y.to(device))

    def first(self, n: int) -> Split:
        """The first `n` examples, or all where there are fewer."""
        return Split(self.x[:n], self.y[:n])


@dataclass(frozen=True, eq=False)
class Splits:
    """What a source returns.

    Attributes:
        classes: number of classes, or the size of the vocabulary.
    """

    train: Split
    val: Split
    test: Split
    classes: int


def digits() -> Splits:
    stored = torch.load(Path(__file__).parent / "assets" / "digits.pt", weights_only=True)
    return carve(Split(stored["x"], stored["y"].long()), classes=10, val=300, test=300)


def cifar10() -> Splits:
    return _cifar("CIFAR10", 10)


def cifar100() -> Splits:
    return _cifar("CIFAR100", 100)


def _cifar(name: str, classes: int) -> Splits:
    """One in ten training images (5 000 of 50 000) is for validation; the test images are the original ones.

    Raises:
        ImportError: torchvision is not installed.
        OSError: the data are neither on disk nor to be had from the network.
    """
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"data {name.lower()!r} needs torchvision: install fastbp[vision]") from error
    root = data_root()
    try:
        parts = [getattr(datasets, name)(str(root), train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"data {name.lower()!r} is not in {root} and cannot be downloaded ({error}): put its archive "
            "there, set FASTBP_DATA to the folder that has it, or use folder:PATH"
        ) from error
    train, test = (
        Split(torch.from_numpy(p.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(p.targets)) for p in parts
    )
    return carve(train, classes=classes, val=len(train) // 10, given_test=test)


def first_load(name: str, path: str = "", size: int | list[int] | None = None) -> str:
    """What loading a data set would leave on this machine first, such as "downloaded into ..."; empty: nothing.

    Args:
        name, path: of the source.
        size: of the images of a folder.

    Raises:
        ValueError, ImportError: what loading it would raise.
    """
    if name == "folder":
        from fastbp.folder import is_cached

        return "" if is_cached(path, size) else f"decoded, once, into {data_root() / 'folders'}"
    if name not in ("cifar10", "cifar100"):
        return ""
    from torchvision import datasets
    from torchvision.datasets.utils import check_integrity

    kind, root = getattr(datasets, name.upper()), data_root()
    files = [(root / kind.base_folder / file, md5) for file, md5 in [*kind.train_list, *kind.test_list]]
    if all(check_integrity(file, md5) for file, md5 in files):
        return ""
    return f"{'unpacked' if check_integrity(root / kind.filename, kind.tgz_md5) else 'downloaded'} into {root}"


def synthetic(
    *, n: int = 1200, shape: tuple[int, ...] | list[int] = (1, 8, 8), classes: int = 10, seed: int = 0
) -> Splits:
    """Images 128 + 24 (prototype of the class + 2 noise), clamped; prototypes and noise standard normal.

    Args:
        n: number of images in all; a sixth each is for validation and test.
        shape: (C, H, W) of one image.
        classes: number of classes, equally frequent.
        seed: of prototypes and noise, not the run's seed.
    """
    shape = tuple(shape) if isinstance(shape, tuple | list) else (shape,)
    if len(shape) != 3:
        raise ValueError(f"data 'synthetic': shape = {shape!r}: expected [channels, height, width]")
    whole("synthetic", "classes", classes, 2)
    for name, value, low in (("n", n, 6 * classes), ("seed", seed, 0), *(("shape", s, 1) for s in shape)):
        whole("synthetic", name, value, low)
    generator = torch.Generator().manual_seed(seed)
    prototypes = torch.randn(classes, *shape, generator=generator)
    y = torch.arange(n) % classes
    values = prototypes[y] + 2 * torch.randn(n, *shape, generator=generator)
    x = (128 + 24 * values).round().clamp(0, 255).to(torch.uint8)
    return carve(Split(x, y), classes=classes, val=n // 6, test=n // 6)


def text(path: str, *, length: int = 64) -> Splits:
    """The characters of a file, the first 90 % for training, 5 % for validation, the last 5 % for test.

    Every split is cut into windows that do not overlap; the target of a character is the next one.
    A token is the character's place in the sorted list of the file's characters.

    Args:
        path: of a UTF-8 file.
        length: characters per window.

    Raises:
        ValueError: no such file, not UTF-8, or too short for one window in every split.
    """
    whole("text", "length", length, 1)
    file = Path(path).expanduser()
    try:
        content = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"data 'text:{path}': {file.absolute()} cannot be read as UTF-8 text: {error}") from error
    if len(content) // 20 <= length:
        raise ValueError(
            f"data 'text:{path}': {len(content)} characters are too few for windows of length = {length}; "
            f"at least {20 * (length + 1)} are needed"
        )
    codes = torch.frombuffer(bytearray(content.encode("utf-32-le")), dtype=torch.int32)
    vocabulary, tokens = torch.unique(codes, sorted=True, return_inverse=True)
    bounds = [0, len(tokens) * 18 // 20, len(tokens) * 19 // 20, len(tokens)]
    train, val, test = (_windows(tokens[a:b], length) for a, b in pairwise(bounds))
    return Splits(train, val, test, classes=len(vocabulary))


def _windows(tokens: Tensor, length: int) -> Split:
    n = (len(tokens) - 1) // length
    return Split(tokens[: n * length].view(n, length), tokens[1 : n * length + 1].view(n, length))


def folder(path: str, *, size: int | list[int] | None = None) -> Splits:
    """See `fastbp.folder`; a tenth of the training images is for validation, another for test if need be."""
    from fastbp.folder import load_folder

    parts, classes = load_folder(path, size)
    train = parts["train"]
    tenth = len(train) // 10
    test = parts.get("test")
    return carve(train, classes=len(classes), val=tenth, test=0 if test else tenth, given_test=test)


SOURCES: dict[str, Callable[..., Splits]] = {
    "digits": digits,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "folder": folder,
    "text": text,
    "synthetic": synthetic,
}


def carve(images: Split, *, classes: int, val: int, test: int = 0, given_test: Split | None = None) -> Splits:
    """Split labelled images by the fixed permutation: first the test images, then validation, then training.

    Raises:
        ValueError: a split would be empty, or training would have fewer than two images.
    """
    order = stratified_order(images.y)
    tests, vals, trains = order[:test], order[test : test + val], order[test + val :]
    if len(trains) < 2 or not len(vals) or not (len(tests) or given_test):
        raise ValueError(f"{len(images)} images are too few to split into training, validation and test")
    train, val_split, carved = (Split(images.x[i], images.y[i]) for i in (trains, vals, tests))
    return Splits(train, val_split, given_test or carved, classes)


def stratified_order(y: Tensor) -> Tensor:
    """A fixed pseudo-random order (N,) in which every prefix holds the classes in their proportions.

    The k-th image of a class of m, after the permutation, stands at the fraction (k + 1/2) / m of the order.
    """
    shuffled = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    by_class = y[shuffled].argsort(stable=True)
    label = y[shuffled][by_class]
    counts = torch.bincount(label)
    rank = torch.arange(len(y)) - (counts.cumsum(0) - counts)[label]
    place = (rank.double() + 0.5) / counts[label]
    return shuffled[by_class[place.argsort(stable=True)]]


def data_root() -> Path:
    """Where downloads and caches live: FASTBP_DATA, else ~/.cache/fastbp."""
    return Path(os.environ.get("FASTBP_DATA") or "~/.cache/fastbp").expanduser().absolute()


def whole(source: str, name: str, value: Any, low: int) -> None:
    """Refuse an argument that is not a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"data {source!r}: {name} = {value!r}: expected a whole number, at least {low}")
