"""Keep non-finite steps from leaving traces or being taken for results (docs/method.md section 5)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.errors import NonFinite
from pipeline.training import distributed

if TYPE_CHECKING:
    from timm.task import TrainingTask  # delivery starts before timm is imported


def statistics(module: nn.Module) -> list[Tensor]:
    """The buffers that a forward pass of `module` may change: those of its parts in training mode."""
    return [b for part in module.modules() if part.training for b in part.buffers(recurse=False)]


class Kept:
    """Tensors of one device as they were before a step, restored if it is skipped; nothing waits for the device."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        groups: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            groups.setdefault(tensor.dtype, []).append(tensor)
        self._groups = list(groups.values())
        self._before: list[Tensor] = []

    @torch.no_grad()
    def save(self) -> None:
        """Save the current values."""
        self._before = self._flat()

    @torch.no_grad()
    def broken(self) -> Tensor:
        """Whether a value that was finite when it was saved no longer is; a bool scalar on the device."""
        found = [
            (torch.isfinite(before) & ~torch.isfinite(now)).any()
            for before, now in zip(self._before, self._flat(), strict=True)
            if before.is_floating_point()
        ]
        return torch.stack(found).any() if found else torch.tensor(False)

    @torch.no_grad()
    def put_back(self, skipped: Tensor) -> None:
        """Restore the saved values if the bool scalar `skipped` is true; else keep the current ones, bit for bit."""
        for group, before, now in zip(self._groups, self._before, self._flat(), strict=True):
            parts = torch.where(skipped, before, now).split([t.numel() for t in group])
            torch._foreach_copy_(group, [part.view(t.shape) for part, t in zip(parts, group, strict=True)])

    def _flat(self) -> list[Tensor]:
        """One vector per type: a few kernels in total instead of a few per tensor."""
        return [torch.cat([t.reshape(-1) for t in group]) for group in self._groups]


def is_finite(tree: Any) -> bool:
    """Whether a tree of state (dicts, lists, numbers, tensors) is free of NaN, and its tensors of infinities, too.

    Numbers may be infinite: «no accuracy yet» is minus infinity.
    """
    if isinstance(tree, Tensor):
        return not tree.is_floating_point() or bool(torch.isfinite(tree).all())
    if isinstance(tree, dict):
        return all(map(is_finite, tree.values()))
    if isinstance(tree, list | tuple):
        return all(map(is_finite, tree))
    return not isinstance(tree, float) or tree == tree


def require_finite(values: Tensor, name: str, what: str = "outputs") -> None:
    """Raise NonFinite unless `values` (n, ...) are all finite, in every process: NaN logits would count as class 0."""
    bad = ~torch.isfinite(values.reshape(len(values), -1)).all(dim=1)
    if distributed.anyone(bool(bad.any())):
        raise NonFinite(
            f"{name}: {int(bad.sum())} of {len(bad)} {what} in evaluation are not finite: it has diverged; lower its "
            "learning rate, or set optim.use_amp=false"
        )


def update_average(task: "TrainingTask", step: int, skipped: Tensor) -> None:
    """Update a task's moving average once, unless the bool scalar `skipped` is true."""
    if not skipped.is_cuda:
        if not skipped:
            task.update_ema(step=step)
        return
    average = task.get_trainable_module(ema=True)
    assert average is not None
    kept = Kept(average.module.state_dict().values())
    kept.save()
    task.update_ema(step=step)
    kept.put_back(skipped)
