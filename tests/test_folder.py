"""Image folders: what is read, and the cache, which must never be stale or broken."""

import os
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastbp.data import load_dataset
from fastbp.folder import save_atomically

Image = pytest.importorskip("PIL.Image")
TEST_DATA = Path(os.environ.get("FASTBP_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTBP_DATA", str(tmp_path / "root"))
    return tmp_path / "root" / "folders"


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch):
    """A function; once it is called, opening an image is a failure."""

    def refuse(*args, **kwargs):
        raise AssertionError("an image was opened, although the cache holds it")

    return lambda: monkeypatch.setattr(Image, "open", refuse)


def write_image(file: Path, seed: int, *, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> Tensor:
    """A random lossless image of width and height `size`; returns it as uint8 (C, H, W)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0], len(mode) if mode != "L" else 1)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    Image.frombytes(mode, size, bytes(pixels.flatten().tolist())).save(file)
    return pixels.permute(2, 0, 1)


def write_folder(root: Path, per_class: int = 10, *, first_seed: int = 0, **how) -> dict[bytes, int]:
    """Classes a and b of `per_class` images each; returns the label of each image by its bytes."""
    out = {}
    for label, name in enumerate("ab"):
        for i in range(per_class):
            image = write_image(root / name / f"{i:02}.png", seed=first_seed + len(out), **how)
            out[as_bytes(image)] = label
            os.utime(root / name / f"{i:02}.png", (10**9, 10**9))
    return out


def as_bytes(image: Tensor) -> bytes:
    return bytes(image.flatten().tolist())


def contents(*splits) -> dict[bytes, int]:
    return {as_bytes(x): int(y) for s in splits for x, y in zip(s.x, s.y, strict=True)}


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_images_labels_and_carved_splits(tmp_path, cache, mode):
    truth = write_folder(tmp_path / "pets", mode=mode)
    data = load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu")
    assert data.input_shape == (len(mode) if mode == "RGB" else 1, 5, 6), f"shape {data.input_shape}"
    assert (len(data.train), len(data.val), len(data.test), data.classes) == (16, 2, 2, 2)
    assert contents(data.train, data.val, data.test) == truth, "images or labels differ from the files"
    assert sorted(data.val.y.tolist()) == [0, 1], f"validation classes {data.val.y.tolist()}"


def test_train_and_test_folders(tmp_path, cache):
    train, test = write_folder(tmp_path / "train"), write_folder(tmp_path / "test", 3, first_seed=100)
    write_image(tmp_path / "test" / "a" / "deeper" / "EXTRA.PNG", seed=5)
    (tmp_path / "train" / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "a" / "._00.png").write_text("hidden, not an image either")
    data = load_dataset(f"folder:{tmp_path}", device="cpu")
    assert contents(data.train, data.val) == train, "train and val are not the images of train/"
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 7)
    assert test.items() <= contents(data.test).items(), "test is not the images of test/"


def test_size_resizes_all(tmp_path, cache):
    write_folder(tmp_path / "pets")
    write_image(tmp_path / "pets" / "b" / "wide.png", seed=1, size=(30, 20))
    sizes = {None: (5, 6), 8: (8, 8), (4, 10): (4, 10)}
    for size, expected in sizes.items():
        args = {} if size is None else {"size": list(size) if isinstance(size, tuple) else size}
        data = load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu", **args)
        assert data.input_shape == (3, *expected), f"size = {size}: {data.input_shape}"
    assert len(list(cache.iterdir())) == len(sizes), "each size has a cache of its own"


def test_the_second_load_reads_the_cache(tmp_path, cache, no_decoding, capsys):
    truth = write_folder(tmp_path / "pets")
    first = load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu")
    assert "decoding pets/train" in capsys.readouterr().err, "no word on stderr about the decoding"
    no_decoding()
    second = load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu")
    assert capsys.readouterr() == ("", ""), "reading the cache is silent"
    for name in ("train", "val", "test"):
        a, b = getattr(first, name), getattr(second, name)
        assert torch.equal(a.x, b.x), f"{name}: the cache gave other images"
        assert torch.equal(a.y, b.y), f"{name}: the cache gave other labels"
    assert contents(second.train, second.val, second.test) == truth
    assert [f.suffix for f in cache.iterdir()] == [".pt"], f"cache holds {list(cache.iterdir())}"


def test_a_cache_is_found_from_another_working_directory(tmp_path, cache, no_decoding, monkeypatch):
    write_folder(tmp_path / "pets")
    monkeypatch.chdir(tmp_path)
    load_dataset("folder:pets", device="cpu")
    no_decoding()
    monkeypatch.chdir(tmp_path / "pets")
    load_dataset("folder:../pets", device="cpu")


def change_added(root: Path) -> None:
    write_image(root / "a" / "new.png", seed=999)


def change_removed(root: Path) -> None:
    (root / "a" / "03.png").unlink()


def change_moved(root: Path) -> None:
    (root / "a" / "03.png").rename(root / "b" / "x.png")


def change_class_renamed(root: Path) -> None:
    (root / "a").rename(root / "c")


def change_swapped(root: Path) -> None:
    """Two images of one size and time change places."""
    a, b = root / "a" / "03.png", root / "b" / "03.png"
    assert a.stat().st_size == b.stat().st_size, "the test needs images of one size in bytes"
    a.rename(root / "a" / "spare")
    b.rename(a)
    (root / "a" / "spare").rename(b)


def change_empty_class(root: Path) -> None:
    """A class without images, which makes b the third class."""
    (root / "aa").mkdir()


def change_pixels(root: Path) -> None:
    """Other pixels, and a time before that of the other images, as `cp -p` may leave it."""
    write_image(root / "a" / "03.png", seed=999)
    os.utime(root / "a" / "03.png", (10**8, 10**8))


CHANGES = [change_added, change_removed, change_moved, change_class_renamed, change_swapped, change_empty_class]


@pytest.mark.parametrize("change", [*CHANGES, change_pixels])
def test_a_changed_folder_is_decoded_again(tmp_path, cache, monkeypatch, change):
    root = tmp_path / "pets"
    write_folder(root)
    load_dataset(f"folder:{root}", device="cpu")
    change(root)
    changed = load_dataset(f"folder:{root}", device="cpu")
    monkeypatch.setenv("FASTBP_DATA", str(tmp_path / "fresh"))
    fresh = load_dataset(f"folder:{root}", device="cpu")
    every = [contents(d.train, d.val, d.test) for d in (changed, fresh)]
    assert every[0] == every[1], "the old cache was used"
    assert len(list(cache.iterdir())) == 1, "the old cache was left beside the new one"


@pytest.mark.parametrize("moment", ["torch.save", "os.fsync", "os.replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_no_broken_cache(tmp_path, cache, monkeypatch, moment, error):
    truth = write_folder(tmp_path / "pets")

    def interrupted(*args):
        if moment == "torch.save":
            args[1].write(b"half a file")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(moment, interrupted)
        with pytest.raises(type(error)):
            load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu")
    assert list(cache.iterdir()) == [], f"left behind: {list(cache.iterdir())}"
    data = load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu")
    assert contents(data.train, data.val, data.test) == truth


def test_an_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "value.pt"
    save_atomically({"a": 1}, file)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_atomically({"a": 2}, file)
    assert torch.load(file, weights_only=True) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file], f"left behind: {list(tmp_path.iterdir())}"


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\0" * len(b)])
def test_a_damaged_cache_is_built_again(tmp_path, cache, damage, capsys):
    truth = write_folder(tmp_path / "pets")
    for _ in range(2):
        load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu")
        (file,) = cache.iterdir()
        file.write_bytes(damage(file.read_bytes()))
        capsys.readouterr()
    data = load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu")
    assert "is damaged" in capsys.readouterr().err, "the damage was passed over in silence"
    assert contents(data.train, data.val, data.test) == truth


def test_a_cache_that_would_run_code_is_not_run(tmp_path, cache):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    truth = write_folder(tmp_path / "pets")
    load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu")
    (file,) = cache.iterdir()
    torch.save({"fingerprint": Evil()}, file)
    data = load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu")
    assert not (tmp_path / "evil").exists(), "loading the cache ran code from it"
    assert contents(data.train, data.val, data.test) == truth


def test_without_rich_there_is_one_plain_line(tmp_path, cache, monkeypatch, capsys):
    write_folder(tmp_path / "pets")
    for name in ("rich.console", "rich.progress"):
        monkeypatch.setitem(sys.modules, name, None)
    load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu")
    assert capsys.readouterr() == ("", "fastbp: decoding pets/train: 20 images\n")


def test_without_pillow_a_cached_folder_still_loads(tmp_path, cache, monkeypatch):
    write_folder(tmp_path / "pets")
    load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu")
    monkeypatch.setitem(sys.modules, "PIL", None)
    load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu")
    with pytest.raises(ImportError, match="needs Pillow to decode images"):
        load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu", size=8)


def spoil_colour(root: Path) -> None:
    write_folder(root, mode="L")
    write_image(root / "b" / "colour.png", seed=0)


def spoil_file(root: Path) -> None:
    write_folder(root)
    (root / "a" / "05.png").write_bytes((root / "a" / "05.png").read_bytes()[:80])


def spoil_not_an_image(root: Path) -> None:
    write_folder(root)
    (root / "b" / "05.png").write_text("hello")


def spoil_test_class(root: Path) -> None:
    write_folder(root / "train")
    write_image(root / "test" / "cat" / "0.png", seed=0)


def spoil_empty_test(root: Path) -> None:
    write_folder(root / "train")
    (root / "test" / "a").mkdir(parents=True)


@pytest.mark.parametrize(
    ("spoil", "args", "message"),
    [
        (spoil_colour, {}, "colour.png is in colour, but the first image of its folder is grey"),
        (spoil_file, {}, "05.png cannot be read as an image"),
        (spoil_not_an_image, {}, "b/05.png cannot be read as an image"),
        (spoil_test_class, {}, "has the class 'cat', which train/ has not"),
        (spoil_empty_test, {}, "test/<class>/"),
        (lambda root: root.mkdir(), {}, "no images (.jpg"),
        (lambda root: write_folder(root, per_class=3), {}, "6 images are too few to split"),
        (write_folder, {"size": 0}, "size = 0: expected a whole number, at least 1"),
        (write_folder, {"size": "32"}, "size = '32'"),
        (write_folder, {"size": [32]}, "size = [32]: expected one whole number, or height and width"),
    ],
)
def test_bad_folders_name_the_fix(tmp_path, cache, spoil, args, message):
    spoil(tmp_path / "pets")
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        load_dataset(f"folder:{tmp_path / 'pets'}", device="cpu", **args)
    assert message in str(caught.value), f"says: {caught.value}"


def test_real_photographs(tmp_path, cache):
    archive = TEST_DATA / "cifar10-jpeg.tar.xz"
    if not archive.exists():
        pytest.skip(f"{archive} is absent; set FASTBP_TEST_DATA to the folder that has it")
    taken: Counter[str] = Counter()
    with tarfile.open(archive, "r|xz") as stream:
        for member in stream:
            name = Path(member.name)
            if member.isfile() and name.parts[0] == "train" and taken[name.parts[1]] < 30:
                (tmp_path / "cifar" / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "cifar" / name).write_bytes(stream.extractfile(member).read())  # type: ignore[union-attr]
                taken[name.parts[1]] += 1
            if len(taken) == 2 and min(taken.values()) == 30:
                break
    data = load_dataset(f"folder:{tmp_path / 'cifar'}", device="cpu")
    assert (data.classes, data.input_shape) == (2, (3, 32, 32))
    assert (len(data.train), len(data.val), len(data.test)) == (48, 6, 6)
    with Image.open(sorted((tmp_path / "cifar" / "train").glob("*/*.jpg"))[0]) as image:
        truth = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.uint8).view(32, 32, 3)
    assert as_bytes(truth.permute(2, 0, 1)) in contents(data.train, data.val, data.test), "a photograph is missing"
