"""Sources: what they hold, their splits, their errors. Image folders have tests of their own."""

import hashlib
import os
import pickle
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastbp.data import load_dataset
from fastbp.sources import stratified_order

TEST_DATA = Path(os.environ.get("FASTBP_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(autouse=True)
def _own_data_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTBP_DATA", str(tmp_path / "root"))


# Digits, splits, limits


def test_digits_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    images, target = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(images).view(-1, 1, 8, 8), torch.tensor(target)
    order = stratified_order(y)
    data = load_dataset("digits", device="cpu")
    got_x = torch.cat([data.test.x, data.val.x, data.train.x])
    assert got_x.dtype == torch.uint8, f"stored as {got_x.dtype}"
    assert torch.equal(got_x.double(), x[order].double()), "images differ from scikit-learn's"
    assert torch.equal(torch.cat([data.test.y, data.val.y, data.train.y]), y[order]), "labels differ"
    assert (data.classes, data.input_shape, data.kind) == (10, (1, 8, 8), "image")


def test_splits_are_fixed_and_disjoint():
    torch.manual_seed(11)
    data = load_dataset("digits", device="cpu")
    assert (len(data.train), len(data.val), len(data.test)) == (1197, 300, 300)
    digest = hashlib.sha256(bytes(data.test.x.flatten().tolist()) + bytes(data.val.x.flatten().tolist())).hexdigest()
    assert digest[:16] == "75282bb20addcd12", (
        f"other images in val or test than those published results used: {digest[:16]}"
    )
    parts = [{bytes(i.flatten().tolist()) for i in s.x} for s in (data.train, data.val, data.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)), "an image is in two splits"


@pytest.mark.parametrize("counts", [(50, 50, 50), (90, 7, 3), (1, 40)])
def test_every_prefix_of_the_stratified_order_holds_the_classes_in_proportion(counts):
    y = torch.cat([torch.full((n,), label) for label, n in enumerate(counts)])
    order = stratified_order(y)
    assert order.sort().values.tolist() == list(range(len(y))), "not a permutation"
    for end in range(1, len(y)):
        share = torch.bincount(y[order[:end]], minlength=len(counts)) - end * torch.tensor(counts) / len(y)
        assert share.abs().max() <= 1.01, f"prefix {end} of classes {counts} is off by {share.tolist()} images"


def test_limit_keeps_the_first_of_the_fixed_order_balanced():
    whole, small = (load_dataset("digits", device="cpu", **args) for args in ({}, {"limit": 100}))
    assert torch.equal(small.train.x, whole.train.x[:100]), "limit took other images"
    counts = small.train.y.bincount().tolist()
    assert len(small.train) == 100, f"limit = 100 kept {len(small.train)} images"
    assert max(counts) - min(counts) <= 2, f"images per class {counts}"
    assert torch.equal(small.val.x, whole.val.x), "limit changed the validation images"
    assert len(load_dataset("digits", device="cpu", limit=10**6).train) == 1197, "a limit above all keeps all"


def test_synthetic_is_deterministic_and_learnable():
    a, b, c = (load_dataset("synthetic", device="cpu", n=600, classes=5, seed=s) for s in (1, 1, 2))
    assert torch.equal(a.train.x, b.train.x), "the same seed made other images"
    assert not torch.equal(a.train.x, c.train.x), "another seed made the same images"
    assert (len(a.train), len(a.val), len(a.test)) == (400, 100, 100)
    means = torch.stack([a.train.x[a.train.y == k].double().mean(0) for k in range(5)])
    nearest = torch.cdist(a.test.x.double().flatten(1), means.flatten(1)).argmin(1)
    accuracy = (nearest == a.test.y).double().mean().item()
    assert accuracy > 0.9, f"the nearest class mean is right in {accuracy:.0%} of the test images"


# Text


def test_text_targets_are_the_next_characters(tmp_path):
    content = "".join(f"line {i}: äöü – 𝔽 z\n" for i in range(200))
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    data = load_dataset(f"text:{tmp_path / 'a.txt'}", device="cpu", length=10)
    vocabulary = sorted(set(content))
    assert data.classes == len(vocabulary), f"{data.classes} tokens for {len(vocabulary)} characters"
    n = len(content)
    pieces = content[: n * 18 // 20], content[n * 18 // 20 : n * 19 // 20], content[n * 19 // 20 :]
    for name, split, piece in zip(("train", "val", "test"), (data.train, data.val, data.test), pieces, strict=True):
        windows = (len(piece) - 1) // 10
        assert split.x.shape == (windows, 10), f"{name}: {tuple(split.x.shape)}"
        for what, tokens, shift in (("x", split.x, 0), ("y", split.y, 1)):
            decoded = "".join(vocabulary[t] for t in tokens.flatten().tolist())
            assert decoded == piece[shift : shift + 10 * windows], f"{name}.{what} is not the file's text"
    x, y = next(data.batches(4, seed=0, epoch=0))
    assert (x.dtype, y.dtype, x.shape, y.shape) == (torch.int64, torch.int64, (4, 10), (4, 10))
    assert torch.equal(x[:, 1:], y[:, :-1]), "y is not x one character later"


def test_text_of_a_real_file():
    file = TEST_DATA / "tinyshakespeare.txt"
    if not file.exists():
        pytest.skip(f"{file} is absent; set FASTBP_TEST_DATA to the folder that has it")
    data = load_dataset(f"text:{file}", device="cpu", limit=1000)
    assert (data.classes, data.input_shape, data.kind, len(data.train)) == (65, (64,), "text", 1000)
    assert len(data.val) == len(data.test) == 871, f"{len(data.val)} and {len(data.test)} windows of 64"


# CIFAR, errors, imports


def write_cifar10(root: Path, monkeypatch: pytest.MonkeyPatch, per_file: int) -> Tensor:
    """A small CIFAR-10 in the original file format; returns its images (N, 3, 32, 32) in file order."""
    numpy = pytest.importorskip("numpy")
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", None)
    folder = root / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    rng, images = numpy.random.default_rng(0), []
    for name, _ in datasets.CIFAR10.train_list + datasets.CIFAR10.test_list:
        pixels = rng.integers(0, 256, (per_file, 3072), dtype=numpy.uint8)
        images.append(torch.from_numpy(pixels).view(-1, 3, 32, 32))
        batch = {"data": pixels, "labels": [i % 10 for i in range(per_file)]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    return torch.cat(images)


def test_cifar10_is_read_through_torchvision(tmp_path, monkeypatch):
    images = write_cifar10(tmp_path / "root", monkeypatch, per_file=20)
    data = load_dataset("cifar10", device="cpu")
    assert (len(data.train), len(data.val), len(data.test)) == (90, 10, 20)
    assert data.val.y.bincount().tolist() == [1] * 10, f"validation classes {data.val.y.tolist()}"
    assert torch.equal(data.test.x, images[100:]), "the test images are not the original ones, in order"
    got = {bytes(i.flatten().tolist()) for i in torch.cat([data.train.x, data.val.x])}
    assert got == {bytes(i.flatten().tolist()) for i in images[:100]}, "train and val are not the training images"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_without_network_is_one_clear_error(name, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(OSError, match=rf"{name}.*root.*cannot be downloaded.*no route to host.*FASTBP_DATA") as caught:
        load_dataset(name, device="cpu")
    assert "\n" not in str(caught.value), f"more than one line: {caught.value}"


@pytest.mark.parametrize(
    ("spec", "args", "message"),
    [
        ("digit", {}, "no data 'digit'; did you mean digits"),
        ("mnist", {}, "known: digits, cifar10"),
        ("cifar1O", {}, "did you mean cifar10"),
        ("", {}, "no data ''"),
        ("digits:here", {}, "digits takes no path"),
        ("text", {}, "a path is missing, text:PATH"),
        ("folder:", {}, "a path is missing, folder:PATH"),
        ("text:/no/such/file", {}, "/no/such/file cannot be read"),
        ("folder:/no/such/folder", {}, "'folder:/no/such/folder': no such folder"),
        ("digits", {"limt": 5}, "no argument 'limt'; did you mean limit"),
        ("digits", {"path": "x"}, "no argument 'path'"),
        ("digits", {"limit": 1}, "limit = 1: expected a whole number, at least 2"),
        ("digits", {"limit": 2.0}, "limit = 2.0"),
        ("digits", {"dtype": torch.int64}, "expected a floating-point type"),
        ("synthetic", {"shape": [8, 8]}, "shape = "),
        ("synthetic", {"shape": 8}, "shape = "),
        ("synthetic", {"shape": (1, 0, 8)}, "shape = 0"),
        ("synthetic", {"n": 20}, "n = 20: expected a whole number, at least 60"),
        ("synthetic", {"classes": True}, "classes = True"),
        ("synthetic", {"seed": -1}, "seed = -1"),
    ],
)
def test_bad_requests_name_the_fix(spec, args, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        load_dataset(spec, device="cpu", **args)
    assert message in str(caught.value), f"says: {caught.value}"


def test_bad_text_is_refused(tmp_path):
    (tmp_path / "short.txt").write_text("a" * 1299)
    with pytest.raises(ValueError, match=r"1299 characters are too few .* at least 1300"):
        load_dataset(f"text:{tmp_path / 'short.txt'}", device="cpu")
    (tmp_path / "short.txt").write_text("a" * 1300)
    data = load_dataset(f"text:{tmp_path / 'short.txt'}", device="cpu")
    assert (len(data.train), len(data.val), len(data.test)) == (18, 1, 1)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\xfa" * 1000)
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        load_dataset(f"text:{tmp_path / 'binary.txt'}", device="cpu")


def test_digits_synthetic_and_text_need_torch_alone(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be " * 100)
    script = """
import sys
for name in ("numpy", "torchvision", "PIL", "rich", "sklearn"):
    sys.modules[name] = None
from fastbp.data import load_dataset
for spec in ("digits", "synthetic", "text:a.txt"):
    data = load_dataset(spec, device="cpu")
    print(sum(len(y) for _, y in data.batches(32, seed=0, epoch=0)) == len(data.train))
"""
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["True"] * 3, f"{done.stdout}\n{done.stderr}"
