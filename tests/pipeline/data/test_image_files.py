"""Images in folders: what workers make is what torchvision makes one by one, whatever their number and the batch."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from pipeline.config import AugmentConfig, DatasetConfig
from pipeline.data.batches import EvalBatches, TrainBatches
from pipeline.data.image_files import ImageFiles
from pipeline.data.sources import load
from pipeline.errors import UserError
from pipeline.served.pictures import decode

SIZE = 16
CLASSES = ("ash", "birch", "cedar")
TRAIN, HELD_OUT = 7, 4
"""Images of each class."""
NORMAL: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}
"""Leaves pixels as they are."""


def picture(seed: int) -> Image.Image:
    """A smooth one of odd shape, so that resizing and cropping are not trivial."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    return coarse.resize((20 + seed % 17, 19 + seed % 11), Image.Resampling.BICUBIC)


def write(root: Path, held_out: str = "val", classes: tuple[str, ...] = CLASSES) -> Path:
    for split, count, first in (("train", TRAIN, 0), (held_out, HELD_OUT, 1000)):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                kind = "png" if i % 2 else "jpg"
                picture(first + 100 * k + i).save(root / split / name / f"{i}.{kind}")
    return root


@pytest.fixture(autouse=True)
def cache(cache_home: Path) -> Path:
    return cache_home / "digests"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "pictures")


def config(root: Path, **changes: Any) -> DatasetConfig:
    return DatasetConfig(name="image_folder", root=str(root), image_size=SIZE, **changes)


def batches(root: Path, workers: int, **changes: Any) -> TrainBatches:
    data = load(config(root, workers=workers))
    options: dict[str, Any] = {"augment": AugmentConfig(), "device": "cpu", "batch_size": 5, **NORMAL}
    return TrainBatches(data.train_x, data.train_y, torch.arange(len(data.train_y)), **options | changes)


