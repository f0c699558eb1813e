"""A student as MLflow serves it: images in, class names and probabilities out.

MLflow runs this file by its path, out of the logged model and without this project: mlflow, numpy, onnxruntime and
pillow are all it needs, since the logged copy carries pipeline/served/pictures.py in the place of its import
(`pipeline.served.code`). The project imports it for its functions, so that predictions on a folder of files are
those of the server; that way it imports no MLflow.
"""

import base64
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.served.pictures import MAX_PIXELS, Refused, area, decode

MAX_IMAGES, MAX_PIXELS_TOGETHER = 1024, 8 * MAX_PIXELS
"""Of one request: more would hold a server for longer than others wait."""
BATCH = 256
"""Images that go through the network at once, so that memory does not grow with the request."""


def session(net: str) -> Any:
    """An ONNX file, ready to run on the processor.

    ONNX Runtime (1.29 and later) tells its makers about sessions and the files' names unless this variable is set
    before it is imported. A user who has set it decides.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime.InferenceSession(net, providers=["CPUExecutionProvider"])


class Classifier:
    """The network of a logged model.

    Args:
        net: its ONNX file, uint8 (n, size, size, channels) -> `probabilities` (n, N).
        meta: its meta.json.
    """

    def __init__(self, net: str, meta: str) -> None:
        with open(meta, encoding="utf-8") as file:
            described = json.load(file)
        self.classes: list[str] = described["classes"]
        self.size, self.channels = int(described["image_size"]), int(described["in_chans"])
        self.crop_pct: float | None = described.get("crop_pct")
        self._session = session(net)

    def probabilities(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(n, size, size, channels) -> (n, N), for any n > 0. Raises Refused: they are not finite."""
        starts = range(0, len(images), BATCH)
        found = [self._session.run(["probabilities"], {"images": images[i : i + BATCH]})[0] for i in starts]
        rows: NDArray[np.float32] = np.concatenate(found)
        if not np.isfinite(rows).all():
            raise Refused("cannot be classified: the network's probabilities are not finite")
        return rows

    def picture(self, file: bytes, *, sent: bool = False) -> NDArray[np.uint8]:
        """A picture file, or one that was `sent` to a server, as the network takes it, (size, size, channels).

        Raises Refused.
        """
        return decode(file, self.size, self.channels, self.crop_pct, sent=sent)

    def image(self, item: Any) -> NDArray[np.uint8]:
        """One item of a request: a picture's file, or nested lists of pixels. Raises Refused."""
        if not isinstance(item, bytes):
            return pixels(item, self.size, self.channels)
        try:
            return self.picture(item, sent=True)
        except Refused as error:
            raise Refused(f"is no base64 PNG or JPEG ({error})") from error


def pixels(item: Any, size: int, channels: int) -> NDArray[np.uint8]:
    """Nested lists of integers from 0 to 255 as uint8 (size, size, channels). Raises Refused."""
    expected = f"expected ({size}, {size}, {channels})"
    try:
        image = np.asarray(item)
    except ValueError as error:
        raise Refused(f"has rows of different lengths, {expected}") from error
    if image.ndim == 0:
        raise Refused(f"is neither nested lists of pixels, {expected}, nor a base64 PNG or JPEG")
    if image.shape != (size, size, channels):
        raise Refused(f"has shape {image.shape}, {expected}")
    if image.dtype.kind not in "iu" or image.min() < 0 or image.max() > 255:
        raise Refused("has other pixels than integers from 0 to 255")
    return image.astype(np.uint8)


def unpacked(item: Any) -> Any:
    """An item of a request, a base64 string as the bytes that it stands for. Raises Refused."""
    if not isinstance(item, str):
        return item
    try:
        return base64.b64decode("".join(item.split()), validate=True)  # tools that write base64 break its lines
    except ValueError as error:
        raise Refused("is no base64 PNG or JPEG") from error


def _each(function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
    found = []
    for position, item in enumerate(items):
        try:
            found.append(function(item))
        except Refused as error:
            raise Refused(f"image {position} {error}") from error
    return found


def answers(classifier: Classifier, items: list[Any]) -> list[dict[str, Any]]:
    """For each image of a request: `class`, `probability`, and `probabilities` of all classes by name.

    Raises:
        Refused: no images, too many, or one that is none; its position is named.
    """
    if len(items) == 0:
        raise Refused("the list of images is empty")
    if len(items) > MAX_IMAGES:
        raise Refused(f"{len(items)} images, at most {MAX_IMAGES} are taken at once")
    given = _each(unpacked, items)
    together = sum(area(item) for item in given if isinstance(item, bytes))
    if together > MAX_PIXELS_TOGETHER:
        raise Refused(f"the images have {together} pixels together, at most {MAX_PIXELS_TOGETHER} are taken at once")
    batch = _each(classifier.image, given)
    rows = classifier.probabilities(np.stack(batch))
    names = classifier.classes
    return [
        {"class": names[best], "probability": row[best], "probabilities": dict(zip(names, row, strict=True))}
        for best, row in zip(rows.argmax(axis=1).tolist(), rows.tolist(), strict=True)
    ]


if not __package__:  # run by its path, by MLflow
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    class BadRequest(MlflowException):
        """A 400 that says the reason alone: the server would put everything that it was sent before it."""

        def __init__(self, reason: str) -> None:
            self._reason = reason
            super().__init__(reason, error_code=INVALID_PARAMETER_VALUE)

        @property
        def message(self) -> str:
            return self._reason

        @message.setter
        def message(self, text: str) -> None:
            """Stays what it was."""

    class Student(mlflow.pyfunc.PythonModel):
        """Takes uint8 images (H, W, C) as nested lists, or PNG and JPEG files as base64 strings, in a list."""

        def load_context(self, context: Any) -> None:
            self.classifier = Classifier(context.artifacts["net"], context.artifacts["meta"])

        def predict(
            self, context: Any, model_input: list[Any], params: dict[str, Any] | None = None
        ) -> list[dict[str, Any]]:
            """See `answers`."""
            try:
                return answers(self.classifier, model_input)
            except Refused as error:
                raise BadRequest(str(error)) from error

    mlflow.models.set_model(Student())
