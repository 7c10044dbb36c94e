"""Batches: their order, sizes, normalisation, augmentation, on any device."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from fastbp.data import AUGMENTATIONS, Dataset, channel_statistics, load_dataset
from fastbp.sources import Split


def numbered(n: int, shape: tuple[int, int, int] = (1, 4, 4), dtype: torch.dtype = torch.float32) -> Dataset:
    """`n` random images; the label of a training image is its index: a batch tells which images it holds."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randint(1, 256, (n, *shape), dtype=torch.uint8, generator=generator)
    train, rest = Split(x, torch.arange(n)), Split(x[:2], torch.arange(2))
    return Dataset("numbered", train, rest, rest, n, shape, "image", (0.0,) * shape[0], (1.0,) * shape[0], dtype)


def epoch_of(data: Dataset, batch_size: int, **how) -> tuple[Tensor, Tensor]:
    batches = list(data.batches(batch_size, **how))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


# Order and sizes of batches


def test_every_example_once_and_never_a_single_one():
    for n in (2, 3, 16, 17, 31, 33, 40):
        data = numbered(n)
        for batch_size in range(2, n + 3):
            sizes = [len(y) for _, y in data.batches(batch_size, seed=1, epoch=2)]
            x, y = epoch_of(data, batch_size, seed=1, epoch=2)
            where = f"n = {n}, batch_size = {batch_size}: sizes {sizes}"
            assert y.sort().values.tolist() == list(range(n)), f"{where}: not every example once"
            assert torch.equal(x, data.train.x[y].float()), f"{where}: images and labels do not belong together"
            assert min(sizes) >= 2, f"{where}: a batch of one"
            assert set(sizes[:-1]) <= {batch_size}, f"{where}: only the last batch may differ"
            assert sizes[-1] <= batch_size + 1, f"{where}: the last batch is too long"
            assert data.steps(batch_size) == len(sizes), f"{where}: steps() says {data.steps(batch_size)}"


def test_order_is_a_function_of_seed_and_epoch_alone():
    data = numbered(50)
    torch.manual_seed(1)
    _, first = epoch_of(data, 8, seed=3, epoch=4)
    torch.manual_seed(2)
    torch.rand(5)
    state = torch.get_rng_state()
    for batch_size in (8, 7, 49, 100):
        for augment in AUGMENTATIONS:
            _, y = epoch_of(data, batch_size, seed=3, epoch=4, augment=augment)
            assert torch.equal(y, first), f"another order at batch_size = {batch_size}, augment = {augment}"
    assert torch.equal(torch.get_rng_state(), state), "an epoch moved the global generator"


def test_no_two_epochs_or_seeds_share_an_order():
    data = numbered(50)
    orders = {
        (s, e): tuple(epoch_of(data, 50, seed=s, epoch=e)[1].tolist()) for s in (-1, 0, 1, 2, 2**40) for e in range(5)
    }
    repeated = [k for k, n in Counter(orders.values()).items() if n > 1]
    assert not repeated, f"{len(repeated)} orders appear more than once among {len(orders)} (seed, epoch) pairs"


def test_interleaved_epochs_do_not_disturb_each_other():
    data = numbered(20)
    one, two = data.batches(4, seed=0, epoch=0), data.batches(4, seed=0, epoch=1)
    pairs = list(zip(one, two, strict=True))
    for epoch in (0, 1):
        got = torch.cat([pair[epoch][1] for pair in pairs])
        assert torch.equal(got, epoch_of(data, 4, seed=0, epoch=epoch)[1]), f"epoch {epoch} changed by the other"


# Normalisation


