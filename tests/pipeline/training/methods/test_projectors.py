"""FitNet's regressor, and batch normalisation of a single place."""

import pytest
import torch

from pipeline.errors import UserError
from pipeline.training.methods.projectors import BatchNorm, Regressor, Shape


@pytest.mark.parametrize(
    ("student", "teacher", "kernel"),
    [
        ((16, 32, 32), (32, 16, 16), (3, 3)),
        ((16, 8, 8), (32, 16, 16), (4, 4)),
        ((16, 8, 8), (32, 8, 8), (1, 1)),
        ((16, 8, 9), (32, 7, 5), (2, 5)),
        ((16, 14, 14), (8, 8, 8), (7, 7)),
        ((16, 2, 2), (32, 1, 1), (3, 3)),
    ],
)
def test_a_regressor_changes_channels_and_size(student: Shape, teacher: Shape, kernel: tuple[int, int]) -> None:
    regressor = Regressor(student, teacher)
    out = regressor(torch.randn(2, *student))
    assert out.shape == (2, *teacher)
    assert out.min() >= 0, "ReLU, as the teacher's map has"
    assert regressor[0].kernel_size == kernel


@pytest.mark.parametrize(
    ("student", "teacher"), [((4, 3, 3), (4, 8, 8)), ((4, 4, 8), (4, 8, 4)), ((4, 8, 4), (4, 4, 8))]
)
def test_sizes_without_a_regressor_are_refused_in_one_line(student: Shape, teacher: Shape) -> None:
    with pytest.raises(UserError, match=r"the student's map 4×\d×\d to the teacher's 4×\d×\d: choose .*") as refused:
        Regressor(student, teacher)
    assert "\n" not in str(refused.value)


def test_one_place_of_one_image_is_normalised_by_running_statistics() -> None:
    norm = BatchNorm(3)
    norm(3 + 2 * torch.randn(64, 3, 1, 1, generator=torch.Generator().manual_seed(0)))
    before, x = norm.running_mean, torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1).requires_grad_()
    assert before is not None
    kept = before.clone()
    out = norm(x)
    assert torch.equal(out, norm.eval()(x)), "as in evaluation"
    assert torch.equal(before, kept)
    out.sum().backward()
    assert norm.weight.grad is not None
