"""Partial freezing: which parts of a network train, and which normalisation layers are fixed.

Blocks are the network's own stages as timm declares them, never guessed from names like `layer4`; a policy that
finds nothing to act on is an error, and a later policy replaces an earlier one completely.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from models.features import FeatureNet

# What timm's families call the layers between pooling and classifier that lie outside the classifier's module.
# Only those in the classifier's own group count: EfficientNet's conv_head is before the pooling, in the last block.
HEAD_PARTS = (
    "fc_norm",
    "attn_pool",
    "pre_logits",
    "pre_classifier",
    "conv_head",
    "norm_head",
    "head_dist",
    "aux_head",
)
# timm's normalisation and norm-act layers are those defined here; only some of them derive from torch's.
NORM_MODULES = tuple(
    f"timm.layers.{name}"
    for name in ("norm", "norm_act", "evo_norm", "filter_response_norm", "split_batchnorm", "inplace_abn")
)


@dataclass(frozen=True)
class FreezePolicy:
    """Which parts of a network train.

    Attributes:
        level: -1 everything · 0 the head · 1 the head and the last block · 2 the head and the last two blocks.
            The head is the classifier, everything between it and the pooling, and the distillation adapter.
        freeze_bn: at levels ≥ 0, all normalisation layers of the network stop, in trained blocks and in the head
            too: their statistics (eval mode) and their affine parameters. Without it all of them stay active, in
            frozen blocks too. No effect at level -1, nor on a network without normalisation layers.
        bn_head_only: normalisation layers and head train, nothing else; replaces `level` and `freeze_bn`.
        scope: "features_classifier": the whole network trains, its adapter does not. Replaces the parts
            that `level` names; `freeze_bn` acts as usual.
    """

    level: int = -1
    freeze_bn: bool = False
    bn_head_only: bool = False
    scope: str | None = None


@dataclass(frozen=True)
class Frozen:
    """What a policy keeps fixed in one network.

    Attributes:
        held: names, in the wrapper, of the normalisation modules that stay in eval mode.
    """

    held: tuple[str, ...]

    def hold(self, model: nn.Module) -> None:
        """Put the held modules into eval mode; to be called after every `model.train()`.

        Modules are found by name, so this also works on a copy, and after a SyncBatchNorm conversion.
        """
        for name in self.held:
            # Not eval(): a norm-act layer's dropout is no statistic.
            model.get_submodule(name).training = False


def apply(model: FeatureNet, policy: FreezePolicy) -> Frozen:
    """Set `requires_grad` of every parameter of the wrapper by `policy`, whatever was set before.

    Normalisation modules get the wrapper's own mode, or eval mode if the policy holds them. Parameters that no
    longer train lose their gradient, so that no optimiser applies a stale one.

    Args:
        model: the network; its distillation adapter, where it has one, counts as head.
        policy: what trains. At level 0 without `freeze_bn` this is the same as `bn_head_only`.

    Raises:
        ValueError: fewer stages than the level needs, unknown stages, no classifier, `bn_head_only`
            without normalisation layers, nothing left to train. The model is then unchanged.
    """
    norms = {f"net.{name}": module for name, module in model.net.named_modules() if _is_norm(module)}
    normal = {id(p) for module in norms.values() for p in module.parameters(recurse=False)}
    stopped = policy.freeze_bn and policy.level >= 0 and not policy.bn_head_only
    trained = _trained_parts(model, policy)
    if policy.bn_head_only and not normal:
        raise ValueError(f"{model.architecture} has no normalisation layers that bn_head_only could train")

    wanted = {}
    for name, parameter in model.named_parameters():
        wanted[name] = not stopped if id(parameter) in normal else trained is None or name in trained
        if policy.scope is not None and not name.startswith("net."):
            wanted[name] = False
    if not any(wanted.values()):
        raise ValueError(f"{model.architecture}: {policy} leaves nothing that trains")

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted[name])
        if not wanted[name]:
            parameter.grad = None
    for module in norms.values():
        module.training = model.training and not stopped
    return Frozen(tuple(norms) if stopped else ())


def _trained_parts(model: FeatureNet, policy: FreezePolicy) -> set[str] | None:
    """Names (in the wrapper) of the parameters that train, apart from normalisation layers; None: all."""
    level = 0 if policy.bn_head_only else policy.level
    if policy.scope is not None or level < 0:
        return None
    head, stages = _layout(model.net, model.architecture)
    if level > len(stages):
        raise ValueError(
            f"{model.architecture}: freeze level {level} trains the last {level} stages, "
            f"and the network has {len(stages)}; choose a lower level"
        )
    parts = [head, *stages[len(stages) - level :]]
    adapter = {n for n, _ in model.named_parameters() if not n.startswith("net.")}
    return adapter | {f"net.{name}" for part in parts for name in part}


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation layer: torch's (Batch, Instance, Layer, Group, RMS) or one of timm's.

    ConvNeXt V2's response normalisation (GRN) is part of its MLP, not of these.
    """
    if isinstance(module, _NormBase | nn.LayerNorm | nn.GroupNorm | nn.RMSNorm):
        return True
    return any(base.__module__ in NORM_MODULES for base in type(module).__mro__)


