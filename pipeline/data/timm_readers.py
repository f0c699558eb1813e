"""Data sets that timm's `create_dataset` reads: folders, tar files, torchvision's, WebDataset shards, Hugging Face's.

Its readers find pictures and labels (checked with timm 1.0.31). Of each picture the square in its centre is kept
(pipeline/data/kept.py), since shards have no random access, which resumed and shuffled epochs need.
"""

import functools
import io
import logging
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.config import DatasetConfig
from pipeline.config.datasets import TIMM
from pipeline.data.kept import Blocks, Kept, Source, kept, place
from pipeline.errors import UserError
from pipeline.extras import missing
from pipeline.paths import inside, user_path
from pipeline.served.pictures import FORMATS, plain, read, square

CROP_PCT = 1.0
"""The whole shorter side: a square picture that already has the size keeps its pixels."""
AT_ONCE = 256
THREADS = 8
"""Decoding leaves Python's lock to the others."""
OWN_FOLDER = "image_folder", "folder"
IN_ARRAYS = "cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist"
"""torchvision's classes that open no pictures; they take any split that is not `train` for the test images."""
SPLITS = "train", "training", "val", "valid", "validation", "eval", "evaluation", "test"
KEYS = "jpg", "jpeg", "png", "webp"
"""Of pictures in shards."""
INFO = "_info.json", "info.json"
PROGRAMS = "pkl", "pickle", "pyd", "pth", "pt"
"""Of pickles, which WebDataset's own decoder would run."""
SAFE_DATASETS = 4
"""The first version of `datasets` that runs no script of a data set."""


class Split(NamedTuple):
    """One split of a data set as a reader of timm's has it."""

    pictures: int
    items: Callable[[], Iterable[tuple[Any, Any]]]
    """Pictures, as bytes of a file or as PIL images, with their labels."""
    classes: tuple[str, ...] | None
    called: Callable[[int], str]
    """Which picture it is, in words."""


def images(config: DatasetConfig, names: tuple[str, ...] | None) -> Kept:
    """The images of `dataset.id`, uint8 (N,3,size,size), read at their first use.

    Args:
        names: of the classes 0, 1, …; None: as the reader says, otherwise their numbers.

    Raises:
        UserError: a missing package, folder, split or shard; a damaged file; labels that are no classes.
    """
    prefix, _, name = str(config.id).partition("/")
    where = f"dataset.id={config.id}"
    _check_package(TIMM[prefix], where)
    root = user_path(config.root, "dataset.root")
    folder = root / name if prefix != "torch" and (root / name).is_dir() else root
    if prefix == "hfds" and name and folder == root:
        raise UserError(
            f"{where}: there is no folder {root / name}; fetch the data set with "
            f"`hf download {name} --repo-type dataset --local-dir {root / name}`"
        )
    if not folder.is_dir() and not (prefix == "torch" and config.download):
        raise UserError(f"{where}: dataset.root={config.root} is no folder; name the one that holds the data")
    read_by = functools.cache(lambda: _source(config, folder, names, where))
    if config.download:
        read_by()
    visible = (path for path in folder.rglob("*") if not path.relative_to(folder).as_posix().startswith("."))
    files = sorted(path for path in visible if path.is_file())
    made_of = [config.id, config.train_split, config.test_split, config.image_size, names]
    return kept(folder, files, read_by, where, variant=str(made_of))


def _check_package(package: str | None, where: str) -> None:
    if package is None:
        return
    try:
        found = version(package)
    except PackageNotFoundError:
        raise missing(where, package) from None
    if package == "datasets" and int(found.partition(".")[0]) < SAFE_DATASETS:
        raise UserError(f"{where}: datasets {found} may run scripts of data sets: pip install 'datasets>=4'")


def _source(config: DatasetConfig, folder: Path, names: tuple[str, ...] | None, where: str) -> Source:
    train, test = (_split(config, folder, split, where) for split in ("train", "test"))
    numbers: list[int] | None = None
    if train.classes and test.classes and train.classes != test.classes:
        unknown = next((name for name in test.classes if name not in train.classes), None)
        if unknown is not None:
            raise UserError(f"{where}: the test images have a class {unknown!r} that the training images lack")
        numbers = [train.classes.index(name) for name in test.classes]
    return Source(
        {
            "train": lambda: _blocks(train, config.image_size, None),
            "test": lambda: _blocks(test, config.image_size, numbers),
        },
        names or train.classes,
        (train.pictures + test.pictures) * 3 * config.image_size**2,
    )


