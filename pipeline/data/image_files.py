"""Images that stay files, in the layout of torchvision's ImageFolder (ImageNet's): decoded, cropped and flipped by
worker processes, with torchvision's v2 transforms, some batches ahead of the training.

Images that are not resident are augmented by seed: each image of an epoch has its own, so that its crop depends
neither on its batch nor on the worker that makes it.
"""

import atexit
import functools
import hashlib
import logging
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from pipeline.data.kept import place
from pipeline.errors import UserError
from pipeline.files import write_atomically
from pipeline.served.picture_files import find, folders, told
from pipeline.served.pictures import Refused, read, square

logger = logging.getLogger("asib")
CROP_PCT = 0.875
"""Share of the shorter side that evaluation's centre crop shows: 224 of 256 (He et al. 2016)."""
AT_ONCE = 64
"""Images that evaluation requests at once, at most: prefetched ones lie in shared memory, which may be scarce."""
MOST_WORKERS = 8
MORE_ROOM = "give fewer workers, or more memory (in containers: shared memory, docker run --shm-size=8g)"
GRACE_S = 30
"""How long a worker continues after SIGTERM."""
HASHED_AT_A_TIME = 8


class Wanted(NamedTuple):
    """Some images of a data set in one view each."""

    indices: NDArray[np.int64]
    """Shape (n,)."""
    seeds: NDArray[np.int64] | None = None
    """(n,): each image's seed, for its crop, flip and RandAugment; None: the centre of each image."""
    crop_flip: bool = True
    """RandomResizedCrop and mirroring; without it, seeds serve RandAugment alone."""
    randaugment: bool = False


class ImageFiles:
    """The images of one split, square and upright: what a uint8 tensor (N,3,size,size) would hold, but on disk.

    Args:
        paths: of the images, N.
        size: pixels of a side.
        workers: processes that decode; 0: this process does. None: one for each of torch's threads, at most eight.
        key: opens messages about an image that cannot be read.
    """

    device = torch.device("cpu")

    def __init__(self, paths: Sequence[str], size: int, workers: int | None, key: str) -> None:
        self.shape = torch.Size((len(paths), 3, size, size))
        self.paths = paths
        self.workers = workers
        self._said = f"dataset.workers={'null' if workers is None else workers}"
        self._decoder = _Decoder(paths, size, key, self._said)
        self._asked = _Asked()
        self._loader: DataLoader[Tensor | str] | None = None
        self._copying: Any = None
        """The CUDA stream of the copies: only one, since freed memory is reused on the stream that allocated it."""

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """The centres of some images, decoded here: uint8 (n,3,size,size)."""
        return _checked(self._decoder[Wanted(torch.arange(len(self))[index].numpy())])

    def to(self, device: torch.device | str) -> "ImageFiles":
        """Return itself: files have no device."""
        return self

    def views(self, wanted: Iterable[Wanted], device: torch.device) -> Iterator[Tensor]:
        """For each of `wanted` its images, uint8 (n,3,size,size) on the device.

        Only one request at a time: a new one ends the one before. Copies to a GPU overlap with its work.

        Raises:
            UserError: an image cannot be read, a worker was killed.
        """
        self._asked.now = wanted
        if self._loader is None:
            self._loader = self._made(device)
        made = map(_checked, self._watched(self._loader))
        if device.type == "cpu":
            return made
        if self._copying is None:
            self._copying = torch.cuda.Stream(device)
        return _copied(made, device, self._copying)

    def _made(self, device: torch.device) -> "DataLoader[Tensor | str]":
        workers = min(torch.get_num_threads(), MOST_WORKERS) if self.workers is None else self.workers
        _transform(int(self.shape[-1]), False, False)  # imports what the workers need, before they are forked
        _open.add(self)
        _close_at_exit()
        return DataLoader(
            self._decoder,
            batch_size=None,
            sampler=self._asked,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # it draws seeds that nobody uses; keep them out of the run's stream
        )

    def close(self) -> None:
        """End the workers; the next request starts new ones."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            # private API, checked with torch 2.14.1; also where a suspended generator still holds the iterator
            iterator._shutdown_workers()
        self._loader = None

    def _watched(self, loader: "DataLoader[Tensor | str]") -> Iterator[Tensor | str]:
        try:
            answer = signal.getsignal(signal.SIGCHLD)
            held = signal.pthread_sigmask(signal.SIG_BLOCK, _TO_ALL)
            try:
                made = iter(loader)  # forked with these blocked: no signal ends a worker before it has begun
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
            if threading.current_thread() is threading.main_thread():
                # torch's handler would raise for a dead worker anywhere in this process; `next` raises too, but here
                signal.signal(signal.SIGCHLD, answer)
            yield from made
        except (RuntimeError, OSError, MemoryError) as error:
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            self.close()
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(" .")
            raise UserError(f"{self._said}: {reason}; {MORE_ROOM}") from error


_open: "weakref.WeakSet[ImageFiles]" = weakref.WeakSet()
"""Image files that may have workers."""


@functools.cache
def _close_at_exit() -> None:
    """End all workers before multiprocessing's own exit, which would wait for workers that nobody has stopped."""

    @atexit.register
    def close_all() -> None:
        for files in list(_open):
            files.close()


