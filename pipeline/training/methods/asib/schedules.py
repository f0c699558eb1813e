"""Everything that changes with the epoch: temperature, bottleneck weight, distillation weight, learning rate.

Counters (docs/method.md): a = A-epochs so far, b = B-epochs so far, e = a + b, all from 0.
"""

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

from pipeline.config import MethodConfig, ScheduleConfig

TIMM_OPTIMIZER = {"sgd": "momentum", "adam": "adam", "adamw": "adamw"}
"""timm calls plain SGD with momentum, as the KD tables use it, "momentum"; its "sgd" is Nesterov's."""


def beta(method: MethodConfig, a: int, a_in_stage: int) -> float:
    """Weight of the bottleneck's KL term in A-epoch `a` of the run, the `a_in_stage`-th of its stage (section 2).

    `beta_schedule` [start, end, total]: start + (end - start) min(a' / total, 1), else ib_beta min(a' / warm-up, 1),
    with a' = A-epochs after `synergy_only_epochs`; 0 in those, without a bottleneck, and after `ib_epochs_per_stage`.
    """
    after = a - method.synergy_only_epochs
    if not method.use_ib or after < 0:
        return 0.0
    if method.ib_epochs_per_stage is not None and a_in_stage >= method.ib_epochs_per_stage:
        return 0.0
    if method.beta_schedule is not None:
        start, end, total = method.beta_schedule
        return start + (end - start) * min(after / total, 1.0)
    if method.ib_beta_warmup_epochs == 0:
        return method.ib_beta
    return method.ib_beta * min(after / method.ib_beta_warmup_epochs, 1.0)


def tau(method: MethodConfig, e: int, total: int) -> float:
    """Temperature in epoch `e` of `total`: `tau_schedule` linear in t = e / (total - 1), else `tau` (section 2)."""
    if method.tau_schedule is None:
        return method.tau
    start, end = method.tau_schedule
    return start + (end - start) * (e / (total - 1) if total > 1 else 0.0)


def kd_weight(method: MethodConfig, b: int, total: int) -> float:
    """w(b) = min(1, (b + 1) / kd_warmup_epochs), 0 in the last `kd_cooldown_epochs` of `total` B-epochs (section 2)."""
    if b >= total - method.kd_cooldown_epochs:
        return 0.0
    if method.kd_warmup_epochs == 0:
        return 1.0
    return min(1.0, (b + 1) / method.kd_warmup_epochs)


def optimizer(name: str, groups: list[tuple[nn.Module, float]], weight_decay: float, momentum: float) -> Optimizer:
    """A fused torch optimiser over all trainable parameters of each module at its learning rate, all of them decayed.

    timm would spare biases and norms from decay; the KD tables do not. Fused optimisers skip an update whose
    `found_inf` is set without asking the device (see loop.py).
    """
    made_of = [{"params": [p for p in m.parameters() if p.requires_grad], "lr": lr} for m, lr in groups]
    parameters = [p for group in made_of for p in group["params"]]  # type: ignore[attr-defined]
    made = create_optimizer_v2(
        made_of,
        opt=TIMM_OPTIMIZER[name],
        lr=groups[0][1],
        weight_decay=weight_decay,
        momentum=momentum,
        filter_bias_and_bn=False,
        fused=True,
    )
    if name == "sgd" and momentum > 0:
        # torch makes these in the first step, uninitialised, and a skipped first step would leave them so
        for p in parameters:
            made.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return made


def lr_schedule(optimizer: Optimizer, config: ScheduleConfig, epochs: int, updates_per_epoch: int) -> Scheduler:
    """Learning rate per update over `epochs`: linear warm-up from peak / W over W updates, then cosine to `min_lr`
    or steps by `gamma`.

    The cosine spans what the warm-up leaves, and reaches the peak at the warm-up's end. The rate depends on the
    number of updates only: `scheduler.step_update(n)` before update n + 1 (n from 0).
    """
    updates = max(updates_per_epoch, 1)
    warmup = config.lr_warmup_epochs * updates
    peak = optimizer.param_groups[0]["lr"]
    common = {"warmup_t": warmup, "warmup_lr_init": peak / max(warmup, 1), "t_in_epochs": False}
    if config.type == "cosine":
        falling = max(epochs - config.lr_warmup_epochs, 1) * updates
        return CosineLRScheduler(optimizer, t_initial=falling, lr_min=config.min_lr, warmup_prefix=True, **common)
    # milestones count from the start of the run, warm-up included; timm applies each one update before its time
    falls = [milestone * updates + 1 for milestone in config.milestones]
    return MultiStepLRScheduler(optimizer, falls, decay_rate=config.gamma, warmup_prefix=False, **common)


def two_views(method: MethodConfig, b: int) -> bool:
    """Whether the targets of B-epoch b are means over two views."""
    start, stop = method.kd_two_view_start_epoch, method.kd_two_view_stop_epoch
    return start is not None and stop is not None and start <= b < stop