def _split(config: DatasetConfig, folder: Path, part: str, where: str) -> Split:
    from timm.data import create_dataset

    prefix, _, name = str(config.id).partition("/")
    split = str(getattr(config, f"{part}_split"))
    where = f"{where}: dataset.{part}_split={split}"
    known, root = str(config.id), str(folder)
    own: dict[str, Any] = {}
    if prefix == "torch":
        own = {"download": config.download}
        if name.lower() not in IN_ARRAYS:
            own["loader"] = read
        elif split not in SPLITS:
            raise UserError(f"{where}: there is no such split; give one of {', '.join(SPLITS)}")
    elif prefix == "folder" and (folder / split).is_file():
        own = {"cache_tarinfo": False}  # it would be a pickle among the data
    elif prefix == "wds":
        own = {"input_key": ";".join(KEYS)}
        if not any((folder / info).is_file() for info in INFO) and not re.search(r"tar|\.\.", split):
            raise UserError(
                f"{where}: {folder} has no {INFO[0]} to list it; give its shards: 'train-{{0000..0009}}.tar'"
            )
    elif prefix == "hfds":
        known, root = f"hfds/{folder.resolve()}", str(place("datasets", folder, []))
    with _told(where):
        found = create_dataset(known, root=root, split=split, input_img_mode="", trust_remote_code=False, **own)
    reader = getattr(found, "reader", None)
    if prefix == "folder" or name.lower() in OWN_FOLDER:
        held = Path((reader or found).root)
        if held == folder:
            raise UserError(f"{where}: there is no such folder in {folder}, nor one of a like name")
        if held.is_file():
            with _told(where):
                _pictures(held, where)
    count = _shards(reader, folder, where) if prefix == "wds" else len(found)
    if not count:
        raise UserError(f"{where}: it has no pictures")
    if prefix == "wds":
        return Split(count, lambda: _strict(reader), None, lambda i: f"{where}: picture {i}")
    if reader is None:
        told = getattr(found, "classes", None) or found.all_categories
        classes = tuple(one if isinstance(one, str) else ", ".join(one) for one in told)
        return Split(count, lambda: (found[i] for i in range(count)), classes, lambda i: f"{where}: picture {i}")
    numbered: dict[str, int] = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", {})
    classes = tuple(sorted(numbered, key=lambda one: numbered[one]))
    if "" in classes:
        raise UserError(f"{where}: pictures lie beside the folders of classes; move them into one")
    return Split(
        count,
        lambda: (_file(*reader[i]) for i in range(count)),
        classes or None,
        lambda i: f"{where}: {reader.filename(i) or f'picture {i}'}",
    )


@contextmanager
def _told(where: str | Callable[[], str]) -> Iterator[None]:
    """Any error of a reader's as one line: each has its own, and none says which are the data's fault."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{where if isinstance(where, str) else where()}: {reason}") from error


def _file(file: Any, label: Any) -> tuple[bytes, Any]:
    with file:
        return file.read(), label


def _blocks(split: Split, size: int, numbers: list[int] | None) -> Blocks:
    """Images and labels in the reader's order; `numbers`: of its classes, in training."""
    done, items = 0, iter(split.items())

    def image(at: int, picture: Any) -> NDArray[np.uint8]:
        with _told(lambda: split.called(at)):
            whole = read(io.BytesIO(picture)) if isinstance(picture, bytes) else plain(picture)
            return np.asarray(square(whole, size, CROP_PCT), dtype=np.uint8).transpose(2, 0, 1)

    def number(at: int, label: Any) -> int:
        known = len(split.classes or ())
        if not isinstance(label, int | np.integer) or label < 0 or (known and label >= known):
            last = f" to {known - 1}" if known else ""
            raise UserError(f"{split.called(at)} has label {label!r}; labels must be whole numbers from 0{last}")
        return int(label) if numbers is None else numbers[label]

    with ThreadPoolExecutor(THREADS) as pool:
        while block := _next(split, items, done):
            at = range(done, done + len(block))
            pictures, labels = zip(*block, strict=True)
            made = np.stack(list(pool.map(image, at, pictures)))
            yield made, np.array(list(map(number, at, labels)), dtype=np.int64)
            done += len(block)
    if done != split.pictures:
        raise UserError(f"{split.called(done)}: {done} of {split.pictures} pictures could be read")


def _next(split: Split, items: Iterator[tuple[Any, Any]], done: int) -> list[tuple[Any, Any]]:
    with _told(lambda: f"{split.called(done)}, or soon after it"):
        return list(islice(items, AT_ONCE))


# shards --------------------------------------------------------------------------------------------------------------


def _shards(reader: Any, folder: Path, where: str) -> int:
    """The number of pictures in a split's shards. Raises UserError: shards or pictures are missing, or damaged."""
    shards = [inside(folder, name) for name in reader.split_info.filenames]
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise UserError(f"{where}: {missing[0]} is not there ({len(missing)} of {len(shards)} shards are missing)")
    count = 0
    for shard in shards:
        with _told(f"{where}: {shard}"):
            count += _pictures(shard, f"{where}: {shard}")
    if reader.num_samples and reader.num_samples != count:
        raise UserError(
            f"{where}: the shards hold {count} pictures, {reader.num_samples} are announced; copy them again"
        )
    return count


def _pictures(file: Path, where: str) -> int:
    """The number of pictures in a tar file, of which names and headers are read.

    timm opens what Pillow can, PostScript too, and takes a damaged header for the end of the file.
    """
    from PIL import Image

    count = 0
    with tarfile.open(file) as tar:
        for member in tar:
            stem, _, key = PurePosixPath(member.name).name.lower().partition(".")
            if key.rpartition(".")[2] in PROGRAMS:
                raise UserError(f"{where}: {member.name} may hold a program; take it out")
            if member.isfile() and stem and key.rpartition(".")[2] in KEYS:
                with _told(f"{where}: {member.name}"), Image.open(tar.extractfile(member) or "", formats=FORMATS):
                    count += key in KEYS
        assert tar.fileobj is not None
        tar.fileobj.seek(tar.offset)
        if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(f"{where}: it is cut or damaged at byte {tar.offset}; copy it again")
    return count


class _Refusing(logging.Filter):
    """Raises what the reader of shards only warns of: that it leaves something out."""

    first: str | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        # raised through several generators, each of which warns again
        self.first = self.first or record.getMessage()
        raise ValueError(self.first)


def _strict(reader: Any) -> Iterator[tuple[Any, Any]]:
    reader.dist_rank, reader.dist_num_replicas = 0, 1  # one process reads for all of a machine
    refusing, log = _Refusing(), logging.getLogger("timm.data.readers.reader_wds")
    log.addFilter(refusing)
    try:
        yield from reader
    except Exception as error:
        raise ValueError(refusing.first or str(error)) from error
    finally:
        log.removeFilter(refusing)
