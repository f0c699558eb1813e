"""Stems for 32×32 images: networks made for 224 pixels would shrink them to one position.

Convolutional stems get stride 1 and lose their max-pool, with the kernel unchanged, so a network has the same
state dict with and without pretrained weights; patch stems get smaller patches.
"""

import re
from typing import Any

from torch import nn

LAST_STAGE = 4  # positions per side that patch networks keep

# Module of a patch network's entry point → how much its stages shrink the map after the stem.
PATCH_FAMILIES = {
    "timm.models.convnext": 8,
    "timm.models.swin_transformer": 8,
    "timm.models.swin_transformer_v2": 8,
    "timm.models.vision_transformer": 1,
    "timm.models.deit": 1,
    "timm.models.eva": 1,
    "timm.models.beit": 1,
}
# What timm's families call the max-pool between stem convolution and first stage.
STEM_POOLS = ("maxpool", "stem.pool", "pool0", "features.pool0", "features.conv1_pool")


def is_patch_family(module: str) -> bool:
    """Whether models of this timm module have a patch stem that can be adapted."""
    return module in PATCH_FAMILIES


def patch_arguments(module: str, name: str, image_size: int) -> dict[str, Any]:
    """Arguments for timm that give a patch network the largest patch with a last stage of at least 4×4.

    Args:
        module: module of the model's entry point, one of PATCH_FAMILIES.
        name: the model's name; it tells the native patch, which is not exceeded.
        image_size: pixels per side.

    Raises:
        ValueError: no patch size does that for `image_size`.
    """
    shrink = PATCH_FAMILIES[module]
    named = re.search(r"patch(\d+)", name)
    native = int(named.group(1)) if named else (16 if shrink == 1 else 4)
    convnext = module == "timm.models.convnext"
    # With a 2×2 stem timm's ConvNeXt halves the map in its first stage too: nothing is gained over 4×4.
    patches = [p for p in range(1, native + 1) if image_size % p == 0 and not (convnext and p == 2)]
    fits = [p for p in patches if image_size // (p * shrink) >= LAST_STAGE]
    if not fits:
        raise ValueError(
            f"{name}: no patch leaves its last stage {LAST_STAGE}×{LAST_STAGE} at image size {image_size}; "
            f"use an image size of at least {LAST_STAGE * shrink}"
        )
    return {"patch_size": max(fits)} | ({} if convnext else {"img_size": image_size})


def adapt_conv_stem(net: nn.Module, name: str) -> int:
    """Set the first convolution's stride to 1 and remove the max-pool after it; in place.

    `feature_info` of the network is corrected by the same factor.

    Returns:
        The factor by which feature maps have grown.

    Raises:
        ValueError: the rule does not cover this stem (its convolution has no stride of 2 and there is no pool).
    """
    factor = 1
    first = next(((n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)), None)
    if first is None:
        raise ValueError(f"{name} has no convolutional stem; small_input does not support it, set small_input=false")
    conv = first[1]
    if max(conv.stride) > 2:
        raise ValueError(
            f"{name} has a patch stem of stride {max(conv.stride)}; small_input does not support it, "
            "set small_input=false or choose a ResNet, EfficientNet, ConvNeXt, Swin or ViT"
        )
    if max(conv.stride) == 2:
        conv.stride = (1, 1)
        factor = 2
    factor *= _drop_pool(net, name)
    if factor == 1:
        raise ValueError(f"{name} has a stem without stride; small_input does not support it, set small_input=false")
    info = getattr(net, "feature_info", None)
    for entry in getattr(info, "info", info) or []:
        if isinstance(entry, dict) and "reduction" in entry:
            entry["reduction"] = max(1, entry["reduction"] // factor)
    return factor


def _drop_pool(net: nn.Module, name: str) -> int:
    """Remove the stem's pool, if there is one; return the factor by which maps have grown."""
    for path in STEM_POOLS:
        parent, _, leaf = path.rpartition(".")
        try:
            pool = net.get_submodule(path)
        except AttributeError:
            continue
        if not isinstance(pool, nn.Identity):
            # A pool may be a Sequential (anti-aliased) with parameters of its own, which cannot be removed.
            if next(pool.parameters(), None) is not None:
                raise ValueError(f"{name}: its stem pool has weights; small_input does not support it")
            stem = net.get_submodule(parent)
            setattr(stem, leaf, nn.Identity())
            if hasattr(stem, "pad"):  # BiT pads for its pool in a layer of its own
                stem.pad = nn.Identity()
            return 2
    return 1
