"""FitNet's hint against a loop over the formula and torch's own mean square, and its limits."""

import torch
import torch.nn.functional as F

from pipeline.training.methods.maps import squared_distance
from tests.pipeline.training.methods.feature_maps import differences, maps, mean_square, off, slope


def test_each_sample_has_the_formula_s_value_and_gradient() -> None:
    regressed, target = maps(3, 4, 3, 2), maps(3, 4, 3, 2, seed=1)
    reference = target.double().tolist()

    def loop(x: list[list[list[list[float]]]]) -> list[float]:
        return [mean_square(a, b) for a, b in zip(x, reference, strict=True)]

    assert off(squared_distance(regressed, target), loop(regressed.double().tolist())) < 1e-6
    assert off(slope(lambda x: squared_distance(x, target), regressed), differences(loop, regressed)) < 1e-6


def test_its_mean_is_torch_s_mean_square() -> None:
    """torchdistill, like RepDistiller, uses torch's own loss for hints."""
    regressed, target = maps(16, 8, 4, 4), maps(16, 8, 4, 4, seed=1)
    assert off(squared_distance(regressed, target).mean(), F.mse_loss(regressed, target)) < 1e-6


def test_limits() -> None:
    x = maps(1, 4, 3, 3)
    assert squared_distance(x, x).tolist() == [0.0]
    large = maps(2, 4, 3, 3, scale=1e15)
    assert torch.isfinite(squared_distance(large, -large)).all()
    assert torch.isfinite(slope(lambda x: squared_distance(x, -large), large)).all()
    half = (300 * maps(2, 4, 3, 3) + 300).half()
    assert torch.isfinite(squared_distance(half, torch.zeros_like(half))).all(), "their squares are beyond float16"
    assert squared_distance(half, half.float()).dtype == torch.float32