def _layout(net: Any, name: str) -> tuple[set[str], list[set[str]]]:
    """Names of the parameters of a timm network's head and stages; the rest is the stem.

    Stages are the groups of `group_matcher(coarse=True)` between stem and head; a network that has none (PiT,
    MetaFormer, RDNet) is cut at the modules of its `feature_info`. The head is what shares the classifier's
    top-level module (ConvNeXt's head.norm), and HEAD_PARTS. Anything else after the last stage (Swin's norm,
    a last convolution) comes before the pooling and belongs to the last stage, as in timm for most networks.

    Raises:
        ValueError: no classifier with parameters, or no stages.
    """
    order = [key for key, _ in net.named_parameters()]
    classifier = _classifier(net, name)
    groups, stems, unmatched = _timm_groups(net, classifier)
    last = {key for group in groups for key in group if classifier & set(group)} or set(order)
    roots = {key.split(".")[0] for key in classifier} | set(HEAD_PARTS)
    head = {key for key in order if key in last and key.split(".")[0] in roots}
    if groups:
        stages = [set(group) - head for group in groups if not stems.issuperset(group)]
        stages = _with_own_norms(net, [stage - unmatched for stage in stages if stage - unmatched])
    else:
        stages = _cut_at_features(net, [key for key in order if key not in head], name)
    if not stages:
        raise ValueError(f"{name} declares no stages (group_matcher, feature_info): it cannot be frozen partially")
    start = min(map(order.index, stages[-1]))
    # Unmatched ones before the last stage are those that all stages share (position tables): they count as stem.
    stages[-1] |= {key for key in order[start:] if key in unmatched - head}
    return head, stages


def _with_own_norms(net: nn.Module, groups: list[set[str]]) -> list[set[str]]:
    """Merge groups of normalisation only (in VGG each layer is a group) into the layer before, or else the stem."""
    norms = {
        f"{key}.{own}" if key else own
        for key, module in net.named_modules()
        if _is_norm(module)
        for own, _ in module.named_parameters(recurse=False)
    }
    stages: list[set[str]] = []
    for group in groups:
        if not norms.issuperset(group):
            stages.append(set(group))
        elif stages:
            stages[-1] |= group
    return stages


def _classifier(net: Any, name: str) -> set[str]:
    """Names of the classifier's parameters."""
    own = {id(parameter) for parameter in net.get_classifier().parameters()}
    if not own:
        raise ValueError(f"{name} has no classifier with parameters, so no head that could train")
    return {key for key, parameter in net.named_parameters() if id(parameter) in own}


def _timm_groups(net: Any, classifier: set[str]) -> tuple[list[list[str]], set[str], set[str]]:
    """(timm's coarse groups in order, the stem's parameters, the parameters that no pattern of timm's matches)."""
    if not hasattr(net, "group_matcher"):
        return [], set(), set()
    try:
        matcher = net.group_matcher(coarse=True)
    except AssertionError:  # RDNet: "coarse grouping is not implemented"
        return [], set(), set()
    groups = list(group_parameters(net, matcher).values())
    keys = [key for group in groups for key in group]
    if not isinstance(matcher, dict):  # a function: the stem is number 0, parameters unknown to it come last
        return groups, set(groups[0]), next(set(group) for group in groups if classifier & set(group))
    stem = [p for part, spec in matcher.items() if part.startswith("stem") for p in _patterns(spec)]
    every = [p for spec in matcher.values() for p in _patterns(spec)]
    stems = {key for key in keys if any(re.match(p, key) for p in stem)}
    return groups, stems, {key for key in keys if not any(re.match(p, key) for p in every)}


def _patterns(spec: Any) -> Iterator[str]:
    """The regular expressions in one entry of a timm matcher: a string, (string, suffix) pairs, or None."""
    if isinstance(spec, str):
        yield spec
    elif spec is not None:
        yield from (pattern for pattern, _ in spec)


def _cut_at_features(net: Any, keys: list[str], name: str) -> list[set[str]]:
    """Stages from `feature_info`: each ends with its module, and begins where the one before ends.

    Args:
        net: the network.
        keys: its parameters without the head, in the order of registration.
        name: the architecture, for messages.

    Raises:
        ValueError: an entry names no module, or the modules are not in order.
    """
    stages: list[set[str]] = []
    modules = {key for key, _ in net.named_modules()}
    end = 0
    for info in getattr(net, "feature_info", None) or ():
        own = [i for i, key in enumerate(keys) if key.startswith(info["module"] + ".")]
        if info["module"] not in modules or (own and own[0] < end):
            raise ValueError(f"{name}: its feature_info names {info['module']}, which cannot be identified as a stage")
        if own:
            stages.append(set(keys[end if stages else own[0] : own[-1] + 1]))
            end = own[-1] + 1
    if stages:
        stages[-1] |= set(keys[end:])
    return stages
