"""What a served student is compared with, and how it becomes a champion."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import weights, zoo
from pipeline.compose.compose import compose
from pipeline.data import sources
from tests.steps.lab import CLASSES, SIZE, Lab, client, see


def checkpoint(lab: Lab, file: Path) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 images (n, H, W, C) -> probabilities (n, N) of a training checkpoint, in PyTorch."""
    data = sources.load(compose(str(lab.cfg)).dataset)
    net = zoo.create_model("cifar_resnet8", len(CLASSES), image_size=SIZE).eval()
    weights.load_weights(net, file)

    def probabilities(x: np.ndarray) -> np.ndarray:
        prepared = torch.tensor((x / 255 - np.array(data.mean)) / np.array(data.std), dtype=torch.float32)
        with torch.no_grad():
            found: np.ndarray = torch.softmax(net(prepared.permute(0, 3, 1, 2)).logits, dim=1).numpy()
        return found

    return probabilities


def crown(uri: str, run: str, name: str) -> str:
    """Make the model that a delivered run has logged version 1 of `name`, and its champion; the model's id."""
    mlflow: Any = client(uri)
    (model_id,) = see(uri, run).models_out
    mlflow.create_registered_model(name)
    mlflow.create_model_version(name, f"models:/{model_id}", run, model_id=model_id)
    mlflow.set_registered_model_alias(name, "champion", "1")
    return model_id
