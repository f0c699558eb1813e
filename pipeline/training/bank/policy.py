"""Whether a run uses the teacher bank (docs/method.md section 8), as its configuration alone decides.

So a run that is continued, repeated or looked up decides as it did before; whether a bank exists does not matter.
"""

from dataclasses import dataclass
from typing import Literal

from pipeline.config import Config
from pipeline.config.datasets import PICTURES

VIEWS = 162
"""Crops and flips of an image (pipeline/data/views.py)."""
PAYS = 0.25
"""`auto` uses a bank for a single run that saves at least this share of its teachers' forward passes with it."""


@dataclass(frozen=True)
class BankUse:
    """How the bank is used and, if it is off, why."""

    mode: Literal["ahead", "lazy", "off"]
    reason: str = ""

    @property
    def on(self) -> bool:
        return self.mode != "off"


def bank_use(config: Config) -> BankUse:
    """Resolve `bank` for a configuration."""
    if config.bank == "off":
        return BankUse("off", "bank=off")
    obstacle = not_enumerable(config)
    if obstacle is not None:
        return BankUse("off", obstacle)
    if config.bank != "auto":
        return BankUse(config.bank)
    saved = saved_alone(config)
    if saved < PAYS:
        return BankUse("off", f"it would save {max(saved, 0):.0%} of the teachers' forward passes; bank=lazy uses one")
    return BankUse("lazy")


def shared(config: Config) -> Config:
    """The configuration for one of several runs with the same teachers: what one computes, the others find.

    Random streams depend on the seed only: runs that differ in something else ask for the very same views.
    """
    return config.model_copy(update={"bank": "lazy"}) if config.bank == "auto" else config


def not_enumerable(config: Config) -> str | None:
    """Why the teachers' outputs cannot be kept; None if they can."""
    m = config.method
    if not config.method.distils:
        return "nothing is distilled"
    if config.continual.num_tasks is not None:
        return "continual.num_tasks: each task has images and classes of its own"
    if m.teachers_change:
        return "method.use_teacher_finetuning=true: the teachers change"
    if m.maps:
        return f"method={m.name} needs feature maps, which a bank does not keep"
    if config.dataset.name in PICTURES:
        return f"dataset.name={config.dataset.name}: pictures cropped at random are no fixed set of views"
    if config.augment.randaugment:
        return "augment.randaugment=true: an image has no fixed set of views"
    if m.kd_view == "mixed" and m.mixes:
        return "method.kd_view=mixed: the teachers see mixed images, which do not come again"
    return None


def saved_alone(config: Config) -> float:
    """The share of its teachers' forward passes that one run saves with an initially empty bank; below 0: it adds some.

    Without a bank, a sample gate shows the teachers only part of the images; with one they see all.
    """
    m = config.method
    views = VIEWS if config.augment.crop_flip else 1
    distilled = m.b_epochs - m.kd_cooldown_epochs
    second = 0
    if m.kd_two_view_start_epoch is not None and m.kd_two_view_stop_epoch is not None:
        second = max(0, min(m.kd_two_view_stop_epoch, distilled) - m.kd_two_view_start_epoch)
    adapted = m.a_epochs
    needed = 1.0
    if m.kd_sample_gate:
        most = m.kd_sample_max_ratio
        mixes = m.kd_view == "clean" and m.mixes
        needed = 1 - (1 - most) ** 2 if mixes else most  # including the mix partners
    draws = adapted + distilled + second
    without = adapted + needed * (distilled + second)
    return 1 - different(views, draws) / without if without > 0 else 0.0


def different(views: int, draws: int) -> float:
    """The expected number of distinct views among E draws of V equally likely ones: V (1 − (1 − 1/V)^E)."""
    return views * (1 - (1 - 1 / views) ** draws)
