"""The wrapper yields what the network computes, for every layout of features that timm has."""

import functools

import pytest
import timm
import torch
from torch import nn

from models.features import check_head, paired_maps, to_nchw
from models.fold import folded
from models.zoo import create_model

X = torch.linspace(-30, 30, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)

# name → (C of feat_2d, shape of feat_4d) at 32 pixels with an adapted stem. Convolutional stems: 32 divided by the
# strides behind the stem (2³ for ResNet and DenseNet, 2⁴ for the others); patch stems: 4×4 by construction.
FAMILIES = {
    "test_resnet": (96, (96, 4, 4)),
    "densenet121": (1024, (1024, 4, 4)),
    "convnext_atto": (320, (320, 4, 4)),
    "swin_tiny_patch4_window7_224": (768, (768, 4, 4)),
    "vit_tiny_patch16_224": (192, (192, 4, 4)),
    "mobilenetv2_100": (1280, (1280, 2, 2)),
    "mobilenetv3_small_100": (1024, (576, 2, 2)),
    "regnety_002": (368, (368, 2, 2)),
    "resnetv2_50x1_bit": (2048, (2048, 4, 4)),  # its head is a convolution
    "cifar_wrn_16_2": (128, (128, 8, 8)),
}


@functools.cache
def network(name):
    return create_model(name, 10, adapter_dim=16).eval()


@pytest.mark.step  # whole networks of timm
@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass_yields_logits_features_and_map(name, monkeypatch):
    width, shape = FAMILIES[name]
    model = network(name)
    calls = []
    model.net.register_forward_hook(lambda *_: calls.append("net"))
    whole = model.net.forward_features
    monkeypatch.setattr(
        model.net, "forward_features", lambda x, **kwargs: (calls.append("features"), whole(x, **kwargs))[1]
    )
    with torch.no_grad():
        out = model(X)
        assert calls == ["features"]
        expected = model.net(X)
    torch.testing.assert_close(out.logits, expected)
    assert model.feature_dim == width
    assert model.num_classes == 10
    assert out.feat_2d.shape == (2, width)
    assert out.feat_4d.shape == (2, *shape)
    assert out.distill_feat.shape == (2, 16)
    torch.testing.assert_close(out.distill_feat, model.distillation_adapter(out.feat_2d))
    if name in ("cifar_wrn_16_2", "test_resnet"):
        torch.testing.assert_close(out.feat_4d.mean((2, 3)), out.feat_2d)


def test_what_a_replayed_pass_has_given_stays_as_it_was(monkeypatch):
    """A CUDA graph writes to the same place whenever it is replayed, and evaluation keeps what many batches gave."""

    def replaying(run, mode):
        assert mode == "reduce-overhead"
        places = []

        def replay(net, x, *asked):
            *found, maps = run(net, x, *asked)
            if not places:
                places.extend(map(torch.empty_like, (*found, *maps)))
            for place, out in zip(places, (*found, *maps), strict=True):
                place.copy_(out)
            return *places[:3], tuple(places[3:])

        return replay

    monkeypatch.setattr(torch, "compile", replaying)
    model = create_model("cifar_resnet8", 10).eval()
    with torch.no_grad():
        expected = [model(x) for x in (X, -X)]
        model.compile_pass(graphs=True)
        found = [model(x) for x in (X, -X)]
    for seen, other in zip(found, expected, strict=True):
        assert torch.equal(seen.logits, other.logits)
        assert torch.equal(seen.feat_2d, other.feat_2d)
        assert torch.equal(seen.feat_4d, other.feat_4d)


@pytest.mark.step  # a whole network of timm
def test_swin_map_is_the_nhwc_output_with_channels_first():
    model = network("swin_tiny_patch4_window7_224")
    with torch.no_grad():
        raw, out = model.net.forward_features(X), model(X)
    assert raw.shape == (2, 4, 4, 768)
    assert torch.equal(out.feat_4d[1, :, 2, 3], raw[1, 2, 3])


def test_vit_map_is_the_token_grid_in_row_order_without_prefix():
    model = network("vit_tiny_patch16_224")
    with torch.no_grad():
        raw, out = model.net.forward_features(X), model(X)
    assert raw.shape == (2, 17, 192)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        assert torch.equal(out.feat_4d[1, :, row, column], raw[1, 1 + 4 * row + column])
    torch.testing.assert_close(out.feat_2d, raw[:, 0])


