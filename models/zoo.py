"""Networks by name: any timm classifier, the CIFAR networks of the KD tables, and the research code's names.

`create_model` is the one way to a network: it adapts stems to small images, adds the adapter and verifies the
wrapper's decomposition before anything is trained.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import timm
from timm.layers import resample_patch_embed
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, is_model, model_entrypoint
from torch import nn

import models.cifar  # noqa: F401 - registers cifar_* with timm
from models.features import FeatureNet, check_head
from models.small_input import LAST_STAGE, adapt_conv_stem, is_patch_family, patch_arguments
from models.weights import load_weights, read_metadata
from pipeline.errors import first_line

ANSWER_S = 5.0
"""Seconds that the hub of timm's weights has to respond."""
SMALL_IMAGE = 64  # up to this size `small_input` is the default

# Names of the research code and of the KD tables that timm does not know, or knows without weights.
ALIASES = {
    "convnext_t": "convnext_tiny",
    "convnext_s": "convnext_small",
    "convnext_b": "convnext_base",
    "convnext_l": "convnext_large",
    "efficientnet_l2": "tf_efficientnet_l2",
    "efficientnet_v2_s": "tf_efficientnetv2_s",
    "efficientnet_v2_m": "tf_efficientnetv2_m",
    "efficientnet_v2_l": "tf_efficientnetv2_l",
    "swin": "swin_tiny_patch4_window7_224",
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "mobilenet_v2": "mobilenetv2_100",
    "shufflenet_v1": "cifar_shufflenet_v1",
    "shufflenet_v2": "cifar_shufflenet_v2",
    "MobileNetV2": "cifar_mobilenetv2_half",
    "ShuffleV1": "cifar_shufflenet_v1",
    "ShuffleV2": "cifar_shufflenet_v2",
    "ResNet18": "cifar_resnet18",
    "ResNet50": "cifar_resnet50",
}
# The research code put roles and initialisation into the name; here they are arguments.
ROLES = ("_pretrain_student", "_pretrain_teacher", "_pretrain", "_pretrained", "_scratch", "_student", "_teacher")


def resolve(name: str) -> str:
    """The timm name behind a name, with its weight tag where it has one ("resnet50.a1_in1k").

    Raises:
        ValueError: no such network, or no such weights of it; the nearest names are given.
    """
    base = name
    for role in ROLES:
        base = base.removesuffix(role) if len(base) > len(role) else base
    for candidate in (ALIASES.get(name), ALIASES.get(base), name, f"cifar_{name}", base, f"cifar_{base}"):
        if candidate is not None and is_model(candidate):
            _check_tag(candidate)
            return candidate
    known = [*timm.list_models(), *ALIASES]
    near = difflib.get_close_matches(base, known, n=4, cutoff=0.6)
    hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists all names"
    raise ValueError(f"unknown model {name!r}; {hint}")


def _check_tag(full: str) -> None:
    base, _, tag = full.partition(".")
    known = [name.partition(".")[2] for name in get_arch_pretrained_cfgs(base) if "." in name]
    if tag and tag not in known:
        near = difflib.get_close_matches(tag, known, n=3) or known
        hint = f"timm has {', '.join(near)}" if near else "it has none"
        raise ValueError(f"unknown weights {tag!r} of {base}: {hint}; or give {base} alone")


def create_model(
    name: str,
    num_classes: int,
    pretrained: bool = False,
    small_input: bool | None = None,
    image_size: int = 32,
    in_chans: int = 3,
    drop_rate: float = 0.0,
    adapter_dim: int | None = None,
) -> FeatureNet:
    """Build a network by name.

    Args:
        name: a timm name, a `cifar_*` name, or an alias (`resolve`).
        num_classes: N.
        pretrained: take timm's weights (ImageNet) and replace the classifier.
        small_input: adapt the stem to small images; None: when `image_size` ≤ 64. The CIFAR networks are made for
            32 pixels: it changes nothing there and is recorded as true.
        image_size: pixels per side.
        in_chans: image channels.
        drop_rate: dropout before the classifier.
        adapter_dim: width D of the distillation adapter; None for none.

    Raises:
        ValueError: unknown name, no stem adaptation known, weights not available, a network whose head is not one
            linear layer on pooled features.
    """
    full = resolve(name)
    own = full.startswith("cifar_")
    small = own or (image_size <= SMALL_IMAGE if small_input is None else small_input)
    if pretrained and not timm.models.is_model_pretrained(full):
        raise ValueError(f"{full} has no pretrained weights in timm; use pretrained=false or a checkpoint")
    module = model_entrypoint(full).__module__
    kwargs: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans, "drop_rate": drop_rate}
    patch = small and is_patch_family(module)
    if patch:
        kwargs |= patch_arguments(module, full, image_size)
    elif _fixed_size(full) not in (None, image_size):
        kwargs["img_size"] = image_size
    if patch and pretrained and "img_size" not in kwargs:
        net = _with_resampled_stem(full, kwargs)
    else:
        net = _build(full, pretrained, kwargs)
    if small and not own and not patch:
        adapt_conv_stem(net, full)
    shape = check_head(net, (in_chans, image_size, image_size))
    if patch and min(shape[2:]) < LAST_STAGE:  # a member of the family with another kind of stem
        raise ValueError(
            f"{full}: its last stage stays {shape[2]}×{shape[3]} at image size {image_size}; "
            "small_input does not support its stem, set small_input=false"
        )
    return FeatureNet(net, adapter_dim, full, small)


