"""The student as others use it: an ONNX file with a pyfunc around it, and the fusion's weights."""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from models.features import FeatureNet
from pipeline.data.sources import ImageData
from pipeline.experiment.run import Run
from pipeline.training.checkpoint import write_atomically
from pipeline.training.fusion import Fusion

PYFUNC = Path(__file__).with_name("student_pyfunc.py")


def save_fusion(fusion: Fusion, path: Path) -> None:
    """Adapters, IB-MBM and head as safetensors: `adapters.*`, `ib_mbm.*`, `head.*`."""
    write_atomically(path, save({k: v.detach().cpu().contiguous() for k, v in fusion.state_dict().items()}))


class Served(nn.Module):
    """uint8 NHWC images in, class probabilities out: preprocessing is part of the exported graph."""

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("scale", 1.0 / (255.0 * torch.tensor(std)).view(1, -1, 1, 1))
        self.register_buffer("shift", (torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1))
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float() * self.scale - self.shift
        return torch.softmax(self.net(x), dim=1)


def to_onnx(net: FeatureNet, data: ImageData, path: Path) -> None:
    """Export a student with its preprocessing; any batch size. The network is left as it was."""
    import copy
    import logging

    served = Served(copy.deepcopy(net.net).cpu().to(memory_format=torch.contiguous_format).eval(), data.mean, data.std)
    size = data.image_size
    example = torch.zeros((2, size, size, data.in_chans), dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(served, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.onnx.export(
            program,
            (example,),
            str(path),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["images"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
        )


def log_student(
    run: Run, net: FeatureNet, data: ImageData, results: dict[str, float], config_hash: str | None = None
) -> None:
    """The student as a servable model: ONNX, class names, preprocessing, an example, and its safetensors beside it.

    Args:
        config_hash: of what made it; None: of the run's configuration.
    """
    folder = run.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    to_onnx(net, data, folder / "student.onnx")
    shutil.copy(PYFUNC, folder / PYFUNC.name)
    shutil.copy(run.folder / "checkpoints/student.safetensors", folder)
    meta: dict[str, Any] = {
        "classes": list(data.classes),
        "image_size": data.image_size,
        "in_chans": data.in_chans,
        "mean": list(data.mean),
        "std": list(data.std),
        "architecture": net.architecture,
        "data_digest": data.digest,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))
    example = np.moveaxis(data.test_x[:1].numpy(), 1, -1).tolist()
    (folder / "example.json").write_text(json.dumps(example))
    run.journal.model(
        folder,
        name="student",
        python_model=folder / PYFUNC.name,
        artifacts={
            "net": folder / "student.onnx",
            "meta": folder / "meta.json",
            "weights": folder / "student.safetensors",
        },
        input_example=folder / "example.json",
        pip_requirements=["mlflow", "numpy", "onnxruntime", "pillow"],
        params={"architecture": net.architecture, "config_hash": config_hash or run.config_hash},
        metrics={k: v for k, v in results.items() if k.startswith("final/")},
        model_type="classifier",
    )
