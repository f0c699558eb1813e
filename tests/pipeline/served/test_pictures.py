"""One decoder for training, predict and serving: every kind of file gives the pixels that its maker meant."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from pipeline.data.image_files import ImageFiles
from pipeline.served import code as served
from pipeline.served.pictures import Refused, decode
from pipeline.served.student_pyfunc import Classifier

SIZE = 16
GENERATOR = np.random.default_rng(1)
DEEP = GENERATOR.integers(0, 65536, (SIZE, SIZE), dtype=np.uint16)
GREY = (DEEP // 256).astype(np.uint8)
RGB = GENERATOR.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def deep_png(samples: Any) -> bytes:
    """(SIZE, SIZE, 2 or 3 or 4) as a PNG of 16 bits, which Pillow cannot write."""
    colour = {2: 4, 3: 2, 4: 6}[samples.shape[2]]
    header = struct.pack(">IIBBBBB", SIZE, SIZE, 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def lab() -> Image.Image:
    profiles = (ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"))
    found = ImageCms.profileToProfile(Image.fromarray(RGB), *profiles, outputMode="LAB")
    assert found is not None
    return found


OPAQUE = np.full_like(DEEP, 65535)
TURNED = Image.Exif()
TURNED[274] = 6
THREE = np.repeat(GREY[..., None], 3, axis=2)
CASES: list[tuple[str, bytes, Any]] = [
    ("grey", encoded(Image.fromarray(GREY)), THREE),
    ("grey, 16 bits", encoded(Image.fromarray(DEEP), "PNG"), THREE),
    ("TIFF, 16 bits", encoded(Image.fromarray(DEEP), "TIFF"), THREE),
    ("TIFF, 16 bits, big-endian", encoded(Image.fromarray(DEEP.astype(">u2")), "TIFF"), THREE),
    ("TIFF, 16 bits, zero is white", encoded(Image.fromarray(DEEP), "TIFF", tiffinfo={262: 0}), 255 - THREE),
    ("PGM, 16 bits", encoded(Image.fromarray(DEEP), "PPM"), THREE),
    ("colour, 16 bits", deep_png(np.repeat(DEEP[..., None], 3, axis=2)), THREE),
    ("grey and alpha, 16 bits", deep_png(np.stack([DEEP, OPAQUE], axis=2)), THREE),
    ("colour and alpha, 16 bits", deep_png(np.stack([DEEP] * 3 + [OPAQUE], axis=2)), THREE),
    ("floats", encoded(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF"), THREE),
    (
        "grey, 16 bits, one value transparent",
        encoded(Image.fromarray(DEEP), "PNG", transparency=int(DEEP[2, 3])),
        np.where((DEEP[2, 3] == DEEP)[..., None], 255, THREE),
    ),
    ("colour", encoded(Image.fromarray(RGB), "PNG"), RGB),
    ("WebP", encoded(Image.fromarray(RGB), "WEBP", lossless=True), RGB),
    ("BMP", encoded(Image.fromarray(RGB), "BMP"), RGB),
    ("PPM", encoded(Image.fromarray(RGB), "PPM"), RGB),
    ("turned", encoded(Image.fromarray(RGB), "PNG", exif=TURNED), np.rot90(RGB, -1)),
    ("turned, 16 bits", encoded(Image.fromarray(DEEP), "PNG", exif=TURNED), np.rot90(THREE, -1)),
    ("palette", encoded(Image.fromarray(GREY).convert("P"), "PNG"), THREE),
    ("one bit", encoded(Image.fromarray(GREY > 99), "PNG"), np.where(THREE > 99, 255, 0)),
    ("grey, all transparent", encoded(Image.fromarray(np.stack([GREY, 0 * GREY], axis=2)), "PNG"), 0 * RGB + 255),
    ("CMYK", encoded(Image.new("CMYK", (SIZE, SIZE), (0, 255, 255, 0)), "TIFF"), RGB * 0 + np.array([255, 0, 0])),
]


@pytest.mark.parametrize(("file", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_training_and_serving_see_what_the_file_holds(file: bytes, expected: Any, tmp_path: Path) -> None:
    seen = decode(file, SIZE, 3)
    np.testing.assert_array_equal(seen, expected)
    path = tmp_path / "x.png"
    path.write_bytes(file)
    trained = ImageFiles([str(path)], SIZE, 0, "dataset.root=x")[:1][0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(trained, decode(file, SIZE, 3, 0.875))


def test_lab_is_converted_by_its_own_colours() -> None:
    assert np.abs(decode(encoded(lab(), "TIFF"), SIZE, 3).astype(int) - RGB).mean() < 12  # not all of it is in sRGB


@pytest.mark.parametrize(
    ("file", "says"),
    [
        (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "floats are not all between 0"),
        (encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF"), "floats are not all between 0"),
        (encoded(Image.fromarray(DEEP.astype(np.int32)), "TIFF"), "32 bits or a sign"),
        (encoded(Image.new("RGB", (9, 9)), "PDF"), "not such a picture"),
        (encoded(Image.new("RGB", (9, 9)), "EPS"), "not such a picture"),
    ],
)
def test_what_has_no_honest_reading_is_refused_in_one_line(file: bytes, says: str) -> None:
    with pytest.raises(Refused, match=says) as caught:
        decode(file, SIZE, 3)
    assert "\n" not in str(caught.value)


def test_a_server_takes_png_and_jpeg_only() -> None:
    for kind in ("TIFF", "WEBP", "GIF", "BMP", "PPM"):
        with pytest.raises(Refused):
            decode(encoded(Image.fromarray(RGB), kind), SIZE, 3, sent=True)


def test_the_logged_file_stands_alone_and_decodes_alike(tmp_path: Path) -> None:
    """Elsewhere there is no `pipeline`: the file is compiled and run without one."""
    path = tmp_path / "student_pyfunc.py"
    path.write_text(served.CODE, encoding="utf-8")
    (tmp_path / "x.png").write_bytes(CASES[0][1])
    code = (
        "import sys, types, importlib.util as u\n"
        "spec = u.spec_from_file_location('alone.student', sys.argv[1]); m = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(m)\n"
        "sys.stdout.buffer.write(m.decode(open(sys.argv[2], 'rb').read(), 16, 3).tobytes())\n"
        "assert not [n for n in sys.modules if n.partition('.')[0] in ('pipeline', 'torch', 'torchvision')]\n"
    )
    command = [sys.executable, "-I", "-c", code, str(path), str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path)
    assert done.stdout == THREE.tobytes()


def test_predict_reads_what_training_reads_and_http_does_not() -> None:
    classifier = Classifier.__new__(Classifier)
    classifier.size, classifier.channels, classifier.crop_pct = SIZE, 3, None
    file = encoded(Image.fromarray(DEEP), "TIFF")
    np.testing.assert_array_equal(classifier.picture(file), THREE)
    with pytest.raises(Refused):
        classifier.picture(file, sent=True)
