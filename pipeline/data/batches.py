"""Batches of a data set: index → crop and flip → normalise → mix.

Images live on the device as uint8, without workers; or they are files, which workers decode ahead of time.

All random numbers of an epoch are drawn before it begins (`TrainBatches.draw`), for the global batch. Resuming
within an epoch therefore means skipping batches, and each of several processes computes its rows of exactly the batch
that a single process would see.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from itertools import tee
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.config import AugmentConfig
from pipeline.data.augmentations import (
    CropFlip,
    Mix,
    MixKind,
    Normalize,
    blend,
    crop_flip,
    draw_crop_flip,
    draw_mix,
    rand_augment,
)
from pipeline.data.image_files import AT_ONCE, ImageFiles, Images, Wanted
from pipeline.errors import UserError


class Seen(NamedTuple):
    """A frozen teacher's outputs for n images, float32 on the device, as the bank keeps them."""

    logits: Tensor
    """Shape (n,N)."""
    feat_2d: Tensor
    """Shape (n,C)."""

    def take(self, rows: Tensor | slice) -> "Seen":
        return Seen(self.logits[rows], self.feat_2d[rows])


Known = Callable[[Tensor | None], Sequence[Seen]]
"""Returns every teacher's outputs for some rows of a batch (None: all), looked up or computed when called."""


class Batch(NamedTuple):
    """This process's b rows of one global batch; everything but `rows` and `global_size` lies on the device."""

    x: Tensor
    """float32 (b,C,H,W): augmented, normalised, unmixed («clean»)."""
    x_mixed: Tensor
    """x after MixUp or CutMix; x itself without mixing."""
    y: Tensor
    """int64 (b,): labels of x."""
    y_b: Tensor
    """int64 (b,): labels of the mixing partners; y without mixing."""
    lam: Tensor
    """float32 scalar: weight of y; 1 without mixing."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a batch
    """int64 (b,): which images of the data set these are."""
    rows: slice
    """Which rows of the global batch these are."""
    global_size: int
    """Images in the global batch."""
    partner: Tensor | None
    """int64 (b,): each row's mixing partner, as a row of the *global* batch; None without mixing."""
    views: CropFlip | None
    """The crop and flip behind each row of x; None without augmentation."""
    x_second: Tensor | None = None
    """float32 (b,C,H,W): the same images under a second, independent augmentation; None where none was drawn."""
    known: Known | None = None
    """The teacher bank's outputs for x; None without a bank, when the teachers have to run."""
    known_second: Known | None = None
    """The same for `x_second`."""


@dataclass(frozen=True)
class EpochDraws:
    """All random numbers of one epoch, on the CPU.

    permutation: int64 (n,), positions among the images that take part. crop_flip: one draw per *position of the epoch*
    (n,), or None. mixes: one per batch, or None. second: crops and flips of a second view; None without one. seeds:
    int64 (2, n), of RandAugment, or of files' whole augmentation, for both views; None without them.
    """

    permutation: Tensor
    crop_flip: CropFlip | None
    mixes: tuple[Mix | None, ...]
    two_views: bool = False
    second: CropFlip | None = None
    seeds: Tensor | None = None


def batch_bounds(n_images: int, batch_size: int) -> list[tuple[int, int]]:
    """(start, stop) of each batch of an epoch: full ones, then the remainder, unless that is a single image.

    Batch normalisation cannot train on one image; with a remainder of one, that image (another in each epoch) sits out.
    """
    bounds = [(start, min(start + batch_size, n_images)) for start in range(0, n_images, batch_size)]
    return [(start, stop) for start, stop in bounds if stop - start > 1]


class Order(Protocol):
    """What an epoch consists of: positions among the images that take part."""

    def __len__(self) -> int:
        """Positions in an epoch."""

    def draw(self, generator: torch.Generator) -> Tensor:
        """int64 (n,), on the CPU."""


