"""What a run costs: updates, forward images of each network in training, multiply-accumulates, seconds, energy."""

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from models.features import undisturbed
from pipeline.training import distributed
from pipeline.training.energy import Meters

JOULES_OF_KWH = 3.6e6


def images_in(args: tuple[Any, ...]) -> int:
    """The batch size of a call: that of its first tensor, also within a list."""
    for value in args:
        if isinstance(value, list | tuple):
            return images_in(tuple(value))
        if isinstance(value, Tensor):
            return len(value)
    return 0


@torch.no_grad()
def macs(net: nn.Module, *args: Any) -> int:
    """Multiply-accumulates of one call in eval mode; divide by its batch size for those of an image."""
    # operations inside compiled kernels cannot be counted
    with undisturbed(net), torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        net(*args)
    return int(counter.get_total_flops()) // 2


class Costs:
    """Count forward images and updates inside `counting`, which evaluation is outside of.

    Args:
        networks: name -> network; each of its forward calls is counted, no matter who makes it.
        measured: those whose inputs only their method knows: they are listed from their first call on, which also says
            how many multiply-accumulates an image takes.
    """

    def __init__(self, networks: Mapping[str, nn.Module], measured: Collection[str] = ()) -> None:
        self.images = {name: 0 for name in networks if name not in measured}
        self.macs: dict[str, int] = {}
        """Of the measured ones, for an image."""
        self.updates: dict[str, int] = {}
        self.seconds = 0.0
        self.joules: dict[str, float] = {}
        """Of "cpu" and "gpu", if all seconds were metered."""
        self._meters: Meters | None = None
        self._begun = 0.0
        self._active = False
        self._measured = measured
        for name, net in networks.items():
            net.register_forward_pre_hook(lambda net, args, name=name: self._called(name, net, args))

    def _called(self, name: str, net: nn.Module, args: tuple[Any, ...]) -> None:
        if self._active and name in self._measured and name not in self.macs:
            with self.counting(False):  # measuring calls it once more
                self.macs[name] = macs(net, *args) // images_in(args)
        self.asked(name, images_in(args))

    @contextmanager
    def counting(self, active: bool = True) -> Iterator[None]:
        """Count forward calls made inside the block, unless `active` is False."""
        before, self._active = self._active, active
        try:
            yield
        finally:
            self._active = before

    def asked(self, name: str, images: int) -> None:
        """Count images in a forward call, or in what the teacher bank supplied instead.

        A method's cost does not depend on which run filled the bank; for that, see `bank/computed`.
        """
        if self._active:
            self.images[name] = self.images.get(name, 0) + images

    def start(self, device: torch.device) -> None:
        """Begin to count time and energy."""
        self._meters = self._meters or Meters(device)
        self._meters.used()
        self._begun = time.perf_counter()

    def lap(self) -> None:
        """Count the time and energy since the start, or since the last lap."""
        assert self._meters is not None
        now, used = time.perf_counter(), self._meters.used()
        if self.seconds:
            used = {name: self.joules[name] + used[name] for name in self.joules.keys() & used.keys()}
        self.seconds, self.joules, self._begun = self.seconds + now - self._begun, used, now

    def updated(self, phase: str) -> None:
        """Count one optimiser update of a phase."""
        self.updates[phase] = self.updates.get(phase, 0) + 1

    def state_dict(self) -> dict[str, Any]:
        times = {"seconds": self.seconds, "joules": self.joules}
        return {"images": self.images, "macs": self.macs, "updates": self.updates, **times}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.images.update(state["images"])
        self.macs.update(state.get("macs", {}))  # older checkpoints have none
        self.updates, self.seconds = dict(state["updates"]), state["seconds"]
        self.joules = dict(state.get("joules", {}))

    def metrics(self) -> dict[str, float]:
        """`cost/forward_images/<network>`, `cost/updates/<phase>`, times and energy, over all processes."""
        names, world = list(self.images), distributed.world()
        device = "cuda" if torch.cuda.is_available() and world.size > 1 else "cpu"
        joules = [self.joules.get(of, 0.0) for of in ("cpu", "gpu")]
        mine = [float(self.images[name]) for name in names] + joules
        *counts, cpu, gpu = distributed.total(torch.tensor(mine, dtype=torch.float64, device=device)).tolist()
        found = {f"cost/forward_images/{n}": v for n, v in zip(names, counts, strict=True)}
        found |= {f"cost/updates/{phase}": float(n) for phase, n in self.updates.items()}
        found |= {f"cost/energy_kwh/{of}": n / JOULES_OF_KWH for of, n in (("cpu", cpu), ("gpu", gpu)) if n}
        return found | {"cost/seconds": self.seconds, "cost/device_hours": self.seconds * world.size / 3600}