def load(path: str | Path) -> FeatureNet:
    """The network in a file that `weights.save_weights` wrote, in eval mode on the CPU.

    Its `net` alone maps images to logits, and says in timm's way (`timm.data.resolve_model_data_config`) which images.

    Raises:
        ValueError: unreadable, or a file that does not say which network it is of.
    """
    record = read_metadata(path)
    if "architecture" not in record:
        raise ValueError(f"{path} does not say which network it is of: use create_model and weights.load_weights")
    size, channels = record.get("image_size", 32), record.get("in_chans", 3)
    net = create_model(
        record["architecture"],
        record["num_classes"],
        small_input=record.get("small_input"),
        image_size=size,
        in_chans=channels,
    )
    load_weights(net, path)
    shown = {name: tuple(record[name]) for name in ("mean", "std") if record.get(name)}
    shown |= {"input_size": (channels, size, size), "label_names": tuple(record.get("classes", ()))}
    net.net.pretrained_cfg = {**(getattr(net.net, "pretrained_cfg", None) or {}), **shown}  # type: ignore[assignment]
    return net.eval()


def _fixed_size(full: str) -> int | None:
    """The image size that an architecture is tied to unless told otherwise, or None."""
    cfg = get_pretrained_cfg(full)
    return int(cfg.input_size[-1]) if cfg is not None and cfg.fixed_input_size else None


def _build(full: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    try:
        with _answering_hub() if pretrained else nullcontext():
            net: nn.Module = timm.create_model(full, pretrained=pretrained, **kwargs)
    except TypeError as error:
        raise ValueError(f"{full} does not take {', '.join(sorted(kwargs))}: {error}") from error
    except Exception as error:
        # The hub, the cache or the network may raise anything: without the weights there is no model.
        if not pretrained:
            raise ValueError(f"{full} cannot be built with {kwargs}: {first_line(error)}") from error
        raise ValueError(
            f"the pretrained weights of {full} could not be loaded ({first_line(error)}): no network? "
            "use pretrained=false or give a checkpoint"
        ) from error
    return net


@contextmanager
def _answering_hub() -> Iterator[None]:
    """If the hub of the weights does not answer, let its client use the cache only: it would retry for minutes.

    Raises:
        ConnectionError: they are not in the cache either.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    offline = constants.HF_HUB_OFFLINE
    silent: Exception | None = None
    if not offline:
        try:
            get_session().head(constants.ENDPOINT, timeout=ANSWER_S)
        except Exception as error:  # the client's HTTP library, and so its errors, depends on the version
            silent = error
    constants.HF_HUB_OFFLINE = offline or silent is not None  # what the environment variable sets, in 0.20 to 2.4
    try:
        yield
    except Exception as error:
        if silent is None:
            raise
        raise ConnectionError(f"{constants.ENDPOINT} does not answer, and they are not in its cache") from error
    finally:
        constants.HF_HUB_OFFLINE = offline


def _with_resampled_stem(full: str, kwargs: dict[str, Any]) -> nn.Module:
    """Load pretrained weights under a smaller patch stem, where timm does not resample by itself (ConvNeXt).

    The patch kernel is resampled as in FlexiViT (Beyer et al. 2023), everything else is taken as it is.
    """
    source = _build(full, True, {k: v for k, v in kwargs.items() if k != "patch_size"}).state_dict()
    net = _build(full, False, kwargs)
    target = net.state_dict()
    for key, weight in source.items():
        if key in target and weight.dim() == 4 and weight.shape[2:] != target[key].shape[2:]:
            source[key] = resample_patch_embed(weight, list(target[key].shape[2:]))
    try:
        net.load_state_dict(source, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"{full}: its pretrained weights do not fit a stem with patch {kwargs['patch_size']}; "
            "set small_input=false or pretrained=false"
        ) from error
    return net
