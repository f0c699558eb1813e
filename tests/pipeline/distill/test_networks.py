"""Weights of other code bases: what they do not say about themselves is said when they are loaded."""

from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from models import zoo
from pipeline.distill import networks
from pipeline.errors import UserError
from tests.pipeline.training.builders import image_data


@pytest.mark.parametrize("small", [True, False])
def test_what_is_said_of_weights_without_a_record(small: bool, tmp_path: Path) -> None:
    """timm's own weights fit the stem for small images, too, and compute something else there."""
    path = tmp_path / "resnet10t.pt"
    theirs = timm.create_model("resnet10t", num_classes=4).eval()
    torch.save(theirs.state_dict(), path)
    data = replace(image_data(size=32), crop_pct=0.875)
    net = zoo.create_model("resnet10t", 4, small_input=small).eval()
    assert not networks.load(net, path, f"student={path}", data).get("mean")
    x = torch.rand(2, 3, 32, 32)
    assert torch.allclose(net(x).logits, theirs(x), atol=1e-5) == (not small)
    said = networks.preparation(net, data)
    assert "mean [0.5, 0.4, 0.45] and deviation [0.25, 0.2, 0.3], 87.5 % of" in said
    assert ("dataset.small_input=false" in said) == small


def test_a_file_is_named_once(tmp_path: Path) -> None:
    path = tmp_path / "resnet10t.pt"
    torch.save(timm.create_model("resnet10t", num_classes=5).state_dict(), path)
    with pytest.raises(UserError) as refused:
        networks.load(zoo.create_model("resnet10t", 4), path, f"student={path}", image_data(size=32))
    assert str(refused.value).count(str(path)) == 1
    assert "5" in str(refused.value)