def generators(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(len(name))


def one_by_one(paths: list[str], seeds: Tensor | None, randaugment: bool = False) -> Tensor:
    """The slow reference: torchvision's transforms, image by image."""
    bicubic = InterpolationMode.BICUBIC
    centre = [v2.Resize(round(SIZE / 0.875), interpolation=bicubic), v2.CenterCrop(SIZE)]
    random = [v2.RandomResizedCrop(SIZE, interpolation=bicubic), v2.RandomHorizontalFlip()]
    transform = v2.Compose([*(centre if seeds is None else random), *([v2.RandAugment()] if randaugment else [])])
    made = []
    for k, path in enumerate(paths):
        if seeds is not None:
            torch.manual_seed(int(seeds[k]))
        made.append(v2.functional.pil_to_tensor(transform(Image.open(path).convert("RGB"))))
    return torch.stack(made)


def train_paths(root: Path) -> list[str]:
    return [str(path) for name in CLASSES for path in sorted((root / "train" / name).iterdir())]


def test_a_folder_is_a_data_set(root: Path) -> None:
    data = load(config(root))
    assert (data.num_classes, data.image_size, data.in_chans, data.classes) == (3, SIZE, 3, CLASSES)
    assert data.train_y.tolist() == [k for k in range(3) for _ in range(TRAIN)]
    assert data.test_y.tolist() == [k for k in range(3) for _ in range(HELD_OUT)]
    assert data.mean == (0.485, 0.456, 0.406)
    assert torch.equal(data.train_x[torch.tensor([20, 3])], one_by_one([train_paths(root)[i] for i in (20, 3)], None))
    assert data.test_x[:2].shape == (2, 3, SIZE, SIZE)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("randaugment", [False, True])
def test_batches_are_torchvisions_images(root: Path, workers: int, randaugment: bool) -> None:
    made = batches(root, workers, augment=AugmentConfig(randaugment=randaugment))
    draws = made.draw("cutmix", 1.0, generators)
    before = torch.random.get_rng_state()
    seen = list(made.epoch(draws))
    assert torch.equal(torch.random.get_rng_state(), before), "drawn by seed alone"
    assert draws.seeds is not None
    order = draws.permutation[: made.bounds[-1][1]].tolist()  # one image alone sits out
    reference = one_by_one([train_paths(root)[i] for i in order], draws.seeds[0, : len(order)], randaugment)
    assert torch.equal(torch.cat([b.x for b in seen]).round().to(torch.uint8), reference)
    assert torch.cat([b.y for b in seen]).tolist() == [i // TRAIN for i in order]
    assert len(draws.seeds[0].unique()) == 3 * TRAIN
    for batch, mix in zip(seen, draws.mixes, strict=True):
        assert mix is not None
        assert mix.box is not None
        assert batch.partner is not None
        top, left, bottom, right = mix.box
        mixed = batch.x.clone()
        mixed[:, :, top:bottom, left:right] = batch.x[mix.partner][:, :, top:bottom, left:right]
        assert torch.equal(batch.x_mixed, mixed)


def test_an_epoch_goes_on_at_any_batch_and_another_may_begin(root: Path) -> None:
    made = batches(root, workers=2)
    draws = made.draw(None, 0, generators, two_views=True)
    whole = list(made.epoch(draws))
    dropped = made.epoch(draws)
    next(dropped)
    dropped.close()  # type: ignore[attr-defined]
    rest = list(made.epoch(draws, start=2))
    assert len(rest) == len(whole) - 2
    for ours, theirs in zip(rest, whole[2:], strict=True):
        assert torch.equal(ours.x, theirs.x)
        assert ours.x_second is not None
        assert theirs.x_second is not None
        assert torch.equal(ours.x_second, theirs.x_second)
        assert not torch.equal(ours.x, ours.x_second)


def test_several_processes_make_the_batch_of_one(root: Path) -> None:
    alone = batches(root, workers=0)
    draws = alone.draw("mixup", 0.4, generators)
    ranks = [batches(root, workers=0, rank=rank, world_size=2) for rank in (0, 1)]
    parts = [list(rank.epoch(draws)) for rank in ranks]
    for whole, *mine in zip(alone.epoch(draws), *parts, strict=True):
        for name in ("x", "x_mixed", "y", "y_b"):
            assert torch.equal(torch.cat([getattr(part, name) for part in mine]), getattr(whole, name))


def test_evaluation_sees_centres_in_order_while_training_uses_the_same_files(root: Path) -> None:
    data = load(config(root, workers=2))
    chosen = torch.tensor([20, 0, 7, 3])
    ordered = EvalBatches(data.train_x, data.train_y, chosen, 3, device="cpu", **NORMAL)
    reference = one_by_one([train_paths(root)[i] for i in chosen.tolist()], None)
    for _ in range(2):
        seen = list(ordered)
        assert torch.equal(torch.cat([x for x, _ in seen]).round().to(torch.uint8), reference)
        assert torch.cat([y for _, y in seen]).tolist() == [2, 0, 1, 0]
    assert list(EvalBatches(data.train_x, data.train_y, chosen[:0], 3, device="cpu", **NORMAL)) == []


def test_a_served_student_sees_what_was_evaluated(root: Path) -> None:
    data = load(config(root))
    for k in range(HELD_OUT):
        path = sorted((root / "val" / "ash").iterdir())[k]
        served = decode(path.read_bytes(), SIZE, 3, data.crop_pct)
        assert np.array_equal(served, data.test_x[k : k + 1][0].permute(1, 2, 0).numpy())


def test_the_digest_is_of_the_contents(root: Path, tmp_path: Path, cache: Path) -> None:
    first = load(config(root)).digest
    paths = sorted(p for p in root.rglob("*") if p.is_file())
    expected = hashlib.sha256()
    for split in ("train", "val"):
        for path in (p for p in paths if p.is_relative_to(root / split)):
            expected.update(
                path.relative_to(root).as_posix().encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest()
            )
    assert first == expected.hexdigest()
    assert [p.read_text() for p in cache.iterdir()] == [first]
    moved = root.rename(tmp_path / "elsewhere")
    assert load(config(moved)).digest == first
    changed = moved / paths[0].relative_to(root)
    changed.write_bytes(changed.read_bytes()[:-1] + b"\0")
    assert load(config(moved)).digest != first


def test_what_is_hidden_is_no_image_and_no_class(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    clean = load(config(root))
    for split in ("train", "val"):
        for place in (root / split / ".ipynb_checkpoints", root / split / "ash" / ".ipynb_checkpoints"):
            place.mkdir()
            picture(7).save(place / "0-checkpoint.png")
        (root / split / "__MACOSX").mkdir()
        (root / split / "ash" / "._0.png").write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X")
        (root / split / "ash" / ".DS_Store").write_bytes(b"")
    with caplog.at_level("INFO", "asib"):
        found = load(config(root))
    assert (found.classes, found.digest, len(found.train_x)) == (clean.classes, clean.digest, 3 * TRAIN)
    (line,) = [text for record in caplog.records if "ignored" in (text := record.getMessage())]
    assert line.startswith(f"dataset.root={root}: 8 ignored: hidden files and folders")


def test_a_link_that_leads_round_is_followed_once(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clean = load(config(root)).digest
    (root / "train/ash/round").symlink_to(root / "train/ash")
    (root / "train/ash/up").symlink_to(tmp_path)
    (root / "val/self").symlink_to(".")
    (root / "train/birch/self.png").symlink_to("self.png")
    (root / "train/birch/folder.png").mkdir()
    os.mkfifo(root / "train/birch/pipe.png")
    with pytest.raises(UserError, match=r"train/birch/self\.png: Too many levels of symbolic links"):
        load(config(root))
    (root / "train/birch/self.png").unlink()
    with caplog.at_level("INFO", "asib"):
        assert load(config(root)).digest == clean
    assert "4 ignored" in caplog.text
    (root / "elsewhere").mkdir()
    picture(3).save(root / "elsewhere/new.png")
    (root / "train/birch/more").symlink_to(root / "elsewhere")
    assert len(load(config(root)).train_x) == 3 * TRAIN + 1, "a link that leads elsewhere"


def test_names_that_are_not_utf8(root: Path) -> None:
    (root / "train/ash/0.jpg").rename(os.fsdecode(os.fsencode(root / "train/ash/") + b"/caf\xe9.jpg"))
    assert len(load(config(root)).train_x) == 3 * TRAIN
    os.mkdir(os.fsencode(root / "train") + b"/caf\xe9")
    with pytest.raises(UserError, match=r"train/caf\\xe9 is not UTF-8"):
        load(config(root))


def test_without_a_cache_folder_it_works(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load(config(root)).digest) == 64


def test_test_goes_before_val_and_classes_go_by_name(tmp_path: Path) -> None:
    root = write(tmp_path / "pictures", held_out="test")
    for path in (root / "test" / "ash").iterdir():
        path.unlink()
    (root / "test" / "ash").rmdir()
    data = load(config(root))
    assert sorted(set(data.test_y.tolist())) == [1, 2]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        ("no train", "train/ is not there"),
        ("no val", "val/ or test/ is not there"),
        ("empty class", "Found no valid file for the classes birch"),
        ("unknown class", "val/ has a class zelkova that train/ lacks"),
        ("one class", "train/ holds one class only"),
    ],
)
def test_what_is_no_data_set_is_said_in_one_line(tmp_path: Path, harm: str, words: str) -> None:
    root = write(tmp_path / "pictures", classes=CLASSES[:1] if harm == "one class" else CLASSES)
    if harm.startswith("no "):
        (root / harm.removeprefix("no ")).rename(tmp_path / "away")
    elif harm == "empty class":
        for path in (root / "train" / "birch").iterdir():
            path.unlink()
    elif harm == "unknown class":
        (root / "val" / "birch").rename(root / "val" / "zelkova")
    with pytest.raises(UserError, match=words) as caught:
        load(config(root))
    assert "\n" not in str(caught.value)
    assert f"dataset.root={root}" in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_picture_is_named(root: Path, workers: int) -> None:
    made = batches(root, workers)
    damaged = Path(train_paths(root)[4])
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(UserError, match=r"train/ash/4\.jpg cannot be read") as caught:
        list(made.epoch(made.draw(None, 0, generators)))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_workers_leave_signals_to_the_training_and_a_killed_one_is_said(root: Path) -> None:
    made = batches(root, workers=2, batch_size=2)
    draws = made.draw(None, 0, generators)
    assert isinstance(made.images, ImageFiles)
    seen = made.epoch(draws)
    next(seen)
    assert made.images._loader is not None
    workers = made.images._loader._iterator._workers  # type: ignore[union-attr]
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)
    assert len(list(seen)) == len(made) - 1
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"dataset\.workers=2: DataLoader worker"):
        list(made.epoch(draws))
    assert len(list(made.epoch(draws))) == len(made), "new workers"


