"""The finite set of clean views of an image, numbered: the index of the teacher bank (docs/method.md section 8)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import AugmentConfig
from pipeline.data.augmentations import PAD, CropFlip, PadMode

CORNERS = 2 * PAD + 1


@dataclass(frozen=True)
class Views:
    """Zero-pad-4 crop × flip: 9 · 9 · 2 = 162 views, whatever the image size; one view without augmentation."""

    crop_flip: bool
    pad_mode: PadMode = "zero"

    @classmethod
    def of(cls, augment: AugmentConfig) -> "Views":
        """The views under a configuration without RandAugment (whose views cannot be enumerated)."""
        return cls(augment.crop_flip, augment.pad_mode if augment.crop_flip else "zero")

    @property
    def count(self) -> int:
        return CORNERS * CORNERS * 2 if self.crop_flip else 1

    @property
    def name(self) -> str:
        """The views' name in a bank's key."""
        return f"crop-flip pad {PAD} {self.pad_mode}" if self.crop_flip else "plain"

    def numbers(self, draw: CropFlip | None, n: int) -> Tensor:
        """int64 (n,), 0 … count − 1: the view drawn for each of n images; `draw` is on the CPU."""
        if draw is None:
            return torch.zeros(n, dtype=torch.int64)
        return (draw.top * CORNERS + draw.left) * 2 + draw.flip.long()

    def draw(self, numbers: Tensor) -> CropFlip | None:
        """The crops and flips of views `numbers` (n,): the inverse of `numbers`."""
        if not self.crop_flip:
            return None
        corner = numbers // 2
        return CropFlip(corner // CORNERS, corner % CORNERS, numbers % 2 == 1)
