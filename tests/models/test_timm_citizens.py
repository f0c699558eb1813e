"""Every CIFAR network keeps the contract that timm's own tests ask of a convolutional network.

Left out is `torch.jit.script`: torch deprecates it and does not support it from Python 3.14 on.
"""

import copy
import io

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import FeatureInfo, get_pretrained_cfg
from timm.models._features_fx import create_feature_extractor
from timm.optim import create_optimizer_v2

import models.cifar as cifar
from models.features import decompose

NAMES = timm.list_models("cifar_*")
# One member of each family that is cheap to run.
SAMPLE = ("resnet8", "resnet18", "wrn_16_2", "vgg8", "mobilenetv2_half", "shufflenet_v1", "shufflenet_v2")
SAMPLE = tuple(f"cifar_{name}" for name in SAMPLE)
ALL = [pytest.param(name, marks=() if name in SAMPLE else pytest.mark.slow) for name in NAMES]
COMPILED = [  # one of each family
    *("cifar_resnet8", "cifar_vgg8"),
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("cifar_wrn_16_1", "cifar_mobilenetv2_half", "cifar_shufflenet_v1", "cifar_shufflenet_v2")
    ),
]
pytestmark = pytest.mark.step  # timm's own checks: tracing, compiling, hooks, on every family
X = torch.linspace(-30, 30, 2 * 3 * 32 * 32).sin().reshape(2, 3, 32, 32)


@pytest.fixture(scope="module", params=ALL)
def net(request):
    """A network in eval mode, which tests leave as it is."""
    torch.manual_seed(0)
    return timm.create_model(request.param).eval()


def name_of(net):
    return net.pretrained_cfg["architecture"]


def like(net, **kwargs):
    """The feature extractor of timm with the weights of `net`, of which it may need only a part."""
    with torch.device("meta"):  # not initialised
        made = timm.create_model(name_of(net), features_only=True, **kwargs).eval()
    body = getattr(made, "model", None) or getattr(made, "graph_module", None) or made["body"]
    missing, _ = body.load_state_dict(net.state_dict(), strict=False, assign=True)
    assert not missing
    return made


def equal(found, expected):
    if isinstance(expected, torch.Tensor):
        return torch.equal(found, expected)
    assert len(found) == len(expected)
    return all(map(equal, found, expected))


@torch.no_grad()
def test_the_default_configuration_is_true(net):
    name, net = name_of(net), copy.deepcopy(net)
    cfg = get_pretrained_cfg(name).to_dict()
    x = X[:, :, : cfg["input_size"][1], : cfg["input_size"][2]]
    shape = (2, net.num_features, *cfg["pool_size"])
    assert net.forward_features(x).shape == shape
    assert net.forward_head(net.forward_features(x), pre_logits=True).shape == (2, net.head_hidden_size)
    assert net(x).shape == (2, cfg["num_classes"])
    state = net.state_dict()
    assert state[f"{cfg['first_conv']}.weight"].shape[1] == cfg["input_size"][0]
    assert state[f"{cfg['classifier']}.weight"].shape == (cfg["num_classes"], net.head_hidden_size)
    assert net.get_submodule(cfg["classifier"]) is net.get_classifier()
    for pooling, expected in ((None, shape[:2]), ("max", shape[:2]), ("", shape)):
        net.reset_classifier(0, pooling)
        assert (net.num_classes, net(x).shape) == (0, expected)
    net.reset_classifier(5, "avg")
    assert net(x).shape == (2, 5)
    assert timm.create_model(name, num_classes=0, global_pool="")(x).shape == shape


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_has_a_gradient_and_a_layer_group(name):
    net = timm.create_model(name, num_classes=7, in_chans=1, drop_rate=0.5, global_pool="avgmax")
    out = net(X[:, :1])
    assert out.shape == (2, 7)
    out.mean().backward()
    assert all(p.grad is not None for p in net.parameters())
    groups = create_optimizer_v2(net, "sgd", lr=0.1, weight_decay=1e-4, layer_decay=0.5).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    assert {group["weight_decay"] for group in groups if any(p.ndim > 1 for p in group["params"])} == {1e-4}
    scales = {group["lr_scale"] for group in groups}
    assert max(scales) == 1
    assert len(scales) > len(net.feature_info)


@pytest.mark.parametrize("name", SAMPLE)
def test_checkpointed_stages_give_the_same_gradients(name):
    found = []
    for enable in (False, True):
        torch.manual_seed(0)
        net = timm.create_model(name, num_classes=3)
        net.set_grad_checkpointing(enable)
        net(X).square().sum().backward()
        found.append([p.grad for p in net.parameters()])
    assert equal(*found)


