"""The CIFAR networks are those of the published checkpoints.

`published_keys.json` holds facts about the published definitions (RepDistiller; pytorch-cifar-models agrees on the
6n+2 ResNets): state-dict names and shapes, parameter counts, and their logits for weights and images in closed form.
"""

import hashlib
import json
from pathlib import Path

import pytest
import timm
import torch

import models.cifar as cifar
from models.cifar.base import MEAN, STD

PUBLISHED = json.loads((Path(__file__).parent / "published_keys.json").read_text())
CHECKPOINT = Path(__file__).parents[3] / "shared/weights/cifar100_resnet56-f2eff4c8.pt"

# Millions of parameters with 100 classes, as the KD tables give them.
TABLE = {
    "resnet8x4": 1.23,
    "resnet32x4": 7.43,
    "wrn_40_2": 2.26,
    "wrn_16_2": 0.70,
    "wrn_40_1": 0.57,
    "vgg8": 3.97,
    "vgg13": 9.46,
    "mobilenetv2_half": 0.81,
    "shufflenet_v1": 0.95,
    "shufflenet_v2": 1.36,
    "resnet20": 0.28,
    "resnet56": 0.86,
    "resnet110": 1.74,
    "resnet50": 23.71,
}
# Members that are cheap to run, one at least per family.
SAMPLE = ["resnet8", "resnet18", "wrn_16_2", "vgg8", "mobilenetv2_half", "shufflenet_v1", "shufflenet_v2"]


def shapes(state):
    return {name: "x".join(map(str, value.shape)) for name, value in sorted(state.items())}


def closed_form(state):
    """Weights that follow from names and shapes alone, at a scale that keeps activations near 1."""
    filled = {name: torch.zeros_like(value, device="cpu") for name, value in state.items()}
    for name, value in state.items():
        if not value.dtype.is_floating_point:
            continue
        phase = int(hashlib.sha256(name.encode()).hexdigest()[:4], 16)
        wave = torch.sin(1.7 * torch.arange(value.numel(), dtype=torch.float64) + phase)
        if name.endswith("running_var"):
            wave = 1 + 0.3 * wave
        elif value.dim() >= 2:
            wave = wave * (3 * value.shape[0] / value.numel()) ** 0.5
        elif name.endswith("weight"):
            wave = 1 + 0.2 * wave
        else:
            wave = 0.2 * wave
        filled[name] = wave.reshape(value.shape).to(value.dtype)
    return filled


def images(size=32):
    i = torch.arange(2 * 3 * size * size, dtype=torch.float64)
    return (torch.sin(0.37 * i) + torch.cos(0.011 * i)).reshape(2, 3, size, size).float()


def test_all_published_networks_are_registered_with_timm():
    assert set(timm.list_models("cifar_*")) == set(PUBLISHED)
    cfg = timm.models.get_pretrained_cfg("cifar_wrn_40_2")
    assert (cfg.input_size, cfg.mean, cfg.std, cfg.num_classes) == ((3, 32, 32), MEAN, STD, 100)
    assert timm.models.model_entrypoint("cifar_wrn_40_2") is cifar.wrn.cifar_wrn_40_2
    assert cifar.wrn.cifar_wrn_40_2.__name__ == "cifar_wrn_40_2"


@pytest.mark.step  # the largest networks of the family, too
@pytest.mark.parametrize("name", PUBLISHED)
def test_state_dict_and_logits_are_the_published_ones(name):
    row = PUBLISHED[name]
    with torch.device("meta"):  # not initialised
        net = timm.create_model(name).eval()
    state = net.state_dict()
    if "shapes" in row:
        assert shapes(state) == row["shapes"]
    lines = "\n".join(f"{k} {s}" for k, s in shapes(state).items())
    assert (len(state), hashlib.sha256(lines.encode()).hexdigest()) == (row["entries"], row["sha256"])
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters == row["parameters"]
    short = name.removeprefix("cifar_")
    if short in TABLE:
        assert abs(parameters / 1e6 - TABLE[short]) <= 0.005 + 1e-9
    net.load_state_dict(closed_form(state), assign=True)
    with torch.no_grad():
        for size, key in ((32, "logits"), (64, "logits_64")):
            if key in row:
                torch.testing.assert_close(net(images(size))[:, :4], torch.tensor(row[key]), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not CHECKPOINT.exists(), reason="the published checkpoint is not beside the checkout")
