"""What a network costs to use: parameters, multiply-accumulates, latency and throughput."""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.features import undisturbed
from pipeline.training import costs

BATCHES = (1, 256)
BUDGET_S = {1: 0.8, 256: 2.0}
"""Seconds of measuring at each batch size; a single call may take longer."""
REPEATS = {1: 100, 256: 20}
PATIENCE_S = 30.0
"""A batch that would take longer than this is not measured."""
WARM_UP = 16
"""Images in the call that warms up threads and kernels before a large batch, which itself may take seconds."""


def size(net: nn.Module, image: Tensor) -> dict[str, float]:
    """`parameters/total`, and `cost/macs_per_image`: multiply-accumulates for one image (1, C, H, W), eval mode."""
    total = sum(p.numel() for p in net.parameters())
    return {"parameters/total": float(total), "cost/macs_per_image": float(costs.macs(net, image))}


def latency(net: nn.Module, image: Tensor) -> dict[str, float]:
    """`speed/latency_ms_<b>` at batch b, and `speed/images_per_second_256`, on the image's device, eval mode.

    Medians over repeated calls after warm-up, with torch's present number of threads; images (1, C, H, W) are already
    on the device, normalised, in the memory format of evaluation. A batch too slow to be repeated within its budget is
    measured by a single call.
    """
    found: dict[str, float] = {}
    with undisturbed(net):
        for batch in BATCHES:
            x = _batch(image, batch)
            seconds = _median(net, x, _batch(image, min(batch, WARM_UP)), BUDGET_S[batch], REPEATS[batch])
            if seconds is not None:
                found[f"speed/latency_ms_{batch}"] = 1000.0 * seconds
                found[f"speed/images_per_second_{batch}"] = batch / seconds
    found.pop("speed/images_per_second_1", None)  # the latency's reciprocal
    return found


def _batch(image: Tensor, size: int) -> Tensor:
    return image.expand(size, -1, -1, -1).contiguous(memory_format=_format(image))


def _format(image: Tensor) -> torch.memory_format:
    last = image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _median(net: nn.Module, x: Tensor, warm: Tensor, budget: float, repeats: int) -> float | None:
    """Median seconds of net(x); None where one call would take more than `PATIENCE_S`."""
    for _ in range(2):
        expected = _seconds(net, warm) * len(x) / len(warm)
    if expected > PATIENCE_S:
        return None
    if expected < budget / 4:
        _seconds(net, x)
    taken: list[float] = []
    while not taken or (len(taken) < repeats and sum(taken) + statistics.median(taken) < budget):
        taken.append(_seconds(net, x))
    return statistics.median(taken)


def _seconds(call: Callable[[Tensor], object], x: Tensor) -> float:
    synchronise: Callable[[], None] = torch.cuda.synchronize if x.device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    call(x)
    synchronise()
    return time.perf_counter() - start
