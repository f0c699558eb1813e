"""A freeze policy trains exactly the parts it names, and the next one replaces it completely."""

import copy

import pytest
import timm
import torch
from torch import nn

from models import freeze
from models.features import FeatureNet
from models.freeze import FreezePolicy
from models.zoo import create_model

ADAPTER = {f"distillation_adapter.{i}.{kind}" for i in (0, 1, 3) for kind in ("weight", "bias")}
X = torch.linspace(-30, 30, 4 * 3 * 32 * 32).sin().reshape(4, 3, 32, 32)


def bare(name, adapter=8, **kwargs):
    """The network without memory or initialisation: names are all that matters."""
    with torch.device("meta"):
        return FeatureNet(timm.create_model(name, num_classes=10, **kwargs), adapter)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def under(model, *prefixes):
    """Parameters of the network whose name starts so; every prefix must be there."""
    names = [name.removeprefix("net.") for name, _ in model.named_parameters()]
    assert all(any(n.startswith(p) for n in names) for p in prefixes), prefixes
    return {f"net.{n}" for n in names if n.startswith(prefixes)}


# --- which parameters train ---


def test_every_level_of_resnet8_by_name():
    model = bare("cifar_resnet8")
    block = [f"0.{layer}" for layer in ("conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight")]
    block += ["0.bn2.bias", "0.downsample.0.weight", "0.downsample.1.weight", "0.downsample.1.bias"]
    convs = ("conv1.weight", "conv2.weight", "downsample.0.weight")
    head = {"net.fc.weight", "net.fc.bias"} | ADAPTER
    last, previous = ({f"net.layer{i}.{name}" for name in block} for i in (3, 2))
    everything = {name for name, _ in model.named_parameters()}
    norms = {name for name in everything if "bn" in name or "downsample.1" in name}
    assert len(norms) == 2 * (1 + 2 + 3 + 3)

    for level, expected in ((0, head), (1, head | last), (2, head | last | previous)):
        freeze.apply(model, FreezePolicy(level))
        assert trained(model) == expected | norms
        freeze.apply(model, FreezePolicy(level, freeze_bn=True))
        assert trained(model) == expected - norms
    assert {f"net.layer2.0.{name}" for name in convs} <= trained(model)
    freeze.apply(model, FreezePolicy(bn_head_only=True))
    assert trained(model) == head | norms
    freeze.apply(model, FreezePolicy(0, scope="features_classifier"))
    assert trained(model) == everything - ADAPTER
    freeze.apply(model, FreezePolicy(0, freeze_bn=True, scope="features_classifier"))
    assert trained(model) == everything - ADAPTER - norms
    freeze.apply(model, FreezePolicy(-1, freeze_bn=True))
    assert trained(model) == everything


