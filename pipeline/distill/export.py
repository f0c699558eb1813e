"""The student in exported form: an ONNX file with a pyfunc around it, a folder for timm, and the fusion's weights."""

import copy
import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from models import stem_timm
from models.features import FeatureNet
from models.small_input import is_patch_family
from models.weights import METADATA_KEY
from pipeline.data.sources import ImageData
from pipeline.files import write_atomically
from pipeline.runs.run import Run
from pipeline.served import code as served
from pipeline.served.student_pyfunc import session
from pipeline.training.methods.asib.fusion import Fusion

logger = logging.getLogger("asib")
OUTPUTS = ("probabilities", "logits")
"""Outputs of the ONNX file, both (n, N)."""
TOLERANCE = 1e-4
"""Allowed difference between the ONNX file and PyTorch: probabilities absolute, logits relative to the largest."""
CHECKED = 32
"""Images of the test split on which they are compared."""


def save_fusion(fusion: Fusion, path: Path, data: ImageData) -> None:
    """Adapters, IB-MBM and head as safetensors: `adapters.*`, `ib_mbm.*`, `head.*`; with the classes of its logits."""
    state = {k: v.detach().cpu().contiguous() for k, v in fusion.state_dict().items()}
    record = {"classes": list(data.classes), "mean": list(data.mean), "std": list(data.std)}
    write_atomically(path, save(state, metadata={METADATA_KEY: json.dumps(record, sort_keys=True)}))


# ONNX ----------------------------------------------------------------------------------------------------------------


