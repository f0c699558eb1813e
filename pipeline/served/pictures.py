"""The one way from a picture file to pixels: training, evaluation, predict and the served student all see these.

The served student's file carries this module's text (`pipeline.served.code`): it may need numpy and pillow only.
"""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
"""Told by a file's content, whatever its name; of several frames the first one counts."""
SENT = ("PNG", "JPEG")
"""What a server takes of strangers: the faults that decoders have had were mostly in those of other formats."""
MAX_PIXELS = 64_000_000
"""A server refuses larger pictures: a file of some kilobytes can unpack to any amount of memory. For files on disk
Pillow's own limit holds, 179 million."""


class Refused(ValueError):
    """What was given is no image that the student can take; the text says why."""


def decode(
    file: bytes, size: int, channels: int, crop_pct: float | None = None, *, sent: bool = False
) -> NDArray[np.uint8]:
    """A picture file as uint8 (size, size, channels).

    As `read` has it, then brought to the size bicubically: as a square in its centre whose side is `crop_pct` of the
    shorter side; None: squeezed, whatever its shape.

    Args:
        sent: it came over the network; `SENT` and `MAX_PIXELS` hold.

    Raises:
        Refused: see `read`.
    """
    picture = square(read(io.BytesIO(file), channels, sent=sent), size, crop_pct)
    return np.asarray(picture, dtype=np.uint8).reshape(size, size, channels)


def read(file: Any, channels: int = 3, *, sent: bool = False) -> Any:
    """A picture as a PIL image, RGB or (1 channel) L: upright as its EXIF says, transparent parts on white.

    CMYK and palettes are converted; of 16 bits the upper eight count; floats are taken from 0 (black) to 1 (white).

    Args:
        file: a path or a binary file.

    Raises:
        Refused: another format, a damaged file, too many pixels, or numbers of which nobody can say what is white.
    """
    from PIL import Image

    try:
        with Image.open(file, formats=SENT if sent else FORMATS) as opened:
            if sent and opened.width * opened.height > MAX_PIXELS:
                raise Refused(f"it has {opened.width} × {opened.height} pixels, at most {MAX_PIXELS} are taken")
            return plain(opened, channels)
    except (Refused, FileNotFoundError, PermissionError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        limit = MAX_PIXELS if sent else 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise Refused(f"more than {limit} pixels") from error
    except Exception as error:
        # on damaged files Pillow's decoders raise whatever their parsers do: SyntaxError, struct.error, EOFError, …
        raise Refused("not such a picture, or a damaged one") from error


def plain(opened: Any, channels: int = 3) -> Any:
    """What `read` makes of a PIL image that is still as its file has it. Raises Refused, and whatever decoders do."""
    from PIL import Image, ImageOps

    tags = dict(getattr(opened, "tag_v2", {}))
    opened.load()
    picture: Any = ImageOps.exif_transpose(opened)
    if picture.mode.startswith(("I", "F")):
        picture = _eight_bits(picture, opened.format, tags)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB" if channels == 3 else "L")


def area(file: bytes) -> int:
    """Pixels of a `SENT` picture by its header, before anything is decoded; 0 for what is none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(file), formats=SENT) as opened:
            return int(opened.width * opened.height)
    except Exception:  # `read` says what is wrong with it
        return 0


BITS, PHOTOMETRIC = 258, 262
"""TIFF tags: BitsPerSample, and PhotometricInterpretation, of which 0 means that zero is white."""


def _eight_bits(picture: Any, kind: str | None, tags: dict[int, Any]) -> Any:
    """Grey of more than 8 bits as mode L; Pillow's `convert` would cut off what is above 255. Raises Refused."""
    from PIL import Image

    values = np.asarray(picture)
    if picture.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise Refused("its floats are not all between 0 (black) and 1 (white); save it with 8 or 16 bits")
        grey = np.rint(values * 255)
    elif picture.mode == "I" and kind == "TIFF":
        raise Refused("its integers have 32 bits or a sign: what is white is not known; save it with 8 or 16 bits")
    else:
        bits = int(np.max(tags.get(BITS, 16)))
        grey = values >> (bits - 8)
        if tags.get(PHOTOMETRIC) == 0:
            grey = 255 - grey
        if isinstance(clear := picture.info.get("transparency"), int):
            grey = np.where(values == clear, 255, grey)  # on white
    return Image.fromarray(grey.astype(np.uint8))


def square(picture: Any, size: int, crop_pct: float | None) -> Any:
    """A PIL image as a network is evaluated on it, (size, size): with `crop_pct` as torchvision's Resize and
    CenterCrop do it, without one squeezed.
    """
    from PIL import Image

    if crop_pct is None:
        return picture.resize((size, size), Image.Resampling.BICUBIC)
    shorter = round(size / crop_pct)
    width, height = (shorter * side // min(picture.size) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return picture.crop((left, top, left + size, top + size))
