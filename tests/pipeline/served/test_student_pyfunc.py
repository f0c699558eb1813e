"""What the served student makes of pictures and pixels, and what it refuses; MLflow and the network are not needed."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.served import student_pyfunc
from pipeline.served.student_pyfunc import BATCH, Classifier, Refused, answers, decode, pixels
from tests.pipeline.served.test_pictures import GENERATOR, RGB, SIZE, encoded

ALPHA = GENERATOR.integers(0, 256, (SIZE, SIZE, 1), dtype=np.uint8)


@pytest.mark.parametrize("grey", [False, True])
def test_transparent_parts_are_white(grey: bool) -> None:
    """Colour·alpha + white·(1 - alpha), within the rounding of eight bits."""
    colours = RGB[..., :1] if grey else RGB
    picture = Image.fromarray(np.concatenate([colours, ALPHA], axis=2))
    assert picture.mode == ("LA" if grey else "RGBA")
    share = ALPHA / 255.0
    expected = np.broadcast_to(colours * share + 255.0 * (1 - share), RGB.shape)
    np.testing.assert_allclose(decode(encoded(picture), SIZE, 3), expected, atol=1)


def test_a_palettes_transparent_entry_is_white() -> None:
    picture = Image.new("P", (SIZE, SIZE), 0)
    picture.putpalette([10, 20, 30, 40, 50, 60])
    picture.putpixel((3, 5), 1)
    found = decode(encoded(picture, transparency=0), SIZE, 3)
    assert found[5, 3].tolist() == [40, 50, 60]
    assert found[0, 0].tolist() == [255, 255, 255]


@pytest.mark.parametrize(
    ("ink", "light"), [((0, 0, 0, 0), 255), ((0, 0, 0, 255), 0), ((255, 0, 0, 0), None), ((0, 0, 0, 100), 155)]
)
def test_cmyk_jpegs_have_the_colours_of_their_inks(ink: tuple[int, ...], light: int | None) -> None:
    found = decode(encoded(Image.new("CMYK", (SIZE, SIZE), ink), "JPEG", quality=95), SIZE, 3).astype(int)
    expected = [0, 255, 255] if light is None else [light] * 3  # cyan swallows red; black swallows all
    np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=3)


def test_a_grey_student_sees_luma() -> None:
    """ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B."""
    found = decode(encoded(Image.fromarray(RGB)), SIZE, 1)
    np.testing.assert_allclose(found[..., 0], RGB @ [0.299, 0.587, 0.114], atol=1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_other_sizes_are_squeezed_as_timms_own_transform_does(kind: str) -> None:
    """With the entries that the exported timm folder has: crop_mode squash, bicubic, crop_pct 1."""
    import timm.data

    wide = np.kron(GENERATOR.integers(0, 256, (11, 17, 3), dtype=np.uint8), np.ones((5, 7, 1), np.uint8))
    file = encoded(Image.fromarray(wide), kind)
    asked = {"input_size": (3, SIZE, SIZE), "interpolation": "bicubic", "crop_pct": 1.0, "crop_mode": "squash"}
    transform = timm.data.create_transform(**asked, mean=(0, 0, 0), std=(1, 1, 1))
    with Image.open(io.BytesIO(file)) as picture:
        expected = transform(picture.convert("RGB")).permute(1, 2, 0).numpy() * 255.0
    np.testing.assert_allclose(decode(file, SIZE, 3), expected, atol=0.01)


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (b"", "not such a picture"),
        (b"GIF89a", "not such a picture"),
        (encoded(Image.fromarray(RGB), "BMP"), "not such a picture"),
        (encoded(Image.fromarray(RGB))[:300], "damaged"),
        (encoded(Image.fromarray(RGB)).replace(b"IDAT", b"IDOT"), "damaged"),
        (encoded(Image.fromarray(np.kron(RGB, np.ones((9, 9, 1), np.uint8))), "JPEG")[:900], "damaged"),
        (encoded(Image.new("1", (9000, 8000))), "9000 × 8000 pixels"),
    ],
)
def test_what_is_no_png_or_jpeg_is_refused(file: bytes, says: str) -> None:
    with pytest.raises(Refused, match=says):
        decode(file, SIZE, 3, sent=True)


# requests ------------------------------------------------------------------------------------------------------------


class Echo(Classifier):
    """Three classes; the probabilities are the upper left pixel's channels."""

    def __init__(self) -> None:
        self.classes, self.size, self.channels, self.crop_pct = ["red", "green", "blue"], SIZE, 3, None

    def probabilities(self, images: Any) -> Any:
        return images[:, 0, 0].astype(np.float32) / 256