def test_maps_are_views():
    raw = torch.randn(2, 4, 5, 7)
    net = nn.Module()
    net.num_features = 7
    assert to_nchw(net, raw).data_ptr() == raw.data_ptr()
    assert to_nchw(net, raw).shape == (2, 7, 4, 5)
    net.num_features = 4
    assert to_nchw(net, raw) is raw
    tokens = torch.randn(2, 9, 7)
    assert to_nchw(net, tokens).data_ptr() == tokens.data_ptr()


def by_hand(net, x):
    """Each stage's map before its last ReLU, of a CIFAR ResNet with one block in each."""

    def normalised(norm, x):
        scale, shift = norm.weight / (norm.running_var + norm.eps).sqrt(), norm.bias
        return (x - norm.running_mean[:, None, None]) * scale[:, None, None] + shift[:, None, None]

    maps, x = [], normalised(net.bn1, net.conv1(x)).clamp_min(0)
    for layer in (net.layer1, net.layer2, net.layer3):
        (block,) = layer
        y = normalised(block.bn2, block.conv2(normalised(block.bn1, block.conv1(x)).clamp_min(0)))
        conv, norm = block.downsample or (None, None)
        maps.append(y + (x if conv is None else normalised(norm, conv(x))))
        x = maps[-1].clamp_min(0)
    return maps


def test_maps_before_relu_are_those_computed_by_hand_and_of_a_timm_network_those_after():
    model, other = (create_model(name, 10).eval() for name in ("cifar_resnet8", "test_resnet"))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.3, 0.3)
            module.bias.data.uniform_(-0.3, 0.3)
    paired_maps(model, [other], (3, 32, 32), (True, True))
    with torch.no_grad():
        expected = by_hand(model.net, X)
        for net in (model, folded(model, (3, 32, 32))):
            torch.testing.assert_close(list(net(X).maps), expected, rtol=1e-4, atol=1e-5)
        after = other.net.forward_intermediates(X, 3)[1]
        assert all(torch.equal(a, b) for a, b in zip(other(X).maps, after, strict=True))
        paired_maps(model, [other], (3, 32, 32))
        torch.testing.assert_close(list(model(X).maps), [m.relu() for m in expected], rtol=1e-4, atol=1e-5)


def test_checking_leaves_the_network_and_the_generator_alone():
    net = timm.create_model("test_resnet", num_classes=10, drop_rate=0.5)
    net.layer1.eval()  # a partly frozen network
    modes = {n: m.training for n, m in net.named_modules()}
    state = {k: v.clone() for k, v in net.state_dict().items()}
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert check_head(net, (3, 32, 32)) == (2, 96, 1, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


class Scaled(nn.Module):
    """A classifier whose output is not its head on its pooled features."""

    def __init__(self):
        super().__init__()
        self.inner = timm.create_model("cifar_resnet8", num_classes=5)
        self.num_classes, self.num_features = 5, 64

    def __getattr__(self, name):
        forwarded = ("forward_features", "forward_head", "get_classifier")
        return getattr(self.inner, name) if name in forwarded else super().__getattr__(name)

    def forward(self, x):
        return 1.01 * self.inner(x)


def test_a_head_that_is_not_the_network_is_refused():
    with pytest.raises(ValueError, match="not the network's output"):
        check_head(Scaled(), (3, 32, 32))
    with pytest.raises(ValueError, match="deit_tiny_distilled"):
        create_model("deit_tiny_distilled_patch16_224", 10)


def test_a_size_that_the_network_does_not_take_is_named():
    with pytest.raises(ValueError, match="3×2×2 input"):
        check_head(timm.create_model("test_vit", num_classes=5), (3, 2, 2))


@pytest.mark.parametrize(
    ("raw", "message"),
    [([torch.ones(2)], "list"), (torch.ones(2, 7, 3), "7 tokens"), (torch.ones(2, 3), r"\(2, 3\)")],
)
def test_features_without_a_map_are_refused(raw, message):
    with pytest.raises(ValueError, match=message):
        to_nchw(nn.Identity(), raw)
