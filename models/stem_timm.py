"""timm networks with a small-image stem, for timm itself: `asib_small_input`, known to it once this module is imported.

An exported folder names this architecture where `small_input.adapt_conv_stem` has changed one of timm's own: the
weights would fit timm's unchanged network too, and give wrong answers there. Without this module timm refuses it.
"""

from typing import Any

import timm
from timm.models import load_pretrained, register_model, resolve_pretrained_cfg
from torch import nn

from models.small_input import adapt_conv_stem

NAME = "asib_small_input"


def asib_small_input(
    pretrained: bool = False,
    *,
    base: str,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Any = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """timm's network `base` with stride 1 in its first convolution and no max-pool after it.

    Args:
        pretrained: load the weights that `pretrained_cfg` names: those of an exported folder.
        kwargs: timm's, for `base`.
    """
    kwargs.pop("pretrained_model_args", None)
    net: nn.Module = timm.create_model(base, **kwargs)
    adapt_conv_stem(net, base)
    cfg = resolve_pretrained_cfg(base, pretrained_cfg, pretrained_cfg_overlay).to_dict()
    net.pretrained_cfg = net.default_cfg = cfg
    if pretrained:
        chans = kwargs.get("in_chans", 3)
        load_pretrained(net, cfg, num_classes=kwargs.get("num_classes", 1000), in_chans=chans, cache_dir=cache_dir)
    return net


register_model(asib_small_input)