def test_the_published_resnet56_loads_strictly():
    state = torch.load(CHECKPOINT, weights_only=True)
    timm.create_model("cifar_resnet56").load_state_dict(state, strict=True)


@pytest.mark.parametrize("name", SAMPLE)
def test_timm_interface(name):
    net = timm.create_model(f"cifar_{name}", num_classes=7, in_chans=1, drop_rate=0.0).eval()
    x = torch.linspace(-1, 1, 2 * 32 * 32).reshape(2, 1, 32, 32)
    with torch.no_grad():
        raw, expected = net.forward_features(x), net(x)
        pooled = net.forward_head(raw, pre_logits=True)
        assert pooled.shape == (2, net.num_features)
        torch.testing.assert_close(pooled, raw.mean((2, 3)))
        torch.testing.assert_close(net.get_classifier()(pooled), expected)
        final, maps = net.forward_intermediates(x)
        torch.testing.assert_close(final, raw)
        for info, feature in zip(net.feature_info, maps, strict=True):
            assert feature.shape == (2, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])
            net.get_submodule(info["module"])
        first = net.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
        assert torch.equal(first[0], maps[0])
        assert len(first) == 1
    net.reset_classifier(3)
    assert net.num_classes == 3
    assert net(x).shape == (2, 3)
    net.reset_classifier(0)
    assert net(x).shape == (2, net.num_features)
    with pytest.raises(ValueError, match="NHWC"):
        net.forward_intermediates(x, output_fmt="NHWC")


def test_features_only_gives_activated_maps():
    net = timm.create_model("cifar_vgg8", features_only=True, out_indices=(0, 2, 4)).eval()
    with torch.no_grad():
        maps = net(images())
    assert [m.shape[1:] for m in maps] == [(64, 32, 32), (256, 8, 8), (512, 4, 4)]
    assert net.feature_info.channels() == [64, 256, 512]
    assert all((m >= 0).all() and (m == 0).any() for m in maps)


@pytest.mark.parametrize(("name", "coarse"), [("cifar_resnet8", 3), ("cifar_wrn_16_2", 3), ("cifar_vgg8", 5)])
def test_layer_groups_are_stem_stages_head(name, coarse):
    from timm.models._manipulate import group_parameters

    net = timm.create_model(name)
    groups = group_parameters(net, net.group_matcher(coarse=True), reverse=True)
    assert set(groups) == {n for n, _ in net.named_parameters()}
    stem = 0 if "vgg" in name else 1
    assert max(groups.values()) == coarse + stem
    assert groups[f"{net.head_name}.weight"] == coarse + stem
    blocks = {n: g for n, g in groups.items() if n.startswith(("layer", "block"))}
    assert sorted(set(blocks.values())) == list(range(stem, coarse + stem))
    fine = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    assert max(fine.values()) >= coarse + stem


def test_dropout_acts_before_the_classifier_in_training_only():
    net = timm.create_model("cifar_resnet8", drop_rate=0.5)
    raw = torch.ones(4, 64, 8, 8)
    assert set(net.forward_head(raw, pre_logits=True).unique().tolist()) == {0.0, 2.0}
    assert (net.eval().forward_head(raw, pre_logits=True) == 1).all()


def test_convolutions_start_from_he_normal():
    """Fan-out variance 2/(k²·C_out) (He et al. 2015); a sample of 18,432 weights gives it within 5%."""
    torch.manual_seed(0)
    weight = timm.create_model("cifar_resnet20").get_parameter("layer3.0.conv1.weight")
    assert abs(weight.var().item() / (2 / (9 * 64)) - 1) < 0.05
