"""Augmentations of whole batches, as pure functions of the images and of random numbers drawn beforehand.

Drawing is separate from applying, so that an epoch's randomness is known before its first batch: a resumed run, another
process and the teacher bank see the very same crops, flips and mixtures.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PAD = 4
PadMode = Literal["zero", "reflect"]
MixKind = Literal["cutmix", "mixup"]


class CropFlip(NamedTuple):
    """For each of N images: the crop's corner in the padded image (int64, 0..2·pad) and whether it is mirrored."""

    top: Tensor
    left: Tensor
    flip: Tensor

    def to(self, device: torch.device | str) -> "CropFlip":
        return CropFlip(*(part.to(device) for part in self))

    def take(self, rows: Tensor | slice) -> "CropFlip":
        return CropFlip(self.top[rows], self.left[rows], self.flip[rows])


def draw_crop_flip(n: int, generator: torch.Generator, pad: int = PAD) -> CropFlip:
    """Uniform corners in 0..2·pad and fair flips for `n` images, from a CPU generator."""
    top, left = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    return CropFlip(top, left, torch.randint(0, 2, (n,), generator=generator, dtype=torch.bool))


def crop_flip(x: Tensor, draw: CropFlip, pad: int = PAD, pad_mode: PadMode = "zero") -> Tensor:
    """Pads images (B,C,H,W) of any type by `pad` on all sides, cuts H×W at (top, left), then mirrors where `flip`.

    `pad_mode` zero (black) or reflect (without repeating the border). `draw` lies on the device of `x`. The result is
    contiguous, and equal to cropping and mirroring image by image.
    """
    height, width = x.shape[2:]
    padded = _pad(x, pad, pad_mode)
    # A mirrored crop is a crop of the mirrored image: with both at hand, one gather of windows does everything.
    both = torch.cat([padded, padded.flip(3)])
    windows = both.unfold(2, height, 1).unfold(3, width, 1)
    source = torch.arange(len(x), device=x.device) + len(x) * draw.flip
    return windows[source, :, draw.top, torch.where(draw.flip, 2 * pad - draw.left, draw.left)]


def _pad(x: Tensor, pad: int, mode: PadMode) -> Tensor:
    if mode == "zero":
        return F.pad(x, (pad, pad, pad, pad))
    # torch's reflection does not support uint8 on every device; index lists work for any type
    for dim in (2, 3):
        size = x.shape[dim]
        if pad >= size:
            raise ValueError(f"reflecting {pad} pixels needs images larger than {pad}; these have {size}")
        position = torch.arange(-pad, size + pad, device=x.device).abs()
        x = x.index_select(dim, torch.where(position < size, position, 2 * (size - 1) - position))
    return x


def rand_augment(x: Tensor, seeds: Tensor) -> Tensor:
    """RandAugment (Cubuk et al. 2020; torchvision's, 2 operations of magnitude 9) of uint8 images (B,C,H,W).

    Each image has its own seed (int64 (B,), on the CPU), so that its augmentation does not depend on its batch.
    Image by image: thousands, not tens of thousands, a second.
    """
    from torchvision.transforms.v2 import RandAugment

    transform = RandAugment()
    made = []
    with torch.random.fork_rng(devices=[]):
        for image, seed in zip(x, seeds.tolist(), strict=True):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed also looks for GPUs
            made.append(transform(image))
    return torch.stack(made) if made else x


class Mix(NamedTuple):
    """How one batch is mixed: image i with image partner[i], with weight `lam` for image i and its label.

    lam: float32 scalar tensor; partner: int64 (B,), a permutation of the batch; box: (top, left, bottom, right) of the
    pixels that CutMix takes from the partner, None for MixUp; Python numbers, so that nothing waits for the device.
    """

    kind: MixKind
    lam: Tensor
    partner: Tensor
    box: tuple[int, int, int, int] | None


def draw_mix(n_images: int, size: int, kind: MixKind, alpha: float, rng: np.random.Generator) -> Mix:
    """One mixture for a batch of `n_images` of `size`×`size` pixels.

    λ ~ Beta(alpha, alpha). CutMix (Yun et al. 2019): a box of side size·√(1−λ) around a uniform centre, cut at the
    borders; its `lam` is then 1 − area/size², exactly what is visible. MixUp: Zhang et al. 2018.
    """
    lam = float(rng.beta(alpha, alpha))
    partner = torch.from_numpy(rng.permutation(n_images).astype(np.int64))
    box = None
    if kind == "cutmix":
        box = _box(size, lam, *(int(c) for c in rng.integers(0, size, 2)))
        top, left, bottom, right = box
        lam = 1 - (bottom - top) * (right - left) / size**2
    return Mix(kind, torch.tensor(lam, dtype=torch.float32), partner, box)


def _box(size: int, lam: float, row: int, column: int) -> tuple[int, int, int, int]:
    half = int(size * np.sqrt(1 - lam)) // 2
    return max(row - half, 0), max(column - half, 0), min(row + half, size), min(column + half, size)


def blend(x: Tensor, partners: Tensor, m: Mix) -> Tensor:
    """Mix float images (b,C,H,W) with their partners, row by row; the loss is lam·ℓ(y) + (1−lam)·ℓ(y[partner])."""
    if m.box is None:
        # three roundings, whatever the batch's size: a fused form may round differently at the end of a vector loop
        return x * m.lam + partners * (1 - m.lam)
    top, left, bottom, right = m.box
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return mixed


class Normalize:
    """uint8 images (B,C,H,W) -> float32 (x/255 − mean)/std, as one affine map per channel."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        channels_last: bool = True,
    ) -> None:
        exact_mean, exact_std = (torch.tensor(list(v), dtype=torch.float64).view(1, -1, 1, 1) for v in (mean, std))
        self.scale = (1 / (255 * exact_std)).float().to(device)
        self.shift = (-exact_mean / exact_std).float().to(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, x: Tensor) -> Tensor:
        return x.float().mul_(self.scale).add_(self.shift).contiguous(memory_format=self.memory_format)
