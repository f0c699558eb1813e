"""Names, stems for small images, and pretrained weights without a network."""

import socket
import time

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from timm.layers import resample_patch_embed

from models import zoo
from models.zoo import create_model, resolve


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("resnet101_scratch", "resnet101"),
        ("resnet152_pretrain_student", "resnet152"),
        ("convnext_t", "convnext_tiny"),
        ("efficientnet_l2", "tf_efficientnet_l2"),
        ("swin", "swin_tiny_patch4_window7_224"),
        ("mobilenet_v2", "mobilenetv2_100"),
        ("mobilenet_v2_scratch", "mobilenetv2_100"),
        ("shufflenet_v2_scratch", "cifar_shufflenet_v2"),
        ("resnet32x4", "cifar_resnet32x4"),
        ("wrn_40_2", "cifar_wrn_40_2"),
        ("ShuffleV1", "cifar_shufflenet_v1"),
        ("resnet18", "resnet18"),  # timm's own, not ours
        ("resnet50.a1_in1k", "resnet50.a1_in1k"),
    ],
)
def test_names_of_the_research_code_and_the_tables(name, full):
    assert resolve(name) == full
    assert resolve(full) == full


@pytest.mark.parametrize(
    ("name", "near"), [("resnet51", "resnet50"), ("cifar_wrn_40_3", "cifar_wrn_40_"), ("", "list")]
)
def test_unknown_names_come_with_near_misses(name, near):
    with pytest.raises(ValueError, match=f"unknown model '{name}'.*{near}"):
        resolve(name)


def test_every_alias_leads_to_a_model():
    assert all(timm.models.is_model(full) for full in zoo.ALIASES.values())


# --- stems ---


@pytest.mark.parametrize(
    ("name", "conv"),
    [("resnet18", "conv1"), ("test_efficientnet", "conv_stem"), ("tf_mobilenetv3_small_minimal_100", "conv_stem")],
)
def test_convolutional_stems_keep_their_kernel_and_lose_their_stride(name, conv):
    plain = create_model(name, 10, small_input=False, image_size=64)
    small = create_model(name, 10, small_input=True)
    assert plain.net.get_submodule(conv).stride == (2, 2)
    assert small.net.get_submodule(conv).stride == (1, 1)
    assert {k: v.shape for k, v in plain.state_dict().items()} == {k: v.shape for k, v in small.state_dict().items()}
    assert (plain.small_input, small.small_input) == (False, True)


def test_resnet_stem_at_32_pixels_is_at_full_resolution():
    net = create_model("resnet18", 10).net
    assert isinstance(net.maxpool, torch.nn.Identity)
    assert net.layer1(net.act1(net.bn1(net.conv1(torch.zeros(2, 3, 32, 32))))).shape == (2, 64, 32, 32)
    assert [info["reduction"] for info in net.feature_info] == [1, 1, 2, 4, 8]


def test_small_input_is_automatic_up_to_64_pixels():
    assert create_model("test_resnet", 10, image_size=64).small_input
    assert not create_model("test_resnet", 10, image_size=65).small_input
    assert create_model("cifar_resnet8", 10, small_input=False).small_input  # made for 32 pixels, whatever is asked


@pytest.mark.parametrize(
    ("name", "size", "patch", "last"),
    [
        ("test_convnext", 32, 1, 4),
        ("test_convnext", 64, 1, 8),
        ("test_convnext", 128, 4, 4),
        ("vit_tiny_patch16_224", 32, 8, 4),
        ("test_vit", 64, 16, 4),
        ("test_vit", 48, 12, 4),
        ("deit_tiny_patch16_224", 32, 8, 4),
    ],
)
def test_patch_stems_get_the_largest_patch_with_a_4x4_last_stage(name, size, patch, last):
    model = create_model(name, 10, small_input=True, image_size=size).eval()
    stem = model.net.stem[0] if "convnext" in name else model.net.patch_embed.proj
    assert stem.kernel_size == stem.stride == (patch, patch)
    with torch.no_grad():
        assert model(torch.zeros(2, 3, size, size)).feat_4d.shape[2:] == (last, last)


