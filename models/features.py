"""One wrapper around any timm classifier: logits, pooled feature, last feature map and adapted feature in one pass.

Everything downstream (fusion, feature distillation, teacher bank) reads these four and knows no architecture.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import NamedTuple

import torch
from torch import nn

from models.adapter import DistillationAdapter
from models.class_view import ClassView
from pipeline.errors import first_line

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]
Pass = Callable[[nn.Module, torch.Tensor, tuple[int, ...], bool], Parts]
"""The type of `decompose`."""


class Features(NamedTuple):
    """What one forward pass yields."""

    logits: torch.Tensor
    """(B, N)."""
    feat_2d: torch.Tensor
    """(B, C), pooled: what the classifier reads (after dropout in training mode, where the network has it)."""
    feat_4d: torch.Tensor
    """(B, C', h, w), the last feature map; a view of it where the network computes NHWC or tokens."""
    distill_feat: torch.Tensor | None
    """(B, D), or None without an adapter."""
    maps: tuple[torch.Tensor, ...] = ()
    """(B, C, h, w) of each recorded stage, first to last (`FeatureNet.record`)."""


class FeatureNet(nn.Module):
    """A timm classifier and, with `adapter_dim`, its distillation adapter.

    Args:
        net: a classifier with timm's `forward_features`, `forward_head(pre_logits=True)`, `get_classifier`.
        adapter_dim: D; None for no adapter.
        architecture: the network's name; None: the one that timm gives it.
        small_input: whether its stem is adapted to small images; both travel with checkpoints.

    Attributes:
        feature_dim: C. num_classes: N. distillation_adapter: the adapter or None.
    """

    def __init__(
        self,
        net: nn.Module,
        adapter_dim: int | None = None,
        architecture: str | None = None,
        small_input: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.num_classes = int(net.num_classes)  # type: ignore[arg-type]
        self.feature_dim = _width(net)
        self.distillation_adapter = None if adapter_dim is None else DistillationAdapter(self.feature_dim, adapter_dim)
        self.architecture = architecture or _name(net)
        self.small_input = small_input
        self.stages: tuple[int, ...] = ()
        """The recorded stages."""
        self.preact = False
        """Whether their maps are those before their ReLU."""
        self._pass: Pass = decompose
        self.view: ClassView | None = None
        """Which of the head's classes its logits are of; None: all."""

    def show(self, view: ClassView | None) -> None:
        """From now on its logits are of these classes: `num_classes` says of how many."""
        self.view = None if view is None else view.to(next(self.net.parameters()).device)
        self.num_classes = int(self.net.num_classes) if view is None else len(view.columns)  # type: ignore[arg-type]

    def viewed(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of the whole head (B, N) as the view shows them."""
        return logits if self.view is None else self.view(logits)

    def record(self, stages: Sequence[int], preact: bool = False) -> None:
        """From now on `maps` holds these stages' outputs, numbered as timm's `forward_intermediates` numbers them.

        Args:
            preact: take them before their ReLU; networks that do not offer it (timm's own) give them after it.
        """
        self.stages = tuple(stages)
        self.preact = preact and "preact" in signature(self.net.forward_intermediates).parameters  # type: ignore[arg-type]

    def compile_pass(self, graphs: bool = False) -> None:
        """From now on passes go through torch.compile: compiled when they first run, for each mode and shape.

        The pass is compiled, not the module: counting hooks, copies and state dicts stay as they are.

        Args:
            graphs: also record it as CUDA graphs, to be replayed. On a GPU only.
        """
        # every network, mode and shape takes an entry in the cache of the one code object that is compiled;
        # private API, checked with torch 2.14.1
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        self._pass = kept(torch.compile(decompose, mode="reduce-overhead")) if graphs else torch.compile(decompose)

    def forward(self, x: torch.Tensor) -> Features:
        """(B, in_chans, H, W) → Features; the network runs once."""
        raw, feat, logits, maps = self._pass(self.net, x, self.stages, self.preact)
        logits = self.viewed(logits)
        adapted = None if self.distillation_adapter is None else self.distillation_adapter(feat)
        return Features(logits, feat, to_nchw(self.net, raw), adapted, maps)


def decompose(net: nn.Module, x: torch.Tensor, stages: tuple[int, ...] = (), preact: bool = False) -> Parts:
    """(unpooled features in the network's own layout, pooled feature (B, C), logits (B, N), maps) in one pass."""
    maps: list[torch.Tensor] = []
    if stages:
        more = {"preact": True} if preact else {}  # a keyword of the CIFAR networks
        raw, maps = net.forward_intermediates(x, list(stages), **more)  # type: ignore[operator]
    else:
        raw = net.forward_features(x)  # type: ignore[operator]
    feat = net.forward_head(raw, pre_logits=True)  # type: ignore[operator]
    classifier = net.get_classifier()  # type: ignore[operator]
    if isinstance(classifier, nn.Conv2d):  # a 1×1 convolution as the head (BiT)
        logits = classifier(feat.reshape(*feat.shape[:2], 1, 1)).flatten(1)
    else:
        logits = classifier(feat)
    return raw, feat.flatten(1), logits, tuple(maps)


def kept(replayed: Pass) -> Pass:
    """A pass whose outputs belong to the caller: a CUDA graph's own are overwritten by its next replay.

    With copies, torch's own rule suffices: a compiled call begins an iteration unless a backward pass is still to come.
    `torch.compiler.cudagraph_mark_step_begin` is for other cases, and disables that rule for the whole process: each
    batch of an evaluation would then have to be marked too, or it would be recorded behind the ones before.
    """

    def run(net: nn.Module, x: torch.Tensor, stages: tuple[int, ...] = (), preact: bool = False) -> Parts:
        raw, feat, logits, maps = replayed(net, x, stages, preact)
        return raw.clone(), feat.clone(), logits.clone(), tuple(m.clone() for m in maps)

    return run


def to_nchw(net: nn.Module, raw: torch.Tensor) -> torch.Tensor:
    """The output of `forward_features` as (B, C, h, w), without copying.

    NHWC (Swin) is recognised by timm's `output_fmt` or by where the channels are; tokens (ViT) lose their prefix
    tokens and get their grid back.

    Raises:
        ValueError: a layout that is none of these, tokens that form no grid.
    """
    if not isinstance(raw, torch.Tensor):
        raise ValueError(f"{_name(net)} yields {type(raw).__name__} features; one feature map is needed")
    width = getattr(net, "num_features", None)
    if raw.dim() == 4:
        layout = getattr(net, "output_fmt", None)
        if layout is None:
            layout = "NHWC" if raw.shape[3] == width and raw.shape[1] != width else "NCHW"
        return raw.permute(0, 3, 1, 2) if str(layout).upper().endswith("NHWC") else raw
    if raw.dim() == 3:
        prefix = int(getattr(net, "num_prefix_tokens", 0))
        h, w = _grid(net, raw.shape[1] - prefix)
        return raw[:, prefix:].transpose(1, 2).unflatten(2, (h, w))
    raise ValueError(f"{_name(net)} yields features of shape {tuple(raw.shape)}; (B,C,h,w) or tokens are needed")


def _name(net: nn.Module) -> str:
    """The architecture as timm knows it, for error messages."""
    cfg = getattr(net, "pretrained_cfg", None) or {}
    return str(cfg.get("architecture") or type(net).__name__)


def _width(net: nn.Module) -> int:
    """C, as timm declares it."""
    return int(getattr(net, "head_hidden_size", 0) or getattr(net, "num_features", 0))


def _grid(net: nn.Module, tokens: int) -> tuple[int, int]:
    """Rows and columns of the token grid: the patch embedding's, shrunk by any pooling stages."""
    grid = getattr(getattr(net, "patch_embed", None), "grid_size", None) or (1, 1)
    shrink = math.isqrt(max(1, grid[0] * grid[1] // max(tokens, 1)))
    for h, w in ((grid[0] // shrink, grid[1] // shrink), (math.isqrt(tokens),) * 2):
        if h * w == tokens and tokens > 0:
            return h, w
    raise ValueError(f"{_name(net)} yields {tokens} tokens, which form no grid; it cannot give a feature map")


MOST_STAGES = 4
"""Stages that are compared at most: the KD tables leave out whatever comes before a network's last four."""


def paired_maps(
    student: FeatureNet,
    teachers: Sequence[FeatureNet],
    size: tuple[int, int, int],
    preact: tuple[bool, bool] = (False, False),
) -> tuple[list[tuple[int, int, int]], list[list[tuple[int, int, int]]]]:
    """Record the last stages of all networks, as many as each has, at most `MOST_STAGES`; pairs from the end.

    Args:
        size: (in_chans, H, W).
        preact: whether the student's and the teachers' maps are wanted before their ReLU (`FeatureNet.record`).

    Returns:
        (C, h, w) of the student's maps, first to last, and those of each teacher.

    Raises:
        ValueError: a network gives no maps of stages.
    """
    count = min(MOST_STAGES, *(_stages(net) for net in (student, *teachers)))
    shapes = []
    for net in (student, *teachers):
        total = _stages(net)
        net.record(range(total - count, total), preact[net is not student])
        x = torch.zeros(1, *size, device=next(net.parameters()).device)
        with undisturbed(net):
            shapes.append([(int(m.shape[1]), int(m.shape[2]), int(m.shape[3])) for m in net(x).maps])
    return shapes[0], shapes[1:]


def _stages(net: FeatureNet) -> int:
    """How many stages `forward_intermediates` knows."""
    info = getattr(net.net, "feature_info", None)
    if not hasattr(net.net, "forward_intermediates") or not info:
        raise ValueError(f"{net.architecture} gives no maps of its stages; choose another network")
    return len(info)


@contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; on leaving, every sub-module's mode and torch's CPU generator are as before."""
    modes = {module: module.training for module in net.modules()}
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            net.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_head(net: nn.Module, input_size: tuple[int, int, int]) -> torch.Size:
    """Check on a batch of two that the wrapper's decomposition computes what the network does.

    Args:
        net: a timm classifier.
        input_size: (in_chans, H, W).

    Returns:
        The shape of feat_4d on that batch, (2, C', h, w).

    Raises:
        ValueError: the network refuses the size, or head(pooled features) is not net(x), or there is no feat_4d.
    """
    name, size = _name(net), "×".join(map(str, input_size))
    weight = next(net.parameters())
    count = 2 * math.prod(input_size)
    x = torch.linspace(-40, 40, count, device=weight.device).sin().to(weight.dtype).reshape(2, *input_size)
    if not isinstance(net.get_classifier(), nn.Module):  # type: ignore[operator]
        raise ValueError(
            f"{name} has several classifiers (a distilled network, whose teacher has its own); "
            "one linear layer on pooled features is needed: choose another model"
        )
    with undisturbed(net):
        try:
            expected = net(x)
            raw, feat, logits, _ = decompose(net, x)
        except (RuntimeError, AssertionError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{name} cannot be used with {size} input: {first_line(error)}; "
                "choose another size, small_input or architecture"
            ) from error
        shape = to_nchw(net, raw).shape
    scale = float(expected.abs().max()) if isinstance(expected, torch.Tensor) else math.nan
    if not (isinstance(expected, torch.Tensor) and logits.shape == expected.shape):
        raise ValueError(f"{name}: its output is not one tensor of logits from one linear head; choose another model")
    if not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4 * max(scale, 1e-3)):
        raise ValueError(f"{name}: classifier(pooled features) is not the network's output; choose another model")
    width = _width(net)
    if feat.shape != (2, width):
        raise ValueError(f"{name}: pooled features are {tuple(feat.shape)}, its declared width is {width}")
    return shape
