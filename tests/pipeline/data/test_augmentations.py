"""Batched augmentations against loops over single images, and draws against closed forms."""

from itertools import product
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from pipeline.data.augmentations import (
    CropFlip,
    Mix,
    MixKind,
    Normalize,
    PadMode,
    blend,
    crop_flip,
    draw_crop_flip,
    draw_mix,
)


def images(n: int, channels: int = 3, height: int = 8, width: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, height, width), generator=generator, dtype=torch.uint8)


def crop_flip_loop(x: NDArray[Any], draw: CropFlip, pad: int, pad_mode: PadMode) -> NDArray[Any]:
    """One image at a time, with numpy."""
    mode: Literal["constant", "reflect"] = "reflect" if pad_mode == "reflect" else "constant"
    height, width = x.shape[2:]
    result = []
    for image, top, left, flip in zip(x, draw.top.tolist(), draw.left.tolist(), draw.flip.tolist(), strict=True):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)), mode=mode)
        crop = padded[:, top : top + height, left : left + width]
        result.append(crop[:, :, ::-1] if flip else crop)
    return np.stack(result)


@pytest.mark.parametrize("pad_mode", ["zero", "reflect"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_crop_flip_equals_loop(pad_mode: PadMode, layout: torch.memory_format, dtype: torch.dtype) -> None:
    shapes = product((1, 5), (1, 3), (6, 9), (6, 11), (0, 4, 5))
    for seed, (n, channels, height, width, pad) in enumerate(shapes):
        x = images(n, channels, height, width, seed)
        draw = draw_crop_flip(n, torch.Generator().manual_seed(seed), pad)
        expected = torch.from_numpy(crop_flip_loop(x.numpy(), draw, pad, pad_mode))
        result = crop_flip(x.to(dtype).contiguous(memory_format=layout), draw, pad, pad_mode)
        assert result.dtype == dtype
        assert torch.equal(result, expected.to(dtype))


def test_crop_flip_equals_pil() -> None:
    x = images(1, height=32, width=32)
    picture = Image.fromarray(x[0].permute(1, 2, 0).numpy())
    padded = ImageOps.expand(picture, border=4, fill=0)
    for top in range(9):
        for left in range(9):
            crop = padded.crop((left, top, left + 32, top + 32))
            for flip, expected in ((False, crop), (True, ImageOps.mirror(crop))):
                draw = CropFlip(torch.tensor([top]), torch.tensor([left]), torch.tensor([flip]))
                assert np.array_equal(crop_flip(x, draw)[0].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_reflecting_more_than_the_image_is_an_error() -> None:
    draw = draw_crop_flip(2, torch.Generator())
    with pytest.raises(ValueError, match="larger than 4"):
        crop_flip(images(2, height=4, width=4), draw, pad_mode="reflect")


def test_draws_are_uniform_over_the_162_views() -> None:
    n = 162 * 400
    draw = draw_crop_flip(n, torch.Generator().manual_seed(3))
    assert draw.top.dtype == draw.left.dtype == torch.int64
    counts = torch.bincount((draw.top * 9 + draw.left) * 2 + draw.flip, minlength=162).double()
    chi_square = float(((counts - 400) ** 2 / 400).sum())
    assert len(counts) == 162
    assert abs(chi_square - 161) < 4 * (2 * 161) ** 0.5  # mean and deviation of chi² with 161 degrees of freedom


@pytest.mark.parametrize("kind", ["cutmix", "mixup"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_mix_equals_loop(kind: MixKind, channels_last: bool) -> None:
    n, size = 7, 12
    rng = np.random.default_rng(1)
    for _ in range(10):
        x = torch.randn(n, 3, size, size)
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        m = draw_mix(n, size, kind, 1.0, rng)
        result, lam = blend(x, x[m.partner], m), m.lam.item()
        expected = np.empty(x.shape, np.float32)
        pixels = x.numpy()
        for i, row, column in np.ndindex(n, size, size):
            own, other = pixels[i, :, row, column], pixels[int(m.partner[i]), :, row, column]
            if kind == "mixup":
                expected[i, :, row, column] = lam * own + (1 - lam) * other
            else:
                assert m.box is not None
                top, left, bottom, right = m.box
                inside = top <= row < bottom and left <= column < right
                expected[i, :, row, column] = other if inside else own
        torch.testing.assert_close(result, torch.from_numpy(expected))
        assert result.is_contiguous(memory_format=torch.channels_last) == channels_last


@given(alpha=st.floats(0.05, 5), seed=st.integers(0, 10**6), size=st.integers(4, 40), n=st.integers(1, 20))
@settings(deadline=None, max_examples=60)
def test_cutmix_lambda_is_the_visible_share(alpha: float, seed: int, size: int, n: int) -> None:
    m = draw_mix(n, size, "cutmix", alpha, np.random.default_rng(seed))
    mask = torch.ones(1, 1, size, size)
    shown = blend(mask, torch.zeros_like(mask), m)
    assert m.lam.dtype == torch.float32
    assert m.lam.item() == pytest.approx(shown.mean().item(), abs=1e-6)
    assert torch.equal(m.partner.sort().values, torch.arange(n))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup_lambda_has_the_moments_of_beta(alpha: float) -> None:
    rng = np.random.default_rng(5)
    lam = np.array([draw_mix(1, 8, "mixup", alpha, rng).lam.item() for _ in range(20_000)])
    variance = 1 / (4 * (2 * alpha + 1))  # Beta(a, a): mean 1/2, variance 1/(4(2a+1))
    assert lam.mean() == pytest.approx(0.5, abs=4 * (variance / len(lam)) ** 0.5)
    assert lam.var() == pytest.approx(variance, rel=0.04)


def test_cutmix_area_has_the_expectation_of_its_definition() -> None:
    """alpha = 1: λ is uniform, so the side int(32·√(1−λ)) is k with probability (2k+1)/32²; so is the centre."""
    size = 32
    centres = np.arange(size)
    expected = 0.0
    for side in range(size):
        half = side // 2
        length = np.mean(np.minimum(centres + half, size) - np.maximum(centres - half, 0))
        expected += (2 * side + 1) / size**2 * length**2
    rng = np.random.default_rng(6)
    area = np.array([(1 - draw_mix(1, size, "cutmix", 1.0, rng).lam.item()) * size**2 for _ in range(20_000)])
    assert area.mean() == pytest.approx(expected, abs=4 * area.std() / len(area) ** 0.5)


def test_mixing_does_not_change_its_input() -> None:
    x = torch.randn(4, 3, 8, 8)
    kept = x.clone()
    blend(x, x.flip(0), Mix("cutmix", torch.tensor(0.75), torch.tensor([3, 2, 1, 0]), (0, 0, 4, 4)))
    assert torch.equal(x, kept)


def test_normalize_equals_torchvision() -> None:
    from torchvision.transforms import v2

    mean, std = (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)
    reference = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    x = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 3, 16, 16)  # every level in every channel
    for channels_last in (False, True):
        result = Normalize(mean, std, channels_last=channels_last)(x)
        torch.testing.assert_close(result, reference(x), rtol=0, atol=1e-6)
        assert result.is_contiguous(memory_format=torch.channels_last) == channels_last