def test_networks_tied_to_a_size_are_built_for_the_images():
    model = create_model("vit_tiny_patch16_224", 10, image_size=128)
    assert model.net.patch_embed.grid_size == (8, 8)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("dla46_c", {}, "dla46_c has a stem without stride.*small_input=false"),
        ("inception_next_atto", {}, "patch stem of stride 4"),
        ("convnext_atto_ols", {}, "stays 1×1"),
        ("convnext_atto", {"image_size": 16}, "at least 32"),
        ("repvgg_a0", {}, "repvgg_a0 cannot be used with 3×32×32"),
        ("resnet18.nope", {}, "unknown weights 'nope' of resnet18: timm has a1_in1k, .*; or give resnet18 alone"),
        ("resnet50.a1_in2k", {}, "unknown weights 'a1_in2k' of resnet50: timm has a1_in1k"),
        ("cifar_resnet8.c100", {}, "unknown weights 'c100' of cifar_resnet8: it has none; or give cifar_resnet8"),
        ("cifar_resnet8", {"pretrained": True}, "cifar_resnet8 has no pretrained weights"),
        ("deit_tiny_distilled_patch16_224", {}, "several classifiers .* choose another model"),
        ("swiftformer_xs", {"image_size": 64}, "several classifiers .* choose another model"),
    ],
)
def test_unknown_adaptations_are_refused(name, kwargs, message):
    with pytest.raises(ValueError, match=message) as caught:
        create_model(name, **{"num_classes": 10, **kwargs})
    assert "\n" not in str(caught.value)


def test_building_draws_the_same_weights_from_the_same_seed():
    torch.manual_seed(5)
    first = create_model("cifar_resnet8", 10)
    torch.manual_seed(5)
    second = timm.create_model("cifar_resnet8", num_classes=10)
    assert all(torch.equal(v, second.state_dict()[k]) for k, v in first.net.state_dict().items())


# --- pretrained weights ---


@pytest.fixture(params=["closed", "silent"])
def no_hub(request, monkeypatch, tmp_path):
    """A hub whose port is closed, or that takes connections and never answers; and an empty cache."""
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    if request.param == "closed":
        listening.close()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(zoo, "ANSWER_S", 0.5)
    yield tmp_path
    listening.close()


def test_without_a_network_pretrained_is_one_clear_line_within_seconds(no_hub):
    started = time.monotonic()
    with pytest.raises(ValueError, match=r"of test_resnet could not be loaded \(http://.* does not answer") as caught:
        create_model("test_resnet", 10, pretrained=True)
    assert time.monotonic() - started < 5
    assert "pretrained=false" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not constants.HF_HUB_OFFLINE


def test_weights_in_the_hubs_cache_need_no_network(no_hub):
    source = timm.create_model("test_resnet")
    kept = no_hub / "models--timm--test_resnet.r160_in1k"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text("0" * 40)
    (kept / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(source.state_dict(), kept / "snapshots" / ("0" * 40) / "model.safetensors")
    net = create_model("test_resnet", 10, pretrained=True, image_size=160).net
    assert torch.equal(next(net.parameters()), next(source.parameters()))


@pytest.fixture
def hub(monkeypatch):
    """Stands for the hub: "pretrained" weights are a fresh 1000-class network, handed over by timm's own loader."""
    real, served = timm.create_model, {}

    def create(name, pretrained=False, **kwargs):
        if pretrained:
            served[name] = real(name).state_dict()
            kwargs["pretrained_cfg_overlay"] = {"state_dict": dict(served[name])}
        return real(name, pretrained=pretrained, **kwargs)

    monkeypatch.setattr(zoo.timm, "create_model", create)
    return served


@pytest.mark.step  # whole networks of timm
@pytest.mark.parametrize(
    ("name", "stem", "patch"),
    [
        ("test_convnext", "stem.0.weight", 1),
        ("test_vit", "patch_embed.proj.weight", 8),
        ("swin_tiny_patch4_window7_224", "patch_embed.proj.weight", 1),
    ],
)
def test_pretrained_patch_stems_are_resampled_and_the_rest_is_kept(hub, name, stem, patch):
    state = create_model(name, 10, pretrained=True).net.state_dict()
    source = hub[name]
    expected = resample_patch_embed(source[stem], [patch, patch], interpolation="bicubic", antialias=True)
    torch.testing.assert_close(state[stem], expected)
    blocks = [k for k in source if "mlp.fc1.weight" in k]
    assert blocks
    assert all(torch.equal(state[k], source[k]) for k in blocks)


def test_pretrained_convolutional_stems_are_kept(hub):
    net = create_model("test_resnet", 10, pretrained=True).net
    source = hub["test_resnet"]
    assert all(torch.equal(v, source[k]) for k, v in net.state_dict().items() if not k.startswith("fc."))
    assert next(m for m in net.modules() if isinstance(m, torch.nn.Conv2d)).stride == (1, 1)
