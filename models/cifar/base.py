"""What all CIFAR networks share: timm's classifier interface, initialisation and registration.

A family supplies its layers, `stem`, and where it needs them `parts`, `stage`, `stage_preact` and `tail`; everything
timm expects of a classifier is here, once.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import nn

# CIFAR-100 training statistics, as the published checkpoints were trained with.
MEAN = (0.5070, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2761)

conv3x3 = partial(nn.Conv2d, kernel_size=3, padding=1, bias=False)
conv1x1 = partial(nn.Conv2d, kernel_size=1, bias=False)


class CifarNet(nn.Module):
    """Base of the CIFAR networks: (B, in_chans, 32, 32) → logits (B, num_classes).

    A forward pass is `stem`, one `stage` per entry of `feature_info`, `tail`, pooling, dropout, classifier.
    Subclasses build their layers in `__init__` and call `finish` last.
    """

    head_name: ClassVar[str] = "fc"
    stem_names: ClassVar[str] = r"^(?:conv1|bn1)\."
    block_names: ClassVar[str] = r"^layer(\d+)"
    tail_names: ClassVar[tuple[str, ...]] = ()
    """The layers of `tail`."""
    reductions: ClassVar[tuple[int, ...]] = ()
    """Per stage, image size divided by the size of its output."""

    num_features: int
    head_hidden_size: int
    feature_info: list[dict[str, Any]]
    global_pool: nn.Module

    def __init__(
        self, *, num_classes: int = 100, in_chans: int = 3, drop_rate: float = 0.0, global_pool: str = "avg"
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self._pool_type = global_pool
        self.grad_checkpointing = False

    def finish(self, num_features: int, stages: Sequence[tuple[str, int]]) -> None:
        """Record the stages (name of the last module, channels), initialise the layers, add the classifier."""
        self.num_features = self.head_hidden_size = num_features
        self.feature_info = [
            {"num_chs": c, "reduction": r, "module": name} for (name, c), r in zip(stages, self.reductions, strict=True)
        ]
        for module in self.modules():
            self.init_layer(module)
        self.reset_classifier(self.num_classes)

    def init_layer(self, module: nn.Module) -> None:
        """He et al. 2015, fan-out: N(0, 2/(k²·C_out)) for convolutions; BatchNorm starts as the identity."""
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def init_head(self, linear: nn.Linear) -> None:
        """The classifier's initialisation: torch's own, unless a family says otherwise."""

    # --- the forward pass, in the parts that timm's interface needs ---

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) → input of the first stage."""
        raise NotImplementedError

    def parts(self, index: int) -> list[str]:
        """Names of the modules that make up stage `index` of `feature_info`, in order."""
        return [self.feature_info[index]["module"]]

    def stage(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Stage `index` of `feature_info`."""
        for name in self.parts(index):
            x = self.get_submodule(name)(x)
        return x

    def stage_preact(self, index: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stage `index` as (map before its last ReLU, output); here for stages of blocks that have `preact`."""
        *blocks, last = self.get_submodule(self.parts(index)[0]).children()
        for block in blocks:
            x = block(x)
        preact: torch.Tensor = last.preact(x)  # type: ignore[operator]
        return preact, F.relu(preact)

    def tail(self, x: torch.Tensor) -> torch.Tensor:
        """From the last stage's output to the map that is pooled."""
        return x

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) → (B, num_features, h, w)."""
        x = self.stem(x)
        for index in range(len(self.feature_info)):
            x = self._stage(index, x)
        return self.tail(x)

    def _stage(self, index: int, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(self.stage, index, x) if self.grad_checkpointing else self.stage(index, x)
        return out

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """(B, num_features, h, w) → logits (B, num_classes), or the pooled feature (B, num_features)."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        out: torch.Tensor = x if pre_logits else self.get_classifier()(x)
        return out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, in_chans, H, W) → logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        preact: bool = False,
    ) -> Any:
        """Stage outputs as timm gives them: (final map, [maps]) or [maps]; `norm` has no meaning here.

        Args:
            x: (B, in_chans, H, W).
            indices: the stages to give, or how many of the last; None: all.
            norm: ignored.
            stop_early: leave out the stages after the last one given; its output is then the final map.
            output_fmt: NCHW.
            intermediates_only: leave out the final map.
            preact: give each map before its last ReLU, as overhaul distillation (Heo et al. 2019, ICCV) and ReviewKD
                (Chen et al. 2021, CVPR) take it: for wide ResNets after the BatchNorm that follows the stage, for
                MobileNetV2, whose stages end linearly, the output itself.

        Raises:
            ValueError: an output format other than NCHW.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"CIFAR networks give NCHW maps, not {output_fmt!r}")
        stages = len(self.feature_info)
        # private API, checked with timm 1.0.31
        take, last = feature_take_indices(stages, indices)
        count = last + 1 if stop_early else stages
        maps = []
        x = self.stem(x)
        for index in range(count):
            if preact and index in take:
                before, x = self.stage_preact(index, x)
                maps.append(before)
            else:
                x = self._stage(index, x)
                if index in take:
                    maps.append(x)
        if intermediates_only:
            return maps
        return x if count < stages else self.tail(x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the stages `indices` do not need; return them counted from the first.

        Args:
            indices: the stages to keep, or how many of the last.
            prune_norm: remove `tail` even if all stages stay.
            prune_head: remove pooling and classifier even if what they read stays.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        shorter = last + 1 < len(self.feature_info)
        for name in [name for index in range(last + 1, len(self.feature_info)) for name in self.parts(index)]:
            parent, _, leaf = name.rpartition(".")
            delattr(self.get_submodule(parent), leaf)
        del self.feature_info[last + 1 :]
        if shorter or prune_norm:
            for name in self.tail_names:
                setattr(self, name, nn.Identity())
            prune_head |= self.num_features != self.feature_info[last]["num_chs"]
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if shorter or prune_head:
            self.reset_classifier(0, "")
        return list(take)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each stage in the backward pass; BatchNorm then counts a batch twice, as in timm's ResNets."""
        self.grad_checkpointing = enable

    # --- the classifier ---

    def get_classifier(self) -> nn.Module:
        """The last layer, (B, num_features) → (B, num_classes); Identity when num_classes is 0."""
        return self.get_submodule(self.head_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for `num_classes` (0: none), with another pooling where one is named."""
        self.num_classes = num_classes
        self._pool_type = self._pool_type if global_pool is None else global_pool
        self.global_pool, head = create_classifier(self.num_features, num_classes, pool_type=self._pool_type)
        if isinstance(head, nn.Linear):
            self.init_head(head)
        parent, _, leaf = self.head_name.rpartition(".")
        setattr(self.get_submodule(parent), leaf, head)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's layer groups: stem, then one group per stage (coarse) or per block; the rest is the head."""
        return {"stem": self.stem_names, "blocks": self.block_names if coarse else self.block_names + r"\.(\d+)"}


def register(module: str, family: type[CifarNet], variants: Mapping[str, Mapping[str, Any]], first_conv: str) -> None:
    """Make each variant known to timm as a function of `module` whose name is the model's.

    Args:
        module: `__name__` of the calling module; it must define a list `__all__`.
        family: the class to build; its `reductions` give the stages' number and the size of the last map.
        variants: model name → arguments of the class.
        first_conv: name of the layer that sees the image, for timm's handling of `in_chans`.
    """
    here = sys.modules[module]
    cfg = {
        "url": "",
        "num_classes": 100,
        "input_size": (3, 32, 32),
        "pool_size": (32 // family.reductions[-1],) * 2,
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": MEAN,
        "std": STD,
        "first_conv": first_conv,
        "classifier": family.head_name,
        "license": "mit",
    }
    # timm reads the configurations of a model from its module.
    cfgs = generate_default_cfgs(dict.fromkeys(variants, cfg))
    setattr(here, "default_cfgs", {**getattr(here, "default_cfgs", {}), **cfgs})  # noqa: B010
    for name, settings in variants.items():
        entry = _entry(name, family, settings)
        entry.__name__ = entry.__qualname__ = name
        entry.__module__ = module
        setattr(here, name, entry)
        register_model(entry)


def _entry(name: str, family: type[CifarNet], settings: Mapping[str, Any]) -> Callable[..., Any]:
    def build(pretrained: bool = False, **kwargs: Any) -> Any:
        # The getter uses forward_intermediates: activations between stages are not modules here.
        cfg = {"feature_cls": "getter", "out_indices": tuple(range(len(family.reductions)))}
        return build_model_with_cfg(family, name, pretrained, feature_cfg=cfg, **{**settings, **kwargs})

    build.__doc__ = f"{name}: {family.__name__} with {dict(settings)}."
    return build