class Served(nn.Module):
    """uint8 NHWC images in, class probabilities and logits out: preprocessing is part of the exported graph."""

    def __init__(self, net: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("scale", 1.0 / (255.0 * torch.tensor(std)).view(1, -1, 1, 1))
        self.register_buffer("shift", (torch.tensor(mean) / torch.tensor(std)).view(1, -1, 1, 1))
        self.scale: Tensor
        self.shift: Tensor

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = images.permute(0, 3, 1, 2).float() * self.scale - self.shift
        logits = self.net(x)
        return torch.softmax(logits, dim=1), logits


def plain(net: FeatureNet) -> nn.Module:
    """A copy of the wrapped timm network, ready for export: on the CPU, in eval mode, weights contiguous."""
    copied: nn.Module = copy.deepcopy(net.net).cpu().to(memory_format=torch.contiguous_format)
    return copied.float().eval()


def to_onnx(net: nn.Module, data: ImageData, path: Path) -> None:
    """Export a `plain` network with its preprocessing; any batch size."""
    served = Served(net, data.mean, data.std)
    size = data.image_size
    example = torch.zeros((2, size, size, data.in_chans), dtype=torch.uint8)
    batch = ({0: torch.export.Dim("batch")},)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(served, (example,), dynamic_shapes=batch)
        torch.onnx.export(
            program,
            (example,),
            str(path),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=["images"],
            output_names=list(OUTPUTS),
            dynamic_shapes=batch,
        )


def check_onnx(path: Path, net: nn.Module, data: ImageData) -> dict[str, float]:
    """Compare an ONNX file, run by onnxruntime, with the `plain` network it was made from, on images of the test split.

    Returns the largest difference of `OUTPUTS`, absolute.

    Raises RuntimeError: they disagree by more than `TOLERANCE`, on a batch or on a single image.
    """
    images = data.test_x[:: max(1, len(data.test_x) // CHECKED)][:CHECKED]
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (data.mean, data.std))
    with torch.no_grad():
        logits = net((images.float() / 255.0 - mean) / std)
    expected = {"probabilities": torch.softmax(logits, dim=1).numpy(), "logits": logits.numpy()}
    running = session(str(path))
    given = np.ascontiguousarray(np.moveaxis(images.numpy(), 1, -1))
    largest = dict.fromkeys(OUTPUTS, 0.0)
    for count in (len(given), 1):
        for name, found in zip(OUTPUTS, running.run(list(OUTPUTS), {"images": given[:count]}), strict=True):
            wanted = expected[name][:count]
            difference = float(np.abs(found - wanted).max())
            allowed = TOLERANCE * max(1.0, float(np.abs(wanted).max()))
            if not difference <= allowed:  # the comparison is also false if either is NaN
                raise RuntimeError(
                    f"the exported student is not logged: on {count} test images the {name} of its ONNX file differ "
                    f"from PyTorch's by up to {difference:.3g}, allowed are {allowed:.3g}"
                )
            largest[name] = max(largest[name], difference)
    return largest


# timm ----------------------------------------------------------------------------------------------------------------


def to_timm(net: nn.Module, model: FeatureNet, data: ImageData, folder: Path) -> None:
    """Write `model.safetensors` and `config.json`, as `timm.create_model("local-dir:<folder>", pretrained=True)` reads.

    Our own architectures load once `models.cifar`, and timm's with a changed stem once `models.stem_timm`, is imported.
    `net`: the `plain` network of `model`.
    """
    from timm.models import model_entrypoint, save_for_hf

    size = (data.in_chans, data.image_size, data.image_size)
    config: dict[str, Any] = {"label_names": list(data.classes)}
    base = str(model.architecture)
    changed = model.small_input and not base.startswith("cifar_")
    if changed and not is_patch_family(model_entrypoint(base).__module__):
        config |= {"pretrained_cfg": {"architecture": stem_timm.NAME}, "model_args": {"base": base.partition(".")[0]}}
    # how the served model resizes pictures
    shape = {"crop_pct": data.crop_pct or 1.0, "crop_mode": "center" if data.crop_pct else "squash"}
    shown = {"mean": data.mean, "std": data.std, "interpolation": "bicubic", **shape}
    save_for_hf(net, str(folder), config, safe_serialization=True, data_config={"input_size": size, **shown})


# MLflow --------------------------------------------------------------------------------------------------------------


def log_student(
    run: Run, net: FeatureNet, data: ImageData, results: dict[str, float], config_hash: str | None = None
) -> None:
    """The student as a servable model: ONNX, class names, preprocessing, an example; weights and timm's folder with it.

    `config_hash`: of what made it; None: of the run's configuration.

    None is made of a student that classifies by the mean features of kept images.

    Raises RuntimeError: its ONNX file disagrees with the network.
    """
    if run.config.continual.classifier == "nearest_mean":
        logger.info("no model is logged: continual.classifier=nearest_mean classifies by images, not by the head")
        return
    folder = run.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    network = plain(net)
    to_onnx(network, data, folder / "student.onnx")
    difference = check_onnx(folder / "student.onnx", network, data)
    to_timm(network, net, data, folder / "timm")
    (folder / served.PYFUNC.name).write_text(served.CODE, encoding="utf-8")
    shutil.copy(run.folder / "checkpoints/student.safetensors", folder)
    meta: dict[str, Any] = {
        "classes": list(data.classes),
        "image_size": data.image_size,
        "in_chans": data.in_chans,
        "crop_pct": data.crop_pct,
        "mean": list(data.mean),
        "std": list(data.std),
        "architecture": net.architecture,
        "data_digest": data.digest,
        "onnx_difference": difference,
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=2))
    example = np.moveaxis(data.test_x[:1].numpy(), 1, -1).tolist()
    (folder / "example.json").write_text(json.dumps(example))
    run.journal.model(
        folder,
        name="student",
        python_model=folder / served.PYFUNC.name,
        artifacts={
            "net": folder / "student.onnx",
            "meta": folder / "meta.json",
            "weights": folder / "student.safetensors",
            "timm": folder / "timm",
        },
        input_example=folder / "example.json",
        pip_requirements=served.requirements(),
        params={"architecture": net.architecture, "config_hash": config_hash or run.config_hash},
        metrics={k: v for k, v in results.items() if k.startswith("final/")},
        model_type="classifier",
    )