def test_lists_and_strings_are_answered_in_their_order() -> None:
    other = RGB.copy()
    other[0, 0] = (64, 128, 32)
    text = base64.encodebytes(encoded(Image.fromarray(other))).decode()  # with line breaks
    assert "\n" in text
    first, second = answers(Echo(), [RGB.tolist(), text])
    assert second == {
        "class": "green",
        "probability": 0.5,
        "probabilities": {"red": 0.25, "green": 0.5, "blue": 0.125},
    }
    assert list(first["probabilities"].values()) == (RGB[0, 0] / 256).tolist()
    json.dumps([first, second])


GOOD = RGB.tolist()


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ((RGB / 255).tolist(), "integers from 0 to 255"),
        (RGB.astype(float).tolist(), "integers from 0 to 255"),
        ((RGB > 99).tolist(), "integers from 0 to 255"),
        ((RGB.astype(int) - 256).tolist(), "integers from 0 to 255"),
        ((RGB.astype(object) + 2**70).tolist(), "integers from 0 to 255"),
        (RGB.astype(str).tolist(), "integers from 0 to 255"),
        ([[[None] * 3] * SIZE] * SIZE, "integers from 0 to 255"),
        (RGB[:8].tolist(), r"shape \(8, 16, 3\), expected \(16, 16, 3\)"),
        (np.moveaxis(RGB, 2, 0).tolist(), r"shape \(3, 16, 16\)"),
        (RGB[..., 0].tolist(), r"shape \(16, 16\)"),
        ([], r"shape \(0,\)"),
        ([*GOOD[:-1], GOOD[-1][:-1]], "different lengths"),
        (None, "neither"),
        ({"b64": "…"}, "neither"),
        (7, "neither"),
        ("", "no base64 PNG or JPEG"),
        ("/etc/passwd", "no base64 PNG or JPEG"),
        ("Größe", "no base64 PNG or JPEG"),
        (base64.b64encode(b"some text").decode(), "not such a picture"),
    ],
)
def test_what_is_no_image_is_refused_with_its_position(item: Any, says: str) -> None:
    with pytest.raises(Refused, match=f"^image 1 .*{says}"):
        answers(Echo(), [GOOD, item])


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(Refused, match="empty"):
        answers(Echo(), [])


def test_every_integer_type_that_holds_pixels_is_taken() -> None:
    for kind in (np.uint8, np.int16, np.int64, np.uint64):
        np.testing.assert_array_equal(pixels(RGB.astype(kind), SIZE, 3), RGB)


@pytest.mark.parametrize("count", [1, BATCH, 2 * BATCH + 1])
def test_large_requests_go_through_the_network_in_parts(count: int) -> None:
    asked: list[int] = []

    class Session:
        def run(self, names: list[str], given: dict[str, Any]) -> list[Any]:
            asked.append(len(given["images"]))
            return [given["images"][:, 0, 0].astype(np.float32)]

    classifier = Echo()
    classifier._session = Session()
    images = GENERATOR.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)
    np.testing.assert_array_equal(Classifier.probabilities(classifier, images), images[:, 0, 0])
    assert sum(asked) == count
    assert max(asked) <= BATCH


def test_the_project_imports_the_functions_without_mlflow() -> None:
    """By its path the same file is the model: tests/steps/test_serving.py serves it."""
    code = "import sys, pipeline.served.student_pyfunc as s; assert not hasattr(s, 'Student'); print(*sys.modules)"
    root = Path(student_pyfunc.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert not {"mlflow", "torch", "onnxruntime"} & set(done.stdout.split())
