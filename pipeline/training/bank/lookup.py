"""The teacher bank in training: frozen teachers' outputs for a run's batches, looked up instead of computed again.

Several batches are looked up together when the first of them asks; outputs that no run has needed yet are computed by
the teachers in one large batch. Within such a window nothing waits for the device.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.features import FeatureNet
from pipeline.data.batches import Batch, EpochDraws, Seen, TrainBatches
from pipeline.data.sources import ImageData
from pipeline.data.views import Views
from pipeline.errors import Interrupted
from pipeline.training import distributed
from pipeline.training.bank.cache import BankCache
from pipeline.training.bank.store import Bank, NoBank
from pipeline.training.costs import Costs

logger = logging.getLogger("asib")
WINDOW = 512
"""Images that are looked up together; between windows a run can be interrupted."""
Cells = NDArray[np.int64]


@dataclass
class Counts:
    """Images times teachers: `served` from the bank, `computed` because the bank lacked them."""

    served: int = 0
    computed: int = 0


@dataclass
class BankedTeachers:
    """Frozen teachers and their banks, one for each precision that is requested.

    Args:
        cache: where the banks are.
        data: the data that `train` is made from.
        train: the run's training images.
        teachers: in eval mode, frozen.
        hashes: of their weights.
        costs: counts what a method asks for, no matter who computed it.
    """

    cache: BankCache
    data: ImageData
    train: TrainBatches
    teachers: Sequence[FeatureNet]
    hashes: Sequence[str]
    costs: Costs = field(default_factory=lambda: Costs({}))
    epoch: Counts = field(default_factory=Counts)
    """Counts since the last call of `metrics`."""
    total: Counts = field(default_factory=Counts)
    _banks: dict[str, Sequence[Bank | NoBank]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.views = Views.of(self.train.augment)
        self._indices = self.train.indices.cpu()

    def begin(self) -> None:
        """Open the banks now. Raises OSError where the folder cannot be used."""
        computed = precision(self.train.device)
        self._banks[computed] = self._open(computed)

    def close(self) -> None:
        """Close the banks."""
        for banks in self._banks.values():
            for bank in banks:
                bank.close()
        self._banks = {}

    def metrics(self) -> dict[str, float]:
        """`bank/served` and `bank/computed`: images times teachers since the last call, over all processes."""
        counts = torch.tensor([self.epoch.served, self.epoch.computed], dtype=torch.float64, device=self.train.device)
        self.epoch = Counts()
        return dict(zip(("bank/served", "bank/computed"), distributed.total(counts).tolist(), strict=True))

    # batches ---------------------------------------------------------------------------------------------------------

    def complete(self, batches: Iterator[Batch], draws: EpochDraws, start: int) -> Iterator[Batch]:
        """The batches of an epoch from batch `start` on, each with what the bank has for it."""
        first, second = (self._cells_of(draws, view) for view in (draws.crop_flip, draws.second))
        step = max(1, WINDOW // self.train.batch_size)
        for at in range(start, len(self.train.bounds), step):
            bounds = self.train.bounds[at : at + step]
            own = [self.train.slice_of(stop - begin) for begin, stop in bounds]
            mine = [slice(begin + s.start, begin + s.stop) for (begin, _), s in zip(bounds, own, strict=True)]
            windows = [_Window(self, np.concatenate([cells[s] for s in mine])) for cells in (first, second)]
            done = 0
            for batch in islice(batches, len(bounds)):
                rows = slice(done, done + len(batch.y))
                known, other = (partial(window.rows, rows) for window in windows)
                yield batch._replace(known=known, known_second=None if batch.x_second is None else other)
                done = rows.stop

    def _cells_of(self, draws: EpochDraws, view: Any) -> Cells:
        """The cell of each position of an epoch."""
        order = self._indices[draws.permutation]
        return (order * self.views.count + self.views.numbers(view, len(order))).numpy()

    # looking up ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def look_up(self, cells: Cells) -> list[Seen]:
        """Every teacher's outputs for the images and views of distinct `cells` (n,)."""
        return [self._of(*each, cells) for each in zip(self._opened(), self.teachers, strict=True)]

    def _of(self, bank: Bank | NoBank, teacher: FeatureNet, cells: Cells) -> Seen:
        held, there = bank.read(cells)
        missing = np.flatnonzero(~there)
        for counts in (self.epoch, self.total):
            counts.served += len(cells) - len(missing)
            counts.computed += len(missing)
        if len(missing):
            computed = self._run(teacher, cells[missing])
            held[missing] = bank.add(cells[missing], computed.half().cpu().numpy())
        found = torch.from_numpy(held).to(self.train.device).float()
        if len(missing):
            # what half precision cannot hold is used in full precision
            rows = torch.from_numpy(missing).to(found.device)
            found[rows] = torch.where(found[rows].isfinite().all(dim=1, keepdim=True), found[rows], computed)
        return Seen(found[:, : teacher.num_classes], found[:, teacher.num_classes :])

    def _run(self, teacher: FeatureNet, cells: Cells) -> Tensor:
        """A teacher's logits and feat_2d side by side, float32 (n, N + C)."""
        images, numbers = (
            torch.from_numpy(part).to(self.train.device).split(WINDOW) for part in np.divmod(cells, self.views.count)
        )
        parts = []
        for image, number in zip(images, numbers, strict=True):
            with self.costs.counting(False):
                seen = teacher(self.train.view(image, self.views.draw(number)))
            parts.append(torch.cat([seen.logits.float(), seen.feat_2d.float()], dim=1))
        return torch.cat(parts)

    def _opened(self) -> Sequence[Bank | NoBank]:
        """The banks of the precision in use: fp16 rounding is the only difference that a bank makes."""
        computed = precision(self.train.device)
        if computed not in self._banks:
            try:
                self._banks[computed] = self._open(computed)
            except OSError as error:
                logger.warning("teacher bank %s for %s: %s: the teachers are run", self.cache.folder, computed, error)
                self._banks[computed] = [NoBank(_width(net)) for net in self.teachers]
        return self._banks[computed]

    def _open(self, computed: str) -> list[Bank]:
        """Each teacher's bank, keyed by everything that determines its outputs for an image and a view."""
        key = {
            "timm": timm.__version__,
            "data": self.data.digest,
            "mean": list(self.data.mean),
            "std": list(self.data.std),
            "image": list(self.train.images.shape[1:]),
            "views": self.views.name,
            "computed": computed,
        }
        cells, opened = len(self.train.images) * self.views.count, []
        for net, weights in zip(self.teachers, self.hashes, strict=True):
            own = {"weights": weights, "architecture": net.architecture, "small_input": net.small_input}
            opened.append(self.cache.open(key | own, cells, _width(net)))
        return opened

    # ahead -----------------------------------------------------------------------------------------------------------

    def build(self, epochs: Iterable[EpochDraws], stop: Callable[[], int] = lambda: 0) -> None:
        """Compute what these epochs will ask for; processes share the work.

        Raises:
            Interrupted: `stop` gave a signal; what is done is kept.
        """
        world = distributed.world()
        parts = [np.zeros(0, np.int64)]
        for draws in epochs:
            views = (draws.crop_flip, draws.second) if draws.two_views else (draws.crop_flip,)
            parts += [self._cells_of(draws, view) for view in views]
        asked = np.concatenate(parts)
        # in the order in which they will be needed, which then is the order of the file
        cells = asked[np.sort(np.unique(asked, return_index=True)[1])]
        for at in range(world.rank * WINDOW, len(cells), world.size * WINDOW):
            if stop():
                raise Interrupted(stop())
            self.look_up(cells[at : at + WINDOW])
        self.epoch.served = self.total.served = 0  # nothing was served yet
        distributed.barrier()


def _width(net: FeatureNet) -> int:
    return net.num_classes + net.feature_dim


class _Window:
    """Cells of several batches, looked up when the first of them asks."""

    def __init__(self, bank: BankedTeachers, cells: Cells) -> None:
        self._bank, self._cells = bank, cells
        self._seen: list[Seen] | None = None

    def rows(self, batch: slice, rows: Tensor | None) -> list[Seen]:
        """The outputs for `rows` of the batch at `batch`; None: for all of it."""
        if self._seen is None:
            self._seen = self._bank.look_up(self._cells)
        found = [seen.take(batch) for seen in self._seen]
        if rows is not None:
            found = [seen.take(rows) for seen in found]
        for k, seen in enumerate(found):
            self._bank.costs.asked(f"teacher_{k}", len(seen.logits))
        return found


def precision(device: torch.device) -> str:
    """How networks compute right now: `float32 on cpu`, or autocast's type."""
    on = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if on else torch.float32
    return f"{str(dtype).removeprefix('torch.')} on {device.type}"