def test_channel_statistics_equal_the_plain_formula():
    x = torch.randint(0, 200, (30, 3, 5, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 9
    mean, std = channel_statistics(x)
    truth = x.double()
    torch.testing.assert_close(torch.tensor(mean).double(), truth.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.tensor(std[:2]).double(), truth.std((0, 2, 3), correction=0)[:2], rtol=1e-6, atol=0
    )
    assert std[2] == 1.0, f"a constant channel has std {std[2]}, expected 1"


@pytest.mark.parametrize(
    ("spec", "args"), [("digits", {}), ("synthetic", {"shape": (3, 8, 8)}), ("digits", {"limit": 50})]
)
def test_training_images_have_mean_0_and_std_1(spec, args):
    data = load_dataset(spec, device="cpu", dtype=torch.float64, **args)
    x, _ = epoch_of(data, 64, seed=0, epoch=0)
    assert x.dtype == torch.float64, f"asked for float64, got {x.dtype}"
    mean, std = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)
    assert mean.abs().max() < 1e-10, f"means {mean.tolist()}"
    assert (std - 1).abs().max() < 1e-10, f"standard deviations {std.tolist()}"


def test_low_precision_rounds_only_the_result():
    exact = load_dataset("digits", device="cpu", dtype=torch.float64)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        x, y = next(load_dataset("digits", device="cpu", dtype=dtype).batches(200, seed=0, epoch=0))
        truth = next(exact.batches(200, seed=0, epoch=0))[0]
        assert (x.dtype, y.dtype) == (dtype, torch.int64), f"got {x.dtype}, {y.dtype}"
        error = ((x.double() - truth).abs() - 1e-6).div(truth.abs()).max().item()
        assert error <= 1.01 * torch.finfo(dtype).eps, f"{dtype}: relative error {error:.1e}"


def test_evaluation_sees_the_stored_order_and_the_training_scale():
    data = load_dataset("digits", device="cpu", dtype=torch.float64)
    for split, part in (("val", data.val), ("test", data.test)):
        batches = list(data.eval_batches(split, 128))  # type: ignore[arg-type]
        assert [len(y) for _, y in batches] == [128, 128, 44], f"{split}: sizes {[len(y) for _, y in batches]}"
        truth = (part.x.double() - data.mean[0]) / data.std[0]
        torch.testing.assert_close(torch.cat([x for x, _ in batches]), truth)
        assert torch.equal(torch.cat([y for _, y in batches]), part.y), f"{split}: labels in another order"


# Augmentation


def slow_crop(image: list[list[int]], top: int, left: int) -> list[list[int]]:
    """The image moved so that its pixel (top, left) comes to (0, 0); zero where nothing comes."""
    height, width = len(image), len(image[0])

    def pixel(i: int, j: int) -> int:
        return image[i][j] if 0 <= i < height and 0 <= j < width else 0

    return [[pixel(i + top, j + left) for j in range(width)] for i in range(height)]


def slow_flip(image: list[list[int]]) -> list[list[int]]:
    return [row[::-1] for row in image]


def explain(channels: list, got: list, crop: bool, flip: bool) -> list[tuple[int, int, bool]]:
    """All (top, left, flipped) that make the given image of the stored one, pixel by pixel."""
    tops, lefts = (range(-2, 3), range(-3, 4)) if crop else ((0,), (0,))
    return [
        (top, left, flipped)
        for top in tops
        for left in lefts
        for flipped in ((False, True) if flip else (False,))
        if [slow_flip(m) if flipped else m for m in (slow_crop(c, top, left) for c in channels)] == got
    ]


def drawn(data: Dataset, batch_size: int, augment: str, *, seed: int = 0, epoch: int = 0) -> dict:
    """Of each training image, by its index, the one (top, left, flipped) that explains the batch."""
    out = {}
    x, y = epoch_of(data, batch_size, seed=seed, epoch=epoch, augment=augment)
    for index, got in zip(y.tolist(), x.int().tolist(), strict=True):
        ways = explain(data.train.x[index].tolist(), got, "crop" in augment, "flip" in augment)
        assert len(ways) == 1, f"{augment}, image {index}: {len(ways)} crops and flips explain it, expected one"
        out[index] = ways[0]
    return out


def test_augmentation_equals_the_slow_one_and_depends_on_seed_epoch_and_index_alone():
    data = numbered(60, (2, 16, 24))  # an eighth of the size: 2 rows, 3 columns
    flip, crop, both = (drawn(data, 32, augment) for augment in ("flip", "crop", "flip_crop"))
    expected = {i: (*crop[i][:2], flip[i][2]) for i in range(60)}
    assert both == expected, "flip_crop is not crop and then flip with the same draws"
    torch.manual_seed(5)
    assert drawn(data, 7, "flip_crop") == both, "the draws depend on the batch size or the global generator"
    for other in ({"epoch": 1}, {"seed": 1}):
        again = drawn(data, 32, "flip_crop", **other)
        by_place = list(zip(both.values(), again.values(), strict=True))
        by_image = [(both[i], again[i]) for i in range(60)]
        for position, what in enumerate(("rows", "columns", "flips")):
            same = max(sum(a[position] == b[position] for a, b in pairs) for pairs in (by_place, by_image))
            assert same < 50, f"{what}: {same} of 60 draws are those of seed 0, epoch 0 at {other}"


def test_augmentation_draws_are_uniform():
    data = numbered(400, (1, 16, 24))
    draws = drawn(data, 400, "flip_crop").values()
    for position, values in ((0, range(-2, 3)), (1, range(-3, 4)), (2, (False, True))):
        counts = Counter(draw[position] for draw in draws)
        expected = 400 / len(values)
        chi2 = sum((counts[v] - expected) ** 2 / expected for v in values)
        assert chi2 < 30, f"draws at position {position}: {dict(counts)}, chi-square {chi2:.0f} (99.99 %: below 30)"


# Warm-up batches


@pytest.mark.parametrize("kind", ["image", "text"])
def test_dummy_batch_looks_like_a_batch(kind, tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be " * 100)
    spec = "digits" if kind == "image" else f"text:{tmp_path / 'a.txt'}"
    data = load_dataset(spec, device="cpu", dtype=torch.float64)
    state = torch.get_rng_state()
    dummy = data.dummy_batch(6)
    assert torch.equal(torch.get_rng_state(), state), "dummy_batch moved the global generator"
    for name, a, b in zip("xy", dummy, next(data.batches(6, seed=0, epoch=0)), strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device), f"{name}: {a.shape} {a.dtype}"
    assert 0 <= dummy[1].min() <= dummy[1].max() < data.classes, f"labels {dummy[1].tolist()}"
    assert torch.equal(dummy[0], data.dummy_batch(6)[0]), "the same seed made another dummy batch"


# Errors, devices


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda data: data.batches(1, seed=0, epoch=0),
            "batch_size = 1: expected a whole number, at least 2",
        ),
        (lambda data: data.batches(8.0, seed=0, epoch=0), "batch_size = 8.0"),
        (lambda data: data.steps(0), "batch_size = 0"),
        (lambda data: data.batches(8, seed=0, epoch=0, augment="flip-crop"), "did you mean flip_crop"),
        (lambda data: data.eval_batches("train", 8), "split = 'train'"),
        (lambda data: data.eval_batches("val", 0), "batch_size = 0"),
    ],
)
def test_bad_batches_are_refused_before_the_first(call, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        call(numbered(10))
    assert message in str(caught.value), f"says: {caught.value}"


def test_text_is_not_augmented(tmp_path):
    (tmp_path / "a.txt").write_text("to be or not to be " * 100)
    data = load_dataset(f"text:{tmp_path / 'a.txt'}", device="cpu")
    with pytest.raises(ValueError, match="has no images"):
        data.batches(8, seed=0, epoch=0, augment="flip")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_on_the_device_batches_are_the_same_and_nothing_waits():
    data = numbered(200, (3, 16, 16))
    there = data.to("cuda")
    expected = list(data.batches(32, seed=0, epoch=0, augment="flip_crop"))
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = list(there.batches(32, seed=0, epoch=0, augment="flip_crop"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for i, ((x, y), (a, b)) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(y.cpu(), b), f"batch {i}: other examples on the device"
        torch.testing.assert_close(x.cpu(), a)
