"""An epoch's batches: each image once, resumable at any batch, and the same for any number of processes."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.config import AugmentConfig
from pipeline.data.augmentations import MixKind, Normalize, PadMode, blend, crop_flip
from pipeline.data.batches import EvalBatches, TrainBatches, batch_bounds
from pipeline.errors import UserError
from tests.pipeline.training.builders import differences

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
SIZE = 8
STREAMS = ("permutation", "crop_flip", "mix")


def generators(seed: int) -> Callable[[str], torch.Generator]:
    return lambda name: torch.Generator().manual_seed(1000 * seed + STREAMS.index(name))


def data(n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(0, 256, (n, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return x, torch.randint(0, 10, (n,), generator=generator)


def make(n: int, batch_size: int, indices: Tensor | None = None, **options: Any) -> TrainBatches:
    x, y = data(n)
    options = {"augment": AugmentConfig(), "mean": MEAN, "std": STD, "device": "cpu", **options}
    return TrainBatches(x, y, torch.arange(n) if indices is None else indices, batch_size=batch_size, **options)


def test_bounds_cover_all_but_a_single_remainder() -> None:
    for n, batch_size in product(range(2, 80), range(2, 40)):
        bounds = batch_bounds(n, batch_size)
        covered = [i for start, stop in bounds for i in range(start, stop)]
        assert covered == list(range(n - 1 if n % batch_size == 1 else n))
        assert all(2 <= stop - start <= batch_size for start, stop in bounds)


@pytest.mark.parametrize(("n", "dropped"), [(64, 0), (70, 0), (65, 1)])
def test_each_image_once_per_epoch(n: int, dropped: int) -> None:
    subset = torch.arange(1, 2 * n, 2)  # every other image of twice as many
    batches = make(2 * n, 16, subset)
    seen = torch.cat([batch.index for batch in batches.epoch(batches.draw(None, 0.0, generators(0)))])
    assert len(seen) == n - dropped
    assert len(seen.unique()) == len(seen)
    assert set(seen.tolist()) <= set(subset.tolist())
    assert len(batches) == -(-(n - dropped) // 16)


def test_rows_are_the_augmented_images_of_their_index() -> None:
    x, y = data(50)
    batches = make(50, 16, augment=AugmentConfig(pad_mode="reflect"))
    draws = batches.draw("cutmix", 1.0, generators(1))
    normalize = Normalize(MEAN, STD)
    assert draws.crop_flip is not None
    for number, batch in enumerate(batches.epoch(draws)):
        at = slice(16 * number, 16 * number + len(batch.x))
        assert torch.equal(batch.index, draws.permutation[at])
        expected = normalize(crop_flip(x[batch.index], draws.crop_flip.take(at), pad_mode="reflect"))
        assert torch.equal(batch.x, expected)
        assert differences(batch.views, draws.crop_flip.take(at)) == []
        assert torch.equal(batch.y, y[batch.index])
        mixture = draws.mixes[number]
        assert mixture is not None
        assert batch.partner is not None
        assert torch.equal(batch.x_mixed, blend(expected, expected[mixture.partner], mixture))
        assert torch.equal(batch.y_b, batch.y[mixture.partner])
        assert torch.equal(batch.partner, mixture.partner)
        assert batch.lam == mixture.lam
        assert batch.lam.shape == ()
        assert batch.rows == slice(0, len(batch.x))
        assert batch.x.is_contiguous(memory_format=torch.channels_last)
        assert batch.x_mixed.is_contiguous(memory_format=torch.channels_last)


def test_without_augmentation_and_mixing_the_images_come_as_they_are() -> None:
    x, _ = data(20)
    batches = make(20, 8, augment=AugmentConfig(crop_flip=False), channels_last=False)
    for batch in batches.epoch(batches.draw(None, 0.0, generators(0))):
        assert torch.equal(batch.x, Normalize(MEAN, STD, channels_last=False)(x[batch.index]))
        assert batch.x_mixed is batch.x
        assert batch.y_b is batch.y
        assert batch.lam == 1
        assert batch.partner is None
        assert batch.views is None


@pytest.mark.parametrize("kind", [None, "cutmix", "mixup"])
def test_resuming_at_any_batch_gives_the_identical_rest(kind: MixKind | None) -> None:
    batches = make(70, 16)
    whole = list(batches.epoch(batches.draw(kind, 1.0, generators(2))))
    for start in range(len(batches) + 1):
        rest = list(batches.epoch(batches.draw(kind, 1.0, generators(2)), start))
        assert differences(whole[start:], rest) == []


@pytest.mark.parametrize("kind", [None, "cutmix", "mixup"])
@pytest.mark.parametrize("crop", [False, True])
def test_processes_together_hold_the_batch_of_one(kind: MixKind | None, crop: bool) -> None:
    """Bit for bit; also with slices of different lengths, and with more processes than images."""
    for n, batch_size, world_size in product((2, 3, 17, 50), (5, 16), (2, 5)):
        options: dict[str, Any] = {"augment": AugmentConfig(crop_flip=crop), "channels_last": crop}
        single = make(n, batch_size, **options)
        draws = single.draw(kind, 0.7, generators(n))
        ranks = [make(n, batch_size, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        for whole, *shares in zip(single.epoch(draws), *(rank.epoch(draws) for rank in ranks), strict=True):
            assert [share.rows.start for share in shares] == [0] + [share.rows.stop for share in shares[:-1]]
            assert shares[-1].rows.stop == whole.global_size == len(whole.x)
            lengths = [len(share.x) for share in shares]
            assert max(lengths) - min(lengths) <= 1
            for field in ("x", "x_mixed", "y", "y_b", "index", *(["partner"] if kind else [])):
                assert torch.equal(torch.cat([getattr(share, field) for share in shares]), getattr(whole, field)), field
            assert all(share.lam == whole.lam and share.global_size == whole.global_size for share in shares)


def test_switching_mixing_changes_neither_order_nor_crops() -> None:
    batches = make(40, 16)
    plain, mixed = (batches.epoch(batches.draw(kind, 1.0, generators(3))) for kind in (None, "mixup"))
    for a, b in zip(plain, mixed, strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.x, b.x)


def test_another_seed_gives_another_epoch_and_the_global_generator_is_untouched() -> None:
    before = torch.get_rng_state()
    first, again, other = (make(100, 16).draw("cutmix", 1.0, generators(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.permutation, again.permutation)
    assert differences(first.mixes, again.mixes) == []
    assert not torch.equal(first.permutation, other.permutation)
    assert differences(first.crop_flip, other.crop_flip) != []
    assert differences(first.mixes, other.mixes) != []
    assert torch.equal(before, torch.get_rng_state())


def test_only_needed_streams_are_asked_for() -> None:
    asked = []

    def record(name: str) -> torch.Generator:
        asked.append(name)
        return torch.Generator()

    make(10, 4, augment=AugmentConfig(crop_flip=False)).draw(None, 0.0, record)
    assert asked == ["permutation"]


def test_images_on_the_device_are_shared_not_copied() -> None:
    train = make(10, 4, torch.arange(8))
    val = EvalBatches(train.images, train.labels, torch.arange(8, 10), 4, MEAN, STD, "cpu")
    assert isinstance(train.images, Tensor)
    assert isinstance(val.images, Tensor)
    assert train.images.data_ptr() == val.images.data_ptr()


def test_evaluation_is_in_order_and_complete() -> None:
    x, y = data(23)
    everything = EvalBatches(x, y, None, 5, MEAN, STD, "cpu")
    assert len(everything) == len(list(everything)) == 5
    assert torch.equal(torch.cat([b for b, _ in everything]), Normalize(MEAN, STD)(x))
    assert torch.equal(torch.cat([labels for _, labels in everything]), y)
    chosen = torch.tensor([3, 7, 22])
    part = EvalBatches(x, y, chosen, 2, MEAN, STD, "cpu", channels_last=False)
    assert torch.equal(torch.cat([b for b, _ in part]), Normalize(MEAN, STD, channels_last=False)(x[chosen]))
    assert torch.equal(part.labels, y[chosen])
    assert list(EvalBatches(x, y, chosen[:0], 2, MEAN, STD, "cpu")) == []


def test_a_single_image_makes_no_batch() -> None:
    with pytest.raises(UserError, match=r"dataset\.batch_size=4 and 1 training images"):
        make(10, 4, torch.tensor([3]))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, "cutmix", "mixup"])
@pytest.mark.parametrize("pad_mode", ["zero", "reflect"])
def test_gpu_gives_the_batches_of_the_cpu_without_waiting(kind: MixKind | None, pad_mode: PadMode) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    augment = AugmentConfig(pad_mode=pad_mode)
    cpu, gpu = make(70, 16, augment=augment), make(70, 16, augment=augment, device="cuda")
    draws = cpu.draw(kind, 1.0, generators(0))
    iterator = gpu.epoch(draws)
    results = [next(iterator)]  # the epoch's transfer happens before its first batch
    torch.cuda.set_sync_debug_mode("error")
    try:
        results += list(iterator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(cpu.epoch(draws), results, strict=True):
        torch.testing.assert_close(b.x.cpu(), a.x, rtol=0, atol=1e-6)
        torch.testing.assert_close(b.x_mixed.cpu(), a.x_mixed, rtol=0, atol=1e-6)
        assert torch.equal(b.y_b.cpu(), a.y_b)
        assert torch.equal(b.index.cpu(), a.index)
