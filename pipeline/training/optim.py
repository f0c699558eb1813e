"""Optimisers, learning rates, precision, and one update (docs/method.md sections 2 and 5)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.config import OptimConfig, ScheduleConfig
from pipeline.training import distributed
from pipeline.training.nonfinite import Kept
from pipeline.training.phases import Phase

TIMM_OPTIMIZER = {"sgd": "momentum", "adam": "adam", "adamw": "adamw"}
"""timm calls plain SGD with momentum, as the KD tables use it, "momentum"; its "sgd" is Nesterov's."""


def optimizer(name: str, groups: list[tuple[nn.Module, float]], weight_decay: float, momentum: float) -> Optimizer:
    """A fused torch optimiser over all trainable parameters of each module at its learning rate, all of them decayed.

    timm would spare biases and norms from decay; the KD tables do not. Fused optimisers skip an update whose
    `found_inf` is set, without a sync (see `update`).
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
        # torch allocates these uninitialised in the first step, and skipping that step would leave them so
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


class Precision:
    """Autocast and, for float16, the gradient scaler (docs/method.md section 5)."""

    def __init__(self, optim: OptimConfig, device: torch.device) -> None:
        self.device = device
        self.dtype = getattr(torch, optim.amp_dtype) if optim.use_amp else None
        self.scaler = (
            torch.amp.GradScaler(device.type, init_scale=optim.grad_scaler_init_scale)
            if self.dtype is torch.float16
            else None
        )

    @property
    def name(self) -> str:
        """The type actually used, which is part of a result's identity."""
        return "float32" if self.dtype is None else str(self.dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.dtype is None else torch.autocast(self.device.type, dtype=self.dtype)


def update(phase: Phase, loss: Tensor, precision: Precision, kept: Kept | None = None) -> Tensor:
    """Make one optimiser update; a non-finite one is skipped, and `kept`, whatever else the pass changed, restored.

    Returns whether it was skipped, as a tensor, without a sync.
    """
    optimizer = phase.optimizer
    optimizer.zero_grad(set_to_none=True)
    if precision.scaler is None:
        loss.backward()
    else:
        precision.scaler.scale(loss).backward()
        precision.scaler.unscale_(optimizer)
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in trained])
    if phase.clip > 0:
        torch.nn.utils.clip_grads_with_norm_(trained, phase.clip, norm)
    bad = ~torch.isfinite(norm) | ~torch.isfinite(loss.detach())
    if kept is not None:
        bad = bad | kept.broken()
    if distributed.world().size > 1:  # either all processes skip the step or none does
        bad = distributed.total(bad.float()) > 0
    # fused optimisers skip the step where found_inf is 1, as they do for GradScaler
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    optimizer.step()
    if precision.scaler is not None:
        precision.scaler.update()
    if kept is not None and (bad.is_cuda or bad):  # on a GPU, do not wait for the result
        kept.put_back(bad)
    return bad


def restore_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's state, its moments in their parameters' memory format, which checkpoints do not keep.

    Fused kernels walk parameters and moments side by side in memory: in another order they would be paired wrongly.
    """
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