Images = Tensor | ImageFiles
"""uint8 (N,C,H,W), in memory or on disk."""


class _Asked(Sampler[Wanted]):
    """What the loader is to make next; set for each epoch, while the workers stay."""

    now: Iterable[Wanted] = ()

    def __iter__(self) -> Iterator[Wanted]:
        return iter(self.now)


class _Decoder(Dataset[Tensor | str]):
    """What runs in the workers: `Wanted` → uint8 (n,3,size,size), or a message about an image that cannot be read."""

    def __init__(self, paths: Sequence[str], size: int, key: str, workers: str) -> None:
        # one buffer: counting references to strings would make workers copy the pages shared with the parent
        self._paths = np.array([os.fsencode(path) for path in paths], dtype=np.bytes_)
        self._size, self._key, self._workers = size, key, workers

    def __getitem__(self, wanted: Wanted) -> Tensor | str:
        made = torch.empty((len(wanted.indices), 3, self._size, self._size), dtype=torch.uint8)
        drawn = wanted.seeds is not None
        seeds = [None] * len(made) if wanted.seeds is None else wanted.seeds.tolist()
        transform = _transform(self._size, drawn and wanted.crop_flip, drawn and wanted.randaugment)
        with torch.random.fork_rng(devices=[]):
            for row, (index, seed) in enumerate(zip(wanted.indices.tolist(), seeds, strict=True)):
                path = os.fsdecode(self._paths[index])
                try:
                    picture = read(path)
                except (Refused, OSError) as error:
                    reason = " ".join(str(error).split()) or type(error).__name__
                    return f"{self._key}: {path} cannot be read ({reason}); replace or remove it"
                if seed is not None:
                    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs as well
                made[row] = transform(picture)
        return made if get_worker_info() is None else self._shared(made)

    def _shared(self, made: Tensor) -> Tensor | str:
        """The images in shared memory; moved here, because the thread that sends them could only print a failure."""
        try:
            return made.share_memory_()
        except RuntimeError as error:
            return (
                f"{self._workers}: {made.numel() / 1e6:.1f} MB of images do not fit into shared memory "
                f"({str(error).rpartition(': ')[2]}); {MORE_ROOM}"
            )


@functools.lru_cache(maxsize=8)
def _transform(size: int, crop_flip: bool, randaugment: bool) -> Callable[[Any], Tensor]:
    """PIL image → uint8 (3,size,size): ImageNet's usual training crop (8 to 100 % of the area), or the centre."""
    from torchvision.transforms import InterpolationMode, v2

    bicubic = InterpolationMode.BICUBIC
    steps: list[Any] = (
        [v2.RandomResizedCrop(size, interpolation=bicubic), v2.RandomHorizontalFlip()]
        if crop_flip
        else [functools.partial(square, size=size, crop_pct=CROP_PCT)]
    )
    if randaugment:
        steps.append(v2.RandAugment())
    made: Callable[[Any], Tensor] = v2.Compose([*steps, v2.PILToTensor()])
    return made


_TO_ALL = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
"""What a terminal or a scheduler sends to all processes of a job."""


def _begin_worker(index: int) -> None:
    """Leave signals to a whole job to the training process: it still needs its workers for a last batch.

    SIGTERM ends a worker all the same, some seconds later: that is how one that hangs is stopped.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_S))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_ALL)
    # What cannot be sent would otherwise be printed and dropped, and the training would wait for it forever.
    # Private API of multiprocessing, checked with Python 3.11.
    Queue._on_queue_feeder_error = staticmethod(_leave)  # type: ignore[attr-defined]


def _leave(error: BaseException, item: object) -> None:
    """Exit at once: the training process notices within seconds that this worker is gone."""
    os._exit(1)


def _checked(made: Tensor | str) -> Tensor:
    if isinstance(made, str):
        raise UserError(made)
    return made


def _copied(made: Iterator[Tensor], device: torch.device, stream: Any) -> Iterator[Tensor]:
    """Each tensor on the GPU, copied on a stream of its own: while the GPU still works on the one before."""
    for source in made:
        with torch.cuda.stream(stream):
            here = source.to(device, non_blocking=True)
        working = torch.cuda.current_stream(device)
        working.wait_stream(stream)
        here.record_stream(working)  # its memory may be used again only when the work on it is done
        yield here


# the layout ----------------------------------------------------------------------------------------------------------


class Folder(NamedTuple):
    """A data set of files: paths and labels of both splits, the names of the classes, and the data's digest."""

    train: list[str]
    y_train: NDArray[np.int64]
    test: list[str]
    y_test: NDArray[np.int64]
    classes: tuple[str, ...]
    digest: str


