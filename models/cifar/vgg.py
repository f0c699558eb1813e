"""VGG with BatchNorm and one linear layer (Simonyan & Zisserman 2015, sized for CIFAR; vgg8 is from the KD tables)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from models.cifar.base import CifarNet, register

__all__: list[str] = []  # filled by `register`

WIDTHS = (64, 128, 256, 512, 512)


class CifarVGG(CifarNet):
    """Five blocks of 3×3 convolutions, max-pooled in between down to 4×4, average-pooled at the end.

    Args:
        convs: convolutions per block.
    """

    head_name = "classifier"
    stem_names = r"^$"  # none: the first block sees the image
    block_names = r"^block(\d+)"

    def __init__(self, convs: tuple[int, ...], **common: Any) -> None:
        super().__init__(**common)
        in_chs = self.in_chans
        for i, (count, width) in enumerate(zip(convs, WIDTHS, strict=True)):
            block = nn.Sequential()
            for j in range(count):
                if j:
                    block.append(nn.ReLU(inplace=True))
                block.append(nn.Conv2d(in_chs, width, kernel_size=3, padding=1)).append(nn.BatchNorm2d(width))
                in_chs = width
            self.add_module(f"block{i}", block)
        self.finish(WIDTHS[-1], [(f"block{i}", WIDTHS[i], min(2**i, 8)) for i in range(5)])

    def init_head(self, linear: nn.Linear) -> None:
        """N(0, 0.01²), zero bias."""
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """The image itself: the first block sees it."""
        return x

    def stage(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Block `index`; a pool precedes the last one only if the map is larger than the 4×4 of 32-pixel images."""
        if 0 < index < 4 or (index == 4 and x.shape[-1] > 4):
            x = F.max_pool2d(x, 2)
        return F.relu(super().stage(index, x))


register(
    __name__,
    CifarVGG,
    {
        "cifar_vgg8": {"convs": (1, 1, 1, 1, 1)},
        "cifar_vgg11": {"convs": (1, 1, 2, 2, 2)},
        "cifar_vgg13": {"convs": (2, 2, 2, 2, 2)},
        "cifar_vgg16": {"convs": (2, 2, 3, 3, 3)},
        "cifar_vgg19": {"convs": (2, 2, 4, 4, 4)},
    },
    first_conv="block0.0",
)
