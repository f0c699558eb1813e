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
    reductions = (1, 2, 4, 8, 8)

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
            self.add_module(f"act{i}", nn.ReLU())
        self.finish(WIDTHS[-1], [(f"act{i}", width) for i, width in enumerate(WIDTHS)])

    def init_head(self, linear: nn.Linear) -> None:
        """N(0, 0.01²), zero bias."""
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """The image itself: the first block sees it."""
        return x

    def parts(self, index: int) -> list[str]:
        """The block and its last ReLU; pools have no module."""
        return [f"block{index}", f"act{index}"]

    def stage(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Block `index` after its pool, if there is one, and the last ReLU."""
        return self.stage_preact(index, x)[1]

    def stage_preact(self, index: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Block `index` before and after its last ReLU."""
        if index:
            x = F.max_pool2d(x, 2) if index < 4 else pooled_to_4(x)
        block, act = map(self.get_submodule, self.parts(index))
        preact: torch.Tensor = block(x)
        return preact, act(preact)


@torch.fx.wrap
def pooled_to_4(x: torch.Tensor) -> torch.Tensor:
    """The pool before the last block, only if the map is larger than the 4×4 of 32-pixel images.

    torch.fx takes it for one operation and leaves the choice to the size of the map.
    """
    return F.max_pool2d(x, 2) if x.shape[-1] > 4 else x


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