def scan(root: Path, key: str, only: Sequence[str] | None = None) -> Folder:
    """The files below train/<class>/ and test/<class>/ (val/ where there is no test/), of all classes or `only` some.

    Raises:
        UserError: no such folders, a class without images or without a folder, one of the test split that training
            lacks.
    """
    held_out = root / ("test" if (root / "test").is_dir() else "val")
    if held_out.name == "test" and (root / "val").is_dir():
        logger.info("%s: val/ is not used: validation images are held out of train/ (dataset.val_fraction)", key)
    ignored: list[str] = []
    train, test = (_read_split(folder, key, ignored, only) for folder in (root / "train", held_out))
    if ignored:
        logger.info("%s: %s", key, told(ignored, root))
    number = {name: k for k, name in enumerate(train)}
    unknown = [name for name in test if name not in number]
    if unknown:
        raise UserError(f"{key}: {held_out.name}/ has a class {unknown[0]} that train/ lacks; they must have the same")
    if len(number) < 2:
        raise UserError(f"{key}: train/ holds one class only; at least two are needed")
    train_paths, test_paths = ([path for paths in split.values() for path in paths] for split in (train, test))
    y_train, y_test = (
        np.array([number[name] for name, paths in split.items() for _ in paths], dtype=np.int64)
        for split in (train, test)
    )
    try:
        digest = _digest(root, [*train_paths, *test_paths])
    except OSError as error:  # a dangling link, a file without read permission
        raise UserError(f"{key}: {error.filename}: {error.strerror}; repair or remove it") from error
    return Folder(train_paths, y_train, test_paths, y_test, tuple(train), digest)


def _read_split(folder: Path, key: str, ignored: list[str], only: Sequence[str] | None) -> dict[str, list[str]]:
    """The images of each class, in the order of torchvision's ImageFolder; what is skipped is added to `ignored`."""
    try:
        classes, skipped = folders(folder)
        if only is not None:
            lacking = [name for name in only if name not in classes]
            if lacking:
                raise UserError(
                    f"{key}: {folder.name}/ has no folder {lacking[0]}, a class of the list "
                    f"({len(lacking)} of {len(only)} are missing)"
                )
            classes, skipped = sorted(only), []
        found = [find(folder / name) for name in classes]
    except OSError as error:
        raise UserError(f"{key}: {error.filename}: {error.strerror}") from error
    foreign = [name for name in classes if name.encode(errors="replace").decode() != name]
    if foreign:
        shown = os.fsencode(foreign[0]).decode(errors="backslashreplace")
        raise UserError(f"{key}: {folder.name}/{shown} is not UTF-8, and cannot be the name of a class; rename it")
    needed = f"each class needs a folder with images below {folder}"
    if not classes:
        raise UserError(f"{key}: Couldn't find any class folder in {folder}; {needed}")
    empty = [name for name, pictures in zip(classes, found, strict=True) if not pictures.files]
    if empty:
        raise UserError(f"{key}: Found no valid file for the classes {', '.join(empty)}; {needed}")
    ignored += [*skipped, *(path for pictures in found for path in pictures.ignored)]
    return {name: pictures.files for name, pictures in zip(classes, found, strict=True)}


def _digest(root: Path, paths: Sequence[str]) -> str:
    """SHA-256 (hex) over the files' names below `root` and their contents.

    Reading all of a large data set takes a while: what was hashed is remembered by the files' sizes and times of
    change, in the user's cache folder.
    """
    names = [Path(path).relative_to(root).as_posix() for path in paths]
    cache = place("digests", root, paths)
    with suppress(OSError, ValueError):  # an unreadable one is rebuilt
        if len(text := cache.read_text()) == 64:
            return text
    logger.info("%s: hashing %d files, once", root, len(paths))
    whole = hashlib.sha256()
    with ThreadPoolExecutor(HASHED_AT_A_TIME) as pool:
        for name, content in zip(names, pool.map(_hash, paths), strict=True):
            whole.update(os.fsencode(name) + b"\0" + content)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, whole.hexdigest(), "XDG_CACHE_HOME")
    except (OSError, UserError) as error:
        logger.info("%s; the files will be hashed again", error)
    return whole.hexdigest()


def _hash(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
