"""Batch norms of frozen networks folded into the convolutions before them: the same function, fewer passes over memory.

In eval mode a batch norm is an affine map of each channel, and so is what folding makes of a convolution's weights:
w' = w g / sqrt(v + e), b' = (b - m) g / sqrt(v + e) + h for running mean m and variance v, scale g and shift h.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from models.features import FeatureNet, Features, undisturbed

TOLERANCE = 1e-4
"""Allowed difference between folded and original outputs, relative to the largest; float32 rounding is 1e-6."""


def folded(net: FeatureNet, input_size: tuple[int, int, int]) -> FeatureNet:
    """A copy of `net` for eval mode without gradients, its batch norms folded where that changes nothing.

    If a network uses a convolution's output for more than its batch norm, folding would change the function: the copy
    is compared with the network on a batch, and what cannot be folded is left alone.

    Args:
        net: the network, left unchanged.
        input_size: (in_chans, H, W).
    """
    weight = next(net.parameters())
    count = 4 * input_size[0] * input_size[1] * input_size[2]
    x = torch.linspace(-40, 40, count, device=weight.device).sin().to(weight.dtype).reshape(4, *input_size)
    with undisturbed(net):
        pairs = _pairs(net, x)
        expected = net(x)
        made = _fold(copy.deepcopy(net), pairs)
        if not _agree(expected, made(x)):
            made = copy.deepcopy(net)
            for pair in pairs:  # one by one: those that cannot be folded are left alone
                tried = _fold(copy.deepcopy(made), [pair])
                made = tried if _agree(expected, tried(x)) else made
    return made.requires_grad_(False)


def _fold(net: FeatureNet, pairs: list[tuple[str, str]]) -> FeatureNet:
    """Fold these batch norms of `net` itself into their convolutions."""
    modules = dict(net.named_modules())
    for conv_name, norm_name in pairs:
        conv, norm = modules[conv_name], modules[norm_name]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, _BatchNorm)
        fused = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        _put(net, norm_name, _rest(norm))
    return net


def _pairs(net: FeatureNet, x: Tensor) -> list[tuple[str, str]]:
    """(convolution, batch norm) by name: the convolution's output is the batch norm's input, and it is called once."""
    names = {module: name for name, module in net.named_modules()}
    calls: dict[nn.Module, int] = {}
    made_by: dict[int, tuple[nn.Module, Tensor]] = {}  # the tensors are kept alive, so that no id is reused
    found: list[tuple[nn.Module, nn.Module]] = []

    def convolved(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        calls[module] = calls.get(module, 0) + 1
        made_by[id(output)] = (module, output)

    def normalised(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[module] = calls.get(module, 0) + 1
        if id(inputs[0]) in made_by:
            found.append((made_by[id(inputs[0])][0], module))

    handles = [m.register_forward_hook(convolved) for m in net.modules() if isinstance(m, nn.Conv2d)]
    handles += [m.register_forward_pre_hook(normalised) for m in net.modules() if _is_affine(m)]
    try:
        net(x)
    finally:
        for handle in handles:
            handle.remove()
    return [(names[conv], names[norm]) for conv, norm in found if calls[conv] == calls[norm] == 1]


def _is_affine(module: nn.Module) -> bool:
    """Whether a module is a batch norm that uses its running statistics in eval mode."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _rest(norm: nn.Module) -> nn.Module:
    """What a batch norm does after normalising: timm's have an activation."""
    after = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if isinstance(part, nn.Module)]
    kept = [part for part in after if not isinstance(part, nn.Identity)]
    return nn.Identity() if not kept else kept[0] if len(kept) == 1 else nn.Sequential(*kept)


def _put(net: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(net.get_submodule(owner), last, module)


def _agree(expected: Features, found: Features) -> bool:
    return all(_close(e, f) for e, f in ((expected.logits, found.logits), (expected.feat_2d, found.feat_2d)))


def _close(expected: Tensor, found: Tensor) -> bool:
    return bool((expected - found).abs().max() <= TOLERANCE * max(float(expected.abs().max()), 1e-3))
