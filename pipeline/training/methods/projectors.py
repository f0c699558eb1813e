"""What several methods put between two networks' feature maps. Trained with the student, and thrown away after."""

import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.errors import UserError

Shape = tuple[int, int, int]
"""(C, h, w) of a feature map."""


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation that takes its running statistics where a batch has one value per channel.

    Torch refuses to train on that; a process's slice of a last batch may be one image, and a map one place.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel() == x.shape[1]:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        y: Tensor = super().forward(x)
        return y


class Regressor(nn.Sequential):
    """The student's map (B, *student) to the teacher's shape (B, *teacher): convolution, BN, ReLU (Romero et al. 2015).

    The convolution changes channels and size at once: 3×3 with stride 2 where the student's map is twice as large,
    transposed 4×4 with stride 2 where it is half as large, otherwise without padding and with the kernel that
    leaves the teacher's size, 1 + h_s − h_t (1×1 for equal sizes).

    Raises:
        UserError: the student's map is smaller than the teacher's, and not by half.
    """

    def __init__(self, student: Shape, teacher: Shape) -> None:
        (c_s, *size_s), (c_t, *size_t) = student, teacher
        conv: nn.Module
        if size_s == [2 * side for side in size_t]:
            conv = nn.Conv2d(c_s, c_t, 3, stride=2, padding=1)
        elif size_t == [2 * side for side in size_s]:
            conv = nn.ConvTranspose2d(c_s, c_t, 4, stride=2, padding=1)
        elif all(s >= t for s, t in zip(size_s, size_t, strict=True)):
            h, w = (1 + s - t for s, t in zip(size_s, size_t, strict=True))
            conv = nn.Conv2d(c_s, c_t, (h, w))
        else:
            raise UserError(
                f"no regressor leads from the student's map {_words(student)} to the teacher's {_words(teacher)}: "
                "choose a stage or networks whose maps are as large, larger, or half as large as the teacher's"
            )
        super().__init__(conv, BatchNorm(c_t), nn.ReLU())


def _words(shape: Shape) -> str:
    return "×".join(map(str, shape))