@pytest.mark.slow
def test_a_worker_outlives_signals_that_come_before_it_has_begun(root: Path) -> None:
    made = batches(root, workers=2, batch_size=2)
    forking = [True]

    def end_at_once() -> None:
        if forking:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                os.kill(os.getpid(), number)

    os.register_at_fork(after_in_child=end_at_once)
    try:
        assert len(list(made.epoch(made.draw(None, 0, generators)))) == len(made)
    finally:
        forking.clear()


PROGRAM = """
import sys, torch
from pipeline.config import DatasetConfig
from pipeline.data.batches import EvalBatches
from pipeline.data.sources import load
data = load(DatasetConfig(name="image_folder", root=sys.argv[1], image_size=16, workers=2))
batches = EvalBatches(data.train_x, data.train_y, None, 5, data.mean, data.std, "cpu")
seen = iter(batches)
next(seen)
raise ValueError("left in the middle")
"""


@pytest.mark.slow
def test_a_process_ends_though_nobody_let_its_workers_go(root: Path) -> None:
    here = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", PROGRAM, str(root)]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=25, check=False)
    assert done.returncode == 1
    assert "left in the middle" in done.stderr


SMALL = """
import sys, time, torch
from pipeline.config import DatasetConfig
from pipeline.data.batches import EvalBatches
from pipeline.data.sources import load
from pipeline.errors import UserError
from torchvision.transforms import v2
data = load(DatasetConfig(name="image_folder", root=sys.argv[1], image_size=1024, workers=2))
began = time.monotonic()
try:
    for _ in EvalBatches(data.train_x, data.train_y, None, 8, data.mean, data.std, "cpu"): pass
except UserError as error:
    print(f"{time.monotonic() - began:.0f} {error}")
"""


@pytest.mark.slow
def test_too_little_shared_memory_is_said_within_half_a_minute(root: Path) -> None:
    """It was printed by a thread of the worker, which then had nothing to send: the training waited for ever."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a small /dev/shm")
    # the pictures may lie in /dev/shm themselves
    small = 'mount --bind "$0" /mnt && mount -t tmpfs -o size=4m tmpfs /dev/shm && exec "$@"'
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", small, str(root), sys.executable, "-c", SMALL, "/mnt"],
        capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    seconds, _, line = done.stdout.strip().partition(" ")
    assert line.startswith("dataset.workers=2: "), done.stderr
    assert "No space left on device" in line
    assert "--shm-size" in line
    assert int(seconds) < 30
    assert done.stderr == ""
