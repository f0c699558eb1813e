"""Exports of a student: what timm and onnxruntime make of them, and that a wrong one is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models import zoo
from models.features import FeatureNet
from pipeline.data.sources import ImageData
from pipeline.distill import export
from pipeline.served import code

ROOT = Path(__file__).resolve().parents[3]
CLASSES = ("ash", "birch", "cedar", "date", "elm", "fir")
NETS = {
    "cifar": ("cifar_wrn_16_1", 32, 1, "cifar_wrn_16_1"),
    "patches": ("vit_tiny_patch16_224", 32, 3, "vit_tiny_patch16_224"),  # smaller ones: timm's own argument
    "large": ("resnet10t.c3_in1k", 96, 3, "resnet10t"),
    "stem": ("resnet10t.c3_in1k", 32, 3, "asib_small_input"),
}
"""Folder: network, image size, channels, architecture in config.json."""
READ = """
import sys, timm, torch

def read(name):
    net = timm.create_model(f"local-dir:{name}", pretrained=True).eval()
    with torch.no_grad():
        torch.save(net(torch.load(f"{name}.x.pt", weights_only=True)), f"{name}.pt")

def refused(name):
    try:
        read(name)
    except RuntimeError as error:
        assert "Unknown model" in str(error), error
    else:
        raise AssertionError(name)

read("patches"), read("large"), refused("cifar"), refused("stem")
import models.cifar
read("cifar"), refused("stem")
import models.stem_timm
read("stem")
assert not [name for name in sys.modules if name.startswith(("pipeline", "mlflow", "hydra"))]
"""


def images(size: int, chans: int) -> ImageData:
    pixels = torch.randint(0, 256, (40, chans, size, size), dtype=torch.uint8, generator=torch.manual_seed(5))
    labels = torch.arange(40) % len(CLASSES)
    mean, std = (0.5, 0.4, 0.3)[:chans], (0.2, 0.3, 0.1)[:chans]
    return ImageData("made", pixels, labels, pixels, labels, CLASSES, mean, std, "digest", "here")


def student(name: str, size: int, chans: int = 3) -> FeatureNet:
    torch.manual_seed(3)
    net = zoo.create_model(name, len(CLASSES), image_size=size, in_chans=chans)
    for module in net.modules():  # statistics of a trained network: not those that cancel out
        if isinstance(module, torch.nn.BatchNorm2d):
            module.get_buffer("running_mean").uniform_(-0.1, 0.1)
            module.get_buffer("running_var").uniform_(0.5, 1.5)
    return net.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[torch.nn.Module, ImageData, Path]:
    """A grey student of 16 pixels and its ONNX file."""
    data = images(16, 1)
    net = export.plain(student("cifar_resnet8", 16, 1))
    path = tmp_path_factory.mktemp("onnx") / "student.onnx"
    export.to_onnx(net, data, path)
    return net, data, path


@pytest.mark.slow
def test_timm_builds_the_students_from_their_folders_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Those that timm alone would make another network of, it does not know before our modules are imported."""
    expected = {}
    for folder, (name, size, chans, architecture) in NETS.items():
        data, net = images(size, chans), student(name, size, chans)
        export.to_timm(export.plain(net), net, data, tmp_path / folder)
        assert sorted(p.name for p in (tmp_path / folder).iterdir()) == ["config.json", "model.safetensors"]
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert (config["architecture"], config["num_classes"]) == (architecture, len(CLASSES))
        assert config["label_names"] == list(CLASSES)
        described = config["pretrained_cfg"]
        assert described["input_size"] == [chans, size, size]
        assert (described["mean"], described["std"]) == (list(data.mean), list(data.std))
        x = torch.randn(3, chans, size, size, generator=torch.manual_seed(1))
        torch.save(x, tmp_path / f"{folder}.x.pt")
        with torch.no_grad():
            expected[folder] = net(x).logits
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", READ], check=True, cwd=tmp_path, env=environment)
    for folder, logits in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{folder}.pt", weights_only=True), logits)


def test_onnx_and_pytorch_agree_on_any_batch_size(exported: tuple[torch.nn.Module, ImageData, Path]) -> None:
    """PyTorch in float64, preprocessing written out."""
    import onnxruntime

    net, data, path = exported
    assert all(value < 1e-5 for value in export.check_onnx(path, net, data).values())
    images = np.asarray(data.test_x)
    x = (torch.from_numpy(images).double() / 255 - data.mean[0]) / data.std[0]
    with torch.no_grad():
        logits = export.plain(FeatureNet(net)).double()(x).numpy()
    exponents = np.exp(logits - logits.max(axis=1, keepdims=True))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for count in (1, 2, 7, 40):
        given = np.ascontiguousarray(np.moveaxis(images, 1, -1)[:count])
        probabilities, found = session.run(["probabilities", "logits"], {"images": given})
        np.testing.assert_allclose(found, logits[:count], atol=1e-4)
        expected = exponents[:count] / exponents[:count].sum(axis=1, keepdims=True)
        np.testing.assert_allclose(probabilities, expected, atol=1e-5)


@pytest.mark.parametrize(("change", "says"), [(0.003, "probabilities"), (float("nan"), "nan")])
def test_an_onnx_file_that_disagrees_is_refused_with_the_difference(
    exported: tuple[torch.nn.Module, ImageData, Path], change: float, says: str
) -> None:
    net, data, path = exported
    other = export.plain(FeatureNet(net))
    with torch.no_grad():
        other.get_parameter("fc.bias")[0] += change
    with pytest.raises(RuntimeError, match=rf"not logged: on 32 test images.*{says}"):
        export.check_onnx(path, other, data)


def test_preprocessing_is_part_of_what_is_compared(exported: tuple[torch.nn.Module, ImageData, Path]) -> None:
    net, data, path = exported
    with pytest.raises(RuntimeError, match="differ"):
        export.check_onnx(path, net, replace(data, std=(0.25,)))


def test_the_served_models_requirements_are_pinned() -> None:
    from importlib.metadata import version

    assert f"onnxruntime=={version('onnxruntime')}" in code.requirements()
    assert all("==" in line for line in code.requirements())