# name → (head, last block, the block before, what names of normalisation layers have in them)
FAMILIES = {
    "resnet18": (("fc.",), ("layer4.",), ("layer3.",), (".bn", "downsample.1")),
    # its RMS norms are timm's own, no class of torch's
    "convnext_atto_rms": (("head.",), ("stages.3.",), ("stages.2.",), (".norm", "stem.1", "downsample.0")),
    "convnext_atto": (("head.",), ("stages.3.",), ("stages.2.",), (".norm", "stem.1", "downsample.0")),
    "swin_tiny_patch4_window7_224": (("head.",), ("layers.3.", "norm."), ("layers.2.",), (".norm",)),
    "vit_tiny_patch16_224": (("head.",), ("blocks.11.", "norm."), ("blocks.10.",), (".norm",)),
    "mobilenetv2_100": (("classifier.",), ("blocks.6.", "conv_head.", "bn2."), ("blocks.5.",), (".bn",)),
    "efficientnet_b0": (("classifier.",), ("blocks.6.", "conv_head.", "bn2."), ("blocks.5.",), (".bn",)),
    "mobilenetv3_small_050": (("classifier.", "conv_head."), ("blocks.5.",), ("blocks.4.",), (".bn",)),
    "densenet121": (
        ("classifier.",),
        ("features.denseblock4.", "features.norm5."),
        ("features.denseblock3.", "features.transition3."),
        (".norm",),
    ),
    "vgg11_bn": (("head.", "pre_logits."), ("features.25.", "features.26."), ("features.22.", "features.23."), None),
    "regnety_002": (("head.",), ("s4.",), ("s3.",), (".bn",)),
    # the table of relative positions, which all blocks share, trains with none of them
    "vit_srelpos_small_patch16_224": (("head.",), ("blocks.11.", "norm."), ("blocks.10.",), (".norm",)),
    "beit_base_patch16_224": (("head.", "fc_norm."), ("blocks.11.",), ("blocks.10.",), ("norm",)),
    "cait_xxs24_224": (
        ("head.",),
        ("blocks.23.", "blocks_token_only.1.", "norm."),
        ("blocks.22.", "blocks_token_only.0."),
        ("norm",),
    ),
    "pit_ti_224": (("head.",), ("transformers.2.", "norm."), ("transformers.1.",), (".norm",)),
    "rdnet_tiny": (("head.",), ("dense_stages.6.",), tuple(f"dense_stages.{i}." for i in range(2, 6)), None),
    "cifar_mobilenetv2_half": (("classifier.",), ("blocks.6.", "conv2."), ("blocks.5.",), None),
    "cifar_shufflenet_v2": (("linear.",), ("layer3.", "conv2.", "bn2."), ("layer2.",), None),
    "cifar_wrn_16_1": (("fc.",), ("block3.", "bn1."), ("block2.",), None),
    "cifar_vgg8": (("classifier.",), ("block4.",), ("block3.",), None),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_levels_follow_the_networks_own_stages(name):
    model = bare(name)
    *parts, norm_names = FAMILIES[name]
    if norm_names is None:
        norms = {
            f"{module}.{kind}"
            for module, m in model.net.named_modules(prefix="net")
            for kind, _ in m.named_parameters(recurse=False)
            if "Norm" in type(m).__name__
        }
    else:
        names = (n for n, _ in model.net.named_parameters(prefix="net"))
        norms = {n for n in names if any(part in n for part in norm_names)}
    assert norms
    for level in (0, 1, 2):
        expected = ADAPTER.union(*(under(model, *part) for part in parts[: level + 1]))
        freeze.apply(model, FreezePolicy(level))
        assert trained(model) == expected | norms
        freeze.apply(model, FreezePolicy(level, freeze_bn=True))
        assert trained(model) == expected - norms
    freeze.apply(model, FreezePolicy(2, freeze_bn=True, bn_head_only=True))
    assert trained(model) == ADAPTER | under(model, *parts[0]) | norms


OTHERS = [
    "cifar_resnet18", "cifar_resnet32x4", "cifar_shufflenet_v1", "cifar_wrn_16_2",
    "resnet50", "resnetv2_50", "vgg16_bn", "inception_v3", "legacy_xception", "poolformer_s12", "nf_resnet26",
    "hrnet_w18_small", "mobilevit_xxs", "maxvit_nano_rw_256", "repvgg_a0", "dpn68", "convnextv2_atto",
    "tf_efficientnetv2_b0", "swinv2_tiny_window8_256", "edgenext_xx_small", "rexnet_100", "visformer_tiny",
    "davit_tiny", "fastvit_t8", "hgnet_tiny", "xcit_nano_12_p16_224", "volo_d1_224", "mambaout_femto",
    "nest_tiny", "mobilenetv4_conv_small", "qwen3_vit_88m",
    "naflexvit_base_patch16_map", "efficientvit_b0",
]  # fmt: skip


@pytest.mark.step  # dozens of timm's networks
@pytest.mark.parametrize("name", OTHERS)
def test_the_head_is_what_runs_behind_the_feature_map_and_levels_are_nested(name):
    model = bare(name, adapter=None)
    ran = set()
    for key, module in model.net.named_modules():
        module.register_forward_pre_hook(lambda *_, key=key: ran.add(f"net.{key}"))
    with torch.device("meta"), torch.no_grad():
        model.net.eval().forward_features(torch.empty(1, *model.net.pretrained_cfg["input_size"]))
    sets = []
    for level in (0, 1, 2):
        freeze.apply(model, FreezePolicy(level, freeze_bn=True))
        sets.append(trained(model))
    assert sets[0] < sets[1] < sets[2] < {name for name, _ in model.named_parameters()}
    assert not {key for key in sets[0] if key.rpartition(".")[0] in ran}
    classifier = {id(p) for p in model.net.get_classifier().parameters()}
    assert {n for n, p in model.named_parameters() if id(p) in classifier} <= sets[0]
    order = [key for key, _ in model.named_parameters()]
    assert order[0] not in sets[2]


# --- what a training step does ---


@pytest.mark.parametrize("name", ["cifar_resnet8", "test_resnet", "test_convnext", "test_efficientnet", "test_vit"])
@pytest.mark.parametrize(
    "policy",
    [FreezePolicy(0, True), FreezePolicy(1), FreezePolicy(2, True), FreezePolicy(bn_head_only=True)],
    ids=["head", "last", "last two, norms held", "norms and head"],
)
def test_exactly_the_trained_parameters_get_a_gradient(name, policy):
    model = create_model(name, 10, adapter_dim=8).train()
    freeze.apply(model, policy).hold(model)
    out = model(X)
    (out.logits.square().sum() + out.distill_feat.square().sum()).backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained(model)


def statistics(model):
    return {n: b.clone() for n, b in model.named_buffers() if "running" in n or "num_batches" in n}


@pytest.mark.parametrize("name", ["cifar_wrn_16_1", "test_efficientnet"])
def test_statistics_stand_still_with_freeze_bn_and_go_on_in_frozen_blocks_without(name):
    model = create_model(name, 10, adapter_dim=8)
    before = statistics(model)
    assert before
    for policy, still in ((FreezePolicy(1, freeze_bn=True), True), (FreezePolicy(0), False)):
        frozen = freeze.apply(model, policy)
        model.train()
        frozen.hold(model)
        with torch.no_grad():
            model(X)
        assert {torch.equal(after, before[name]) for name, after in statistics(model).items()} == {still}


def test_apply_sets_the_modes_itself_and_only_those_of_norm_layers():
    model = create_model("test_efficientnet", 10, adapter_dim=8, drop_rate=0.5).train()
    frozen = freeze.apply(model, FreezePolicy(1, freeze_bn=True))
    still = {n for n, m in model.named_modules() if not m.training}
    assert still == set(frozen.held) == {n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    assert freeze.apply(model, FreezePolicy(1)).held == ()
    assert all(m.training for m in model.modules())
    freeze.apply(model.eval(), FreezePolicy(1))
    assert not any(m.training for m in model.modules())


def test_the_adapters_norm_is_never_held():
    model = create_model("test_convnext", 10, adapter_dim=8).train()
    frozen = freeze.apply(model, FreezePolicy(0, freeze_bn=True))
    assert model.distillation_adapter[1].training
    assert model.distillation_adapter[1].weight.requires_grad
    assert "net.head.norm" in frozen.held
    assert not model.net.head.norm.weight.requires_grad


def test_a_copy_can_be_held_and_only_its_norm_layers_are():
    model = bare("test_efficientnet")
    frozen = freeze.apply(model, FreezePolicy(1, freeze_bn=True))
    twin = copy.deepcopy(model).train()
    frozen.hold(twin)
    assert {n for n, m in twin.named_modules() if not m.training} == set(frozen.held)


# --- policies over stages ---


def test_a_later_policy_replaces_the_former_as_if_that_had_not_been():
    model = create_model("cifar_resnet8", 10, adapter_dim=8).train()
    schedule = [FreezePolicy(-1), FreezePolicy(-1, True), FreezePolicy(2, True), FreezePolicy(1), FreezePolicy(0, True)]
    schedule += [FreezePolicy(bn_head_only=True), FreezePolicy(scope="features_classifier"), FreezePolicy(-1)]
    for policy in schedule:
        fresh = create_model("cifar_resnet8", 10, adapter_dim=8).train()
        expected = freeze.apply(fresh, policy)
        for _ in range(2):
            assert freeze.apply(model, policy) == expected
            assert trained(model) == trained(fresh)
            assert {n: m.training for n, m in model.named_modules()} == {
                n: m.training for n, m in fresh.named_modules()
            }


def test_an_optimiser_moves_nothing_that_a_stage_froze():
    model = create_model("cifar_resnet8", 10).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for level in (-1, 1):
        freeze.apply(model, FreezePolicy(level, freeze_bn=True)).hold(model)
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        model(X).logits.square().sum().backward()  # gradients of the stage before are left lying about
        optimiser.step()
        moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert moved == trained(model)
    assert moved == under(model, "fc.", "layer3.0.conv", "layer3.0.downsample.0")


# --- refusals ---


class Toy(nn.Module):
    """A classifier with timm's interface and as many stages as asked for."""

    num_classes, num_features = 10, 4

    def __init__(self, stages, head=None, matcher=None):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.stages = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(stages))
        self.fc = nn.Linear(4, 10) if head is None else head
        self.feature_info = []
        if matcher is not None:
            self.group_matcher = lambda coarse: matcher

    def get_classifier(self):
        return self.fc

    def forward_features(self, x): ...

    def forward_head(self, x, pre_logits=False): ...


STAGES = {"stem": r"^stem", "blocks": r"^stages\.(\d+)"}


def state(model):
    return {n: p.requires_grad for n, p in model.named_parameters()}, [m.training for m in model.modules()]


@pytest.mark.parametrize(
    ("net", "policy", "message"),
    [
        (Toy(1, matcher=STAGES), FreezePolicy(2), "level 2 trains the last 2 stages, and the network has 1"),
        (Toy(0, matcher=STAGES), FreezePolicy(0), "Toy declares no stages"),
        (Toy(2, matcher={"stem": "^features", "blocks": r"^layer(\d+)"}), FreezePolicy(1), "Toy declares no stages"),
        (Toy(2), FreezePolicy(1), "Toy declares no stages"),
        (Toy(2, nn.Identity(), STAGES), FreezePolicy(0), "no classifier with parameters"),
        (Toy(2, nn.BatchNorm1d(4), STAGES), FreezePolicy(0, True), "leaves nothing that trains"),
        (Toy(2, matcher=STAGES), FreezePolicy(bn_head_only=True), "no normalisation layers"),
    ],
)
def test_a_freeze_that_cannot_be_had_is_refused_and_changes_nothing(net, policy, message):
    model = FeatureNet(net).train()
    before = state(model)
    with pytest.raises(ValueError, match=message) as error:
        freeze.apply(model, policy)
    assert "\n" not in str(error.value)
    assert state(model) == before


@pytest.mark.parametrize("module", ["stages.7", "blocks.0", "stages.0"])
def test_feature_info_that_matches_nothing_or_is_out_of_order_is_refused(module):
    net = Toy(2)
    net.feature_info = [{"module": "stages.1"}, {"module": module}]
    with pytest.raises(ValueError, match=f"feature_info names {module}"):
        freeze.apply(FeatureNet(net), FreezePolicy(1))


def test_feature_info_alone_is_enough():
    net = Toy(4)
    net.feature_info = [{"module": "stem.act"}, {"module": "stages.0"}, {"module": "stages.2"}]
    net.stem.act = nn.ReLU()
    model = FeatureNet(net)
    freeze.apply(model, FreezePolicy(1))
    assert trained(model) == under(model, "fc.", "stages.1.", "stages.2.", "stages.3.")
    freeze.apply(model, FreezePolicy(2))
    assert trained(model) == under(model, "fc.", "stages.")


def test_networks_without_norm_layers_can_have_freeze_bn():
    frozen = freeze.apply(bare("vgg11"), FreezePolicy(0, freeze_bn=True))
    assert frozen.held == ()