@dataclass(frozen=True)
class Shuffled:
    """Each of n images once."""

    n: int

    def __len__(self) -> int:
        return self.n

    def draw(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(self.n, generator=generator)


@dataclass(frozen=True)
class Replayed:
    """Each of `new` images once, and beside them in every batch a share of `old` ones, which come again and again.

    The images that take part are the new ones, then the old ones. Old ones are drawn without replacement until all
    have been. `share`, in (0, 1): of each batch, rounded to whole images, at least one of either kind.
    """

    new: int
    old: int
    share: float
    batch_size: int

    def _parts(self) -> list[tuple[int, int]]:
        """New and old images in each batch; the last one keeps the share."""
        old = min(max(round(self.share * self.batch_size), 1), self.batch_size - 1)
        fresh = self.batch_size - old
        full, rest = divmod(self.new, fresh)
        last = [(rest, max(round(rest * old / fresh), 1))] if rest else []
        return [(fresh, old)] * full + last

    def __len__(self) -> int:
        return sum(new + old for new, old in self._parts())

    def draw(self, generator: torch.Generator) -> Tensor:
        parts = self._parts()
        wanted = sum(old for _, old in parts)
        fresh = torch.randperm(self.new, generator=generator)
        rounds = [torch.randperm(self.old, generator=generator) for _ in range(-(-wanted // self.old))]
        again = self.new + torch.cat(rounds)[:wanted]
        sizes = zip(fresh.split([new for new, _ in parts]), again.split([old for _, old in parts]), strict=True)
        return torch.cat([torch.cat(part) for part in sizes])


class TrainBatches:
    """The training subset of a data set, in augmented batches.

    images: uint8 (N,C,H,W), or files; labels: int64 (N,); indices: int64 (n,), the images that take part. All but files
    move to `device` once; tensors already there are shared, not copied: give train_x.to(device) here and to EvalBatches
    to hold it once. `batch_size` is global. Process `rank` of `world_size` gets a contiguous slice of every global
    batch; slices differ by at most one row, and are empty where the batch has fewer images than there are processes.
    Raises UserError when the subset is too small to make a batch.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        indices: Tensor,
        *,
        batch_size: int,
        augment: AugmentConfig,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        channels_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        order: Order | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.images = images.to(self.device)
        self.labels = labels.to(self.device)
        self.indices = indices.to(self.device)
        self.order = order or Shuffled(len(indices))
        self.batch_size = batch_size
        self.augment = augment
        self.normalize = Normalize(mean, std, self.device, channels_last)
        self.rank = rank
        self.world_size = world_size
        self.bounds = batch_bounds(len(self.order), batch_size)
        if not self.bounds:
            raise UserError(
                f"dataset.batch_size={batch_size} and {len(indices)} training images make no batch of at least 2; "
                "raise it, give more images, or lower dataset.val_fraction"
            )

    def __len__(self) -> int:
        return len(self.bounds)

    def draw(
        self,
        mix_kind: MixKind | None,
        mix_alpha: float,
        generators: Callable[[str], torch.Generator],
        two_views: bool = False,
    ) -> EpochDraws:
        """Draw an epoch's random numbers, for the global batches.

        `generators` gives a CPU generator for each of the names permutation, crop_flip, crop_flip_2, randaugment and
        mix. The streams are separate: switching mixing on or off changes neither order nor crops. No stream is
        requested for what is switched off. `two_views`: every image also has a second, independent augmentation. Files
        have a seed for each image instead of corners in the padded image.
        """
        n, augment = len(self.order), self.augment
        by_seed = isinstance(self.images, ImageFiles)
        permutation = self.order.draw(generators("permutation"))
        corners = augment.crop_flip and not by_seed
        views = draw_crop_flip(n, generators("crop_flip")) if corners else None
        mixes: tuple[Mix | None, ...] = (None,) * len(self.bounds)
        if mix_kind is not None:
            # torch has no Beta draw that takes a generator
            rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generators("mix"))))
            size = int(self.images.shape[-1])
            mixes = tuple(draw_mix(stop - start, size, mix_kind, mix_alpha, rng) for start, stop in self.bounds)
        second = draw_crop_flip(n, generators("crop_flip_2")) if two_views and corners else None
        stream = "crop_flip" if by_seed and augment.crop_flip else "randaugment" if augment.randaugment else None
        seeds = None if stream is None else torch.randint(2**62, (2, n), generator=generators(stream))
        return EpochDraws(permutation, views, mixes, two_views, second, seeds)

    def view(self, indices: Tensor, draw: CropFlip | None, seeds: Tensor | None = None) -> Tensor:
        """Images `indices` (b,) of a data set on the device, augmented and normalised: float32 (b,C,H,W).

        `draw`: their crops and flips, None for none. `seeds`: RandAugment's, int64 (b,) on the CPU, None for none.
        """
        assert isinstance(self.images, Tensor)
        x = self.images.index_select(0, indices)
        if draw is not None:
            x = crop_flip(x, draw, pad_mode=self.augment.pad_mode)
        if seeds is not None:
            x = rand_augment(x, seeds)
        return self.normalize(x)

    def slice_of(self, size: int) -> slice:
        """This process's rows of a global batch of `size` images."""
        return slice(self.rank * size // self.world_size, (self.rank + 1) * size // self.world_size)

    def epoch(self, draws: EpochDraws, start: int = 0) -> Iterator[Batch]:
        """The batches of one epoch from batch `start` on; those before it cost nothing."""
        one = torch.ones((), device=self.device)
        plans, ahead = tee(self._plans(draws, start))  # workers get requests ahead of the batch that is yielded
        made = self._views(asked for plan in ahead for asked in plan.asked)
        for plan in plans:
            yield self._batch(plan, made, one)

    def _plans(self, draws: EpochDraws, start: int) -> Iterator["_Plan"]:
        """What the epoch's batches are, from batch `start` on."""
        # one transfer per epoch and tensor: within the loop nothing waits for the device
        order = self.indices[draws.permutation.to(self.device)]
        mixes = _to_device(draws.mixes, self.device)
        # requests for files are made without the device
        resident, place = isinstance(self.images, Tensor), self.images.device
        at_images = order if resident else self.indices.to(place)[draws.permutation]
        crops = [None if view is None else view.to(place) for view in (draws.crop_flip, draws.second)]
        seeds = (None, None) if draws.seeds is None else draws.seeds.unbind()
        first, second = (_Asked(at_images, *view) for view in zip(crops, seeds, strict=True))
        for number, bounds in enumerate(self.bounds[start:], start):
            at = slice(*bounds)
            rows, mixture = self.slice_of(at.stop - at.start), mixes[number]
            asked = [first.take(at).take(rows)]
            if draws.two_views:
                asked.append(second.take(at).take(rows))
            if mixture is not None and self.world_size > 1:  # partners may be other processes', so they are made here
                source = mixture if resident else draws.mixes[number]
                assert source is not None
                asked.append(first.take(at).take(source.partner[rows]))
            yield _Plan(order[at], rows, mixture, draws.two_views, asked)

    def _views(self, asked: Iterator["_Asked"]) -> Iterator[Tensor]:
        """The requested images, augmented and normalised: float32 (b,C,H,W) on the device."""
        if isinstance(self.images, Tensor):
            yield from (self.view(*one) for one in asked)
        else:
            how = self.augment.crop_flip, self.augment.randaugment
            wanted = (Wanted(a.indices.numpy(), None if a.seeds is None else a.seeds.numpy(), *how) for a in asked)
            yield from map(self.normalize, self.images.views(wanted, self.device))

    def _batch(self, plan: "_Plan", made: Iterator[Tensor], one: Tensor) -> Batch:
        """This process's rows of the plan's global batch; `made` yields what the plan asked for."""
        index, rows, mixture = plan.index, plan.rows, plan.mixture
        size, mine, crops = len(index), index[rows], plan.asked[0].crops
        y, x = self.labels[mine], next(made)
        other = next(made) if plan.two_views else None
        if mixture is None:
            return Batch(x, x, y, y, one, mine, rows, size, None, crops, other)
        partner = mixture.partner[rows]
        mixed = blend(x, x[partner] if self.world_size == 1 else next(made), mixture)
        y_b = self.labels[index[partner]]
        return Batch(x, mixed, y, y_b, mixture.lam, mine, rows, size, partner, crops, other)


class _Asked(NamedTuple):
    """A request for images in one view each: tensors where the images are, seeds on the CPU."""

    indices: Tensor
    crops: CropFlip | None
    seeds: Tensor | None

    def take(self, rows: Tensor | slice) -> "_Asked":
        crops, seeds = self.crops, self.seeds
        if seeds is not None:
            seeds = seeds[rows if isinstance(rows, slice) else rows.cpu()]
        return _Asked(self.indices[rows], None if crops is None else crops.take(rows), seeds)


class _Plan(NamedTuple):
    """One batch before its images are made."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a plan
    """int64 (B,): the global batch, on the device."""
    rows: slice
    mixture: Mix | None
    two_views: bool
    asked: list[_Asked]
    """The clean view, the second one and the mixing partners, as far as each is needed."""


class EvalBatches:
    """Images in their order, unaugmented: iterates (x float32 (b,C,H,W), y int64 (b,)), the last batch as it comes.

    images, labels: as for TrainBatches; indices: the images that take part, None for all. `labels` are those of the
    images that take part, on the device, in the order of iteration.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,
        indices: Tensor | None,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        channels_last: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.images = images.to(self.device)
        self.indices = torch.arange(len(images), device=self.device) if indices is None else indices.to(self.device)
        self.all_labels = labels.to(self.device)
        self.labels = self.all_labels[self.indices]
        self.batch_size = batch_size if isinstance(images, Tensor) else min(batch_size, AT_ONCE)
        self.normalize = Normalize(mean, std, self.device, channels_last)

    def taking(self, indices: Tensor) -> "EvalBatches":
        """The same data set with other images taking part, int64 (n,)."""
        made = copy(self)
        made.indices, made.labels = indices, self.all_labels[indices]
        return made

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not len(self.indices):
            return
        parts = self.indices.split(self.batch_size)
        images: Iterator[Tensor]
        if isinstance(self.images, Tensor):
            images = (self.images.index_select(0, index) for index in parts)
        else:
            wanted = [Wanted(index.numpy()) for index in self.indices.cpu().split(self.batch_size)]
            images = self.images.views(wanted, self.device)
        yield from zip(map(self.normalize, images), self.labels.split(self.batch_size), strict=True)


def _to_device(mixes: tuple[Mix | None, ...], device: torch.device) -> list[Mix | None]:
    """All mixtures of an epoch with one transfer for the λ and one for the partners."""
    present = [m for m in mixes if m is not None]
    if device.type == "cpu" or not present:
        return list(mixes)
    lams = iter(torch.stack([m.lam for m in present]).to(device).unbind())
    partners = iter(torch.cat([m.partner for m in present]).to(device).split([len(m.partner) for m in present]))
    return [None if m is None else m._replace(lam=next(lams), partner=next(partners)) for m in mixes]