def test_intermediates_are_those_that_indices_name(net):
    info = FeatureInfo(copy.deepcopy(net.feature_info), len(net.feature_info))
    with torch.no_grad():
        final, maps = net.forward_intermediates(X, norm=True, output_fmt="NCHW")
        assert torch.equal(final, net.forward_features(X))
        for feature, chs, reduction in zip(maps, info.channels(), info.reduction(), strict=True):
            assert feature.shape == (2, chs, 32 // reduction, 32 // reduction)
        for indices, expected in ((2, maps[-2:]), ([-1], maps[-1:]), ([0, -2], [maps[0], maps[-2]])):
            assert equal(net.forward_intermediates(X, indices, intermediates_only=True), expected)
        last, first = net.forward_intermediates(X, [0], stop_early=True)
        assert equal([last, *first], [maps[0], maps[0]])
        channels_last = net(X.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(channels_last, net(X), rtol=1e-4, atol=1e-4)


def test_features_only_gives_the_stages_by_hook_graph_and_getter(net):
    with torch.no_grad():
        maps = net.forward_intermediates(X, intermediates_only=True)
        default = like(net)
        assert equal(default(X), maps)
        assert default.feature_info.channels() == [m.shape[1] for m in maps]
        assert default.feature_info.reduction() == [32 // m.shape[2] for m in maps]
        for kind in ("hook", "fx"):
            assert equal(like(net, feature_cls=kind)(X), maps)
        assert equal(like(net, out_indices=(-2, -1))(X), maps[-2:])
        short = like(net, out_indices=(-len(maps), 1))
        assert equal(short(X), maps[:2])
    assert short.feature_info.channels() == [m.shape[1] for m in maps[:2]]
    later = tuple(f"{part}." for index in range(2, len(maps)) for part in net.parts(index))
    gone = {
        key
        for key in net.state_dict()
        if key.startswith((*later, *(f"{n}." for n in (*net.tail_names, net.head_name))))
    }
    assert set(short.model.state_dict()) == set(net.state_dict()) - gone


@torch.no_grad()
def test_what_is_left_after_pruning_is_a_network(net):
    stages = len(net.feature_info)
    for options in (
        {"prune_norm": True},
        {"prune_norm": True, "prune_head": False},
        {"indices": [0], "prune_head": False},
    ):
        left = copy.deepcopy(net)
        assert left.prune_intermediate_layers(**options) == options.get("indices", [stages - 1])
        assert left.forward_features(X).shape[1] == left.num_features == left.head_hidden_size
        left.reset_classifier(4, "avg")
        assert left(X).shape == (2, 4)
    left = copy.deepcopy(net)
    left.prune_intermediate_layers(1, prune_head=False)
    assert torch.equal(left(X), net(X))


def test_torch_fx_traces_for_every_size(net):
    traced = torch.fx.symbolic_trace(net)
    features = create_feature_extractor(net, {"global_pool": "pooled"})
    with torch.no_grad():
        for x in (X, F.interpolate(X[:1], size=48)):
            assert torch.equal(traced(x), net(x))
            pooled = net.forward_head(net.forward_features(x), pre_logits=True)
            assert torch.equal(features(x)["pooled"], pooled)


@pytest.mark.parametrize("name", COMPILED)
def test_torch_compiles_and_exports_one_graph(name):
    net = timm.create_model(name, num_classes=5).eval()
    torch._dynamo.reset()
    compiled = torch.compile(decompose, backend="eager", fullgraph=True)
    program = io.BytesIO()
    torch.export.save(torch.export.export(net, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},)), program)
    program.seek(0)
    exported = torch.export.load(program).module()
    with torch.no_grad():
        assert equal(compiled(net, X), decompose(net, X))
        torch.testing.assert_close(exported(X.repeat(2, 1, 1, 1))[:2], net(X), rtol=1e-4, atol=1e-4)


# --- before the last ReLU ---


def before_relu(net, x):
    """Per stage, the input of its last ReLU, from what the layers before it give to hooks; and the output."""
    seen = {}

    def note(name):
        return lambda module, args, output: seen.update({name: (args[0], output)})

    hooks = [module.register_forward_hook(note(name)) for name, module in net.named_modules()]
    out = net(x)
    for hook in hooks:
        hook.remove()
    maps = []
    for index, stage in enumerate(info["module"] for info in net.feature_info):
        match net:
            case cifar.vgg.CifarVGG():
                maps.append(seen[f"block{index}"][1])
            case cifar.mobilenet.CifarMobileNetV2():
                maps.append(seen[stage][1])
            case cifar.wrn.CifarWideResNet():
                maps.append(seen[f"block{index + 2}.layer.0.bn1" if index < 2 else "bn1"][1])
            case _:
                number, block = list(net.get_submodule(stage).named_children())[-1]
                last = f"{stage}.{number}"
                y = seen[f"{last}.bn3" if getattr(block, "bn3", None) else f"{last}.bn2"][1]
                if isinstance(net, cifar.resnet.CifarResNet):
                    maps.append(y + seen[f"{last}.{block.shortcut_name}"][1])
                elif isinstance(net, cifar.shufflenet.CifarShuffleNetV1):
                    maps.append(y + seen[last][0])
                else:
                    maps.append(F.channel_shuffle(torch.cat([seen[last][0].chunk(2, dim=1)[0], y], dim=1), 2))
    return maps, out


def test_maps_before_the_last_relu_are_those_that_hooks_see(net):
    with torch.no_grad():
        expected, out = before_relu(net, X)
        final, maps = net.forward_intermediates(X, preact=True)
        _, active = net.forward_intermediates(X)
        assert equal(maps, expected)
        assert torch.equal(net.forward_head(final), out)
        assert equal(
            net.forward_intermediates(X, [-2], stop_early=True, intermediates_only=True, preact=True), maps[-2:-1]
        )
    linear = isinstance(net, cifar.wrn.CifarWideResNet | cifar.mobilenet.CifarMobileNetV2)
    assert linear or equal([m.relu() for m in maps], active)
    assert all((m < 0).any() for m in maps)


@pytest.mark.parametrize("name", SAMPLE)
def test_taking_them_in_training_counts_a_batch_once(name):
    one = timm.create_model(name)
    other = copy.deepcopy(one)
    with torch.no_grad():
        expected, out = before_relu(one, X)
        final, maps = other.forward_intermediates(X, preact=True)
        for found, wanted in zip(maps, expected, strict=True):
            torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(other.forward_head(final), out)
    state = one.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
