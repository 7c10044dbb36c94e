"""An image folder, decoded once and cached as one file of uint8 tensors.

    PATH/train/<class>/*.jpg, PATH/test/<class>/*.jpg       or, without a split,       PATH/<class>/*.jpg

A class is a folder, whatever lies in it at any depth; hidden files and other kinds of file are passed over.
The cache lies under `data_root()/folders`, one file for each (absolute path, size), and is rebuilt when an
image of the folder was added, removed, renamed or changed.
"""

from __future__ import annotations

import hashlib
import os
import sys
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastbp.sources import Split, data_root, whole

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
GREY_MODES = ("1", "L", "LA")
SMALL_FILE_BYTES = 8192  # threads halve the decoding of photographs on two cores, and slow down that of thumbnails


@dataclass(frozen=True)
class Part:
    """The files of one part of the folder (all of it, train or test) and the class of each."""

    files: list[str]
    labels: list[int]


def load_folder(path: str, size: int | list[int] | None) -> tuple[dict[str, Split], list[str]]:
    """The parts ("train", and "test" where there is one) as uint8 (N, C, H, W), and the sorted class names.

    The images are grey (C = 1) if the first one is, otherwise RGB.

    Args:
        path: of the folder.
        size: height and width that all images are resized to, or one for both; None: as the first image.

    Raises:
        ValueError: no such folder, no images in it, an unreadable image, or a colour image among grey ones.
        ImportError: the images have to be decoded and Pillow is not installed.
    """
    root = Path(path).expanduser().resolve()
    height_width = _height_width(size)
    parts, classes = _list(root)
    fingerprint = _fingerprint(root, parts, classes)
    cache = _cache(root, height_width)
    stored = _read(cache, fingerprint)
    if stored is None:
        stored = dict[str, Any](fingerprint=fingerprint)
        height_width, grey = _format(parts["train"].files[0], height_width)
        for name, part in parts.items():
            stored[f"{name}_x"] = _decode(part.files, height_width, grey, f"decoding {root.name}/{name}")
            stored[f"{name}_y"] = torch.tensor(part.labels)
        save_atomically(stored, cache)
    return {name: Split(stored[f"{name}_x"], stored[f"{name}_y"]) for name in parts}, classes


def is_cached(path: str, size: int | list[int] | None) -> bool:
    """Whether the images need not be decoded.

    Raises:
        ValueError: no such folder, or no images in it.
    """
    root = Path(path).expanduser().resolve()
    return _read(_cache(root, _height_width(size)), _fingerprint(root, *_list(root))) is not None


def _cache(root: Path, height_width: tuple[int, int] | None) -> Path:
    key = hashlib.sha256(f"{root}\n{height_width}".encode()).hexdigest()[:16]
    return data_root() / "folders" / f"{root.name}-{key}.pt"


def save_atomically(value: Any, file: Path) -> None:
    """`torch.save` such that `file` is at any time absent, the old one or the new one, whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.stem}-{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as stream:
            torch.save(value, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _read(cache: Path, fingerprint: str) -> dict[str, Any] | None:
    """The cached tensors, mapped rather than read; None where there is no cache, an old or a damaged one."""
    if not cache.exists():
        return None
    try:
        stored = torch.load(cache, weights_only=True, mmap=True)
    except Exception as error:  # what a damaged file raises depends on where it is damaged
        print(f"fastbp: {cache} is damaged ({type(error).__name__}) and is built again", file=sys.stderr)
        return None
    return stored if stored["fingerprint"] == fingerprint else None


def _list(root: Path) -> tuple[dict[str, Part], list[str]]:
    if not root.is_dir():
        raise ValueError(f"data 'folder:{root}': no such folder")
    split = bool(_class_folders(root / "train"))
    folders = {n: root / n for n in ("train", "test") if (root / n).is_dir()} if split else {"train": root}
    classes = _class_folders(folders["train"])
    parts = {name: _list_part(folder, classes) for name, folder in folders.items()}
    for name, part in parts.items():
        if not part.files:
            raise ValueError(f"data 'folder:{root}': no images ({' '.join(SUFFIXES)}) in {folders[name]}/<class>/")
    return parts, classes


def _list_part(folder: Path, classes: list[str]) -> Part:
    part = Part([], [])
    unknown = sorted(set(_class_folders(folder)) - set(classes))
    if unknown:
        raise ValueError(f"data 'folder:{folder.parent}': {folder} has the class {unknown[0]!r}, which train/ has not")
    for label, name in enumerate(classes):
        files = sorted(
            os.path.join(place, file)
            for place, _, inside in os.walk(folder / name)
            for file in inside
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        )
        part.files.extend(files)
        part.labels.extend([label] * len(files))
    return part


def _class_folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def _fingerprint(root: Path, parts: dict[str, Part], classes: list[str]) -> str:
    """Changes with the name, size or time of any image; its ctime tells where `mv` and `cp -p` keep the other three."""
    digest = hashlib.sha256("\n".join(classes).encode())
    for part in parts.values():
        for file in part.files:
            status = os.stat(file)
            digest.update(
                f"{os.path.relpath(file, root)}\n{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode()
            )
    return digest.hexdigest()


def _height_width(size: int | list[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    both = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(both) != 2:
        raise ValueError(f"data 'folder': size = {size!r}: expected one whole number, or height and width")
    for value in both:
        whole("folder", "size", value, 1)
    return both[0], both[1]


def _format(first: str, height_width: tuple[int, int] | None) -> tuple[tuple[int, int], bool]:
    """Height and width of all images, and whether they are grey: where not given, as the first image."""
    with _opened(first) as image:
        return height_width or (image.height, image.width), image.mode in GREY_MODES


def _decode(files: list[str], height_width: tuple[int, int], grey: bool, what: str) -> Tensor:
    """All images as uint8 (N, C, H, W)."""
    x = torch.empty(len(files), 1 if grey else 3, *height_width, dtype=torch.uint8)

    def decode(i: int) -> None:
        x[i] = _pixels(files[i], height_width, grey)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        apply = pool.map if os.path.getsize(files[0]) > SMALL_FILE_BYTES else map
        for _ in _progress(apply(decode, range(len(files))), len(files), what):
            pass
    return x


def _pixels(file: str, height_width: tuple[int, int], grey: bool) -> Tensor:
    """One image as uint8 (C, H, W), resized bilinearly without keeping the aspect ratio."""
    height, width = height_width
    with _opened(file) as image:
        if grey and image.mode not in GREY_MODES:
            raise ValueError(f"{file} is in colour, but the first image of its folder is grey: convert one of them")
        image = image.convert("L" if grey else "RGB")
        if image.size != (width, height):
            image = image.resize((width, height), resample=2)  # PIL.Image.Resampling.BILINEAR
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, -1).permute(2, 0, 1)


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("data 'folder' needs Pillow to decode images: install fastbp[vision]") from error
    try:
        with Image.open(file) as image:
            yield image
    except (OSError, SyntaxError) as error:  # SyntaxError: what Pillow raises for a broken PNG
        raise ValueError(f"{file} cannot be read as an image ({error}): repair or remove it") from error


def _progress(items: Iterable[Any], total: int, what: str) -> Iterable[Any]:
    """The items, with a progress bar on stderr, or one line there where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        print(f"fastbp: {what}: {total} images", file=sys.stderr)
        return items
    return track(items, description=what, total=total, console=Console(stderr=True))
