"""What the machine itself can do, measured: dense operations and memory bandwidth; and what share of it a step uses."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from models.features import undisturbed
from pipeline.training import costs


def rates(device: torch.device) -> dict[str, Any]:
    """10¹² operations a second (float32 as torch is set, bfloat16) in matrix products and convolutions; GB/s of a copy.

    Shares are taken of `dense`, the faster of the two: torch's float32 product (MKL) is less than half as fast
    on an AMD processor as its convolutions (oneDNN), so a share of the product's rate alone would exceed 1.
    """
    gpu = device.type == "cuda"
    found: dict[str, Any] = {"name": torch.cuda.get_device_name(device) if gpu else "processor"}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        matmul, conv = _matmul(8192 if gpu else 2048, dtype, device), _conv(256 if gpu else 64, dtype, device)
        found[f"matmul_{name}_tflops"], found[f"conv_{name}_tflops"] = round(matmul, 3), round(conv, 3)
        found[f"dense_{name}_tflops"] = round(max(matmul, conv), 3)
    source = torch.ones((1 << 30 if gpu else 1 << 28) // 4, device=device)
    target = torch.empty_like(source)
    found["copy_gb_per_second"] = round(2 * source.nbytes / _seconds(lambda: target.copy_(source)) / 1e9, 1)
    return found


def _matmul(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b, out = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(3))
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=out)) / 1e12


@torch.no_grad()
def _conv(channels: int, dtype: torch.dtype, device: torch.device) -> float:
    """3×3, 64 images of 32×32 (on a GPU 512), channels-last."""
    images = 512 if device.type == "cuda" else 64
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False, device=device, dtype=dtype)
    conv.to(memory_format=torch.channels_last)
    x = torch.randn(images, channels, 32, 32, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return 2 * 9 * channels**2 * 32**2 * images / _seconds(lambda: conv(x)) / 1e12


def _seconds(act: Callable[[], object]) -> float:
    """Seconds of one call: the median over half a second."""
    timer = Timer("act()", globals={"act": act}, num_threads=torch.get_num_threads())
    return float(timer.blocked_autorange(min_run_time=0.5).median)


def work(networks: Mapping[str, nn.Module], which: str, x: Tensor, query: bool = True) -> dict[str, float]:
    """Operations and bytes that one image of a step takes.

    An operation is a multiplication or an addition; training passes count three times. Bytes: what every layer reads
    and writes when each is a pass over memory of its own, in x's type; a network that is fused moves fewer.

    Args:
        networks: student and teachers by the names that costs have; a fusion is a thousandth of a teacher.
        x: a batch of images.
        query: whether a B-step with a fusion (two teachers) takes a pass of the student as the query alone.
    """
    flops = moved = 0.0
    for name, net in networks.items():
        passes = 1 if name != "student" or which == "a" else 3 + int(query and "teacher_1" in networks)
        flops += passes * 2 * costs.macs(net, x) / len(x)
        moved += passes * traffic(net, x) / len(x)
    return {"gflops_per_image": flops / 1e9, "mb_per_image": moved / 1e6}


@torch.no_grad()
def traffic(net: nn.Module, x: Tensor) -> float:
    """Bytes of inputs, outputs and weights of all layers in one forward pass."""
    total = 0.0

    def count(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal total
        tensors = [t for t in (*args, output, *module.parameters(recurse=False)) if isinstance(t, Tensor)]
        total += sum(t.numel() * t.element_size() for t in tensors)

    hooks = [m.register_forward_hook(count) for m in net.modules() if not list(m.children())]
    try:
        with undisturbed(net):
            net(x)
    finally:
        for hook in hooks:
            hook.remove()
    return total


def used(speed: float, work_: Mapping[str, float], machine: Mapping[str, Any], precision: str) -> dict[str, float]:
    """Shares of the measured dense rate and bandwidth that a step uses at `speed` images/s."""
    flops, moved = work_["gflops_per_image"] / 1e3, work_["mb_per_image"] / 1e3
    return {
        "of_dense_rate": round(speed * flops / machine[f"dense_{precision}_tflops"], 4),
        "of_bandwidth_unfused": round(
            speed * moved * (0.5 if precision == "bf16" else 1.0) / machine["copy_gb_per_second"], 4
        ),
    }
