"""A student as MLflow serves it: images in, class names and probabilities out.

Logged with the model and loaded without this project: it needs mlflow, numpy, onnxruntime and pillow only.
"""

import base64
import binascii
import io
import json
from typing import Any

import mlflow
import numpy as np
from mlflow.exceptions import MlflowException


class Student(mlflow.pyfunc.PythonModel):
    """Takes uint8 images (H, W, C) as nested lists, or PNG and JPEG files as base64 strings, in a list."""

    def load_context(self, context: Any) -> None:
        import onnxruntime

        with open(context.artifacts["meta"], encoding="utf-8") as file:
            self.meta = json.load(file)
        self.session = onnxruntime.InferenceSession(context.artifacts["net"], providers=["CPUExecutionProvider"])

    def predict(
        self, context: Any, model_input: list[Any], params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """For each image: `class`, `probability`, and `probabilities` of all classes by name."""
        if len(model_input) == 0:
            raise MlflowException.invalid_parameter_value("the list of images is empty")
        batch = np.stack([self._image(item, position) for position, item in enumerate(model_input)])
        (found,) = self.session.run(None, {"images": batch})
        names = self.meta["classes"]
        return [
            {
                "class": names[int(row.argmax())],
                "probability": float(row.max()),
                "probabilities": {name: float(p) for name, p in zip(names, row, strict=True)},
            }
            for row in found
        ]

    def _image(self, item: Any, position: int) -> np.ndarray:
        size, channels = self.meta["image_size"], self.meta["in_chans"]
        image = self._decode(item, position) if isinstance(item, str) else np.asarray(item)
        if image.shape != (size, size, channels):
            raise MlflowException.invalid_parameter_value(
                f"image {position} has shape {image.shape}, expected ({size}, {size}, {channels})"
            )
        if image.dtype.kind not in "iu" or image.min() < 0 or image.max() > 255:
            raise MlflowException.invalid_parameter_value(f"image {position}: pixels must be integers from 0 to 255")
        return image.astype(np.uint8)

    def _decode(self, text: str, position: int) -> np.ndarray:
        from PIL import Image, UnidentifiedImageError

        size, channels = self.meta["image_size"], self.meta["in_chans"]
        try:
            with Image.open(io.BytesIO(base64.b64decode(text, validate=True))) as picture:
                fitted = picture.convert("RGB" if channels == 3 else "L").resize((size, size))
        except (binascii.Error, UnidentifiedImageError, OSError, ValueError) as error:
            raise MlflowException.invalid_parameter_value(f"image {position} is no base64 PNG or JPEG") from error
        return np.asarray(fitted).reshape(size, size, channels)


mlflow.models.set_model(Student())
