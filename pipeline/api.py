"""Steps as functions: the same configuration, the same tracked run, and what it left as an object (docs/api.md)."""

import os
import signal
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from models import zoo
from pipeline.compose.keywords import Given, words
from pipeline.errors import Interrupted, UserError
from pipeline.runs import records
from pipeline.runs.folders import STUDENT
from pipeline.runs.guest import as_guest
from pipeline.runs.step import Done, Step

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Finished:
    """What a step left.

    Attributes:
        folder: of its run, with everything that the run left on this machine.
        metrics: each metric's last value.
        run_id, url: in MLflow; None for a run that is not there, or is in a file and has no URL.
        exit_code: 0, or what the step says with another code: 3 where the gate refuses a promotion.
    """

    folder: Path
    metrics: dict[str, float] = field(repr=False)
    run_id: str | None = None
    url: str | None = None
    exit_code: int = 0

    @cached_property
    def student(self) -> nn.Module:
        """The student with its selected weights, in eval mode on the CPU: normalised images (n, C, H, W) -> logits.

        `timm.data.resolve_model_data_config(student)` gives size, mean and deviation. Raises UserError: none was kept.
        """
        path = self.folder / STUDENT
        if not path.exists():
            raise UserError(f"{self.folder} keeps no student: {STUDENT} is what distill, baseline and continual leave")
        try:
            return zoo.load(path).net
        except ValueError as error:
            raise UserError(str(error)) from error

    def curves(self) -> "DataFrame":
        """Every value of every metric: run, epoch (from 0; the terminal counts from 1), metric, value."""
        from pipeline.frames import curves  # late: it imports pandas

        return curves(self.folder)


def run(step: str, *given: Given, **keys: Any) -> Finished | None:
    """Run the step of this name, as `python -m steps.<name>` would; None if it makes no run (DRY_RUN, --help).

    >>> run("table", "table=quick", seeds=[0, 1])  # doctest: +SKIP

    Raises:
        UserError: refused, with the line that the step prints; nothing was trained, or the run ended FAILED.
        NonFinite: training diverged; other errors as they are. Ctrl-C is Python's KeyboardInterrupt again.
    """
    try:
        declared: Step = import_module(f"steps.{step}").STEP
    except (ModuleNotFoundError, AttributeError) as error:
        raise UserError(f"{step}: no such step; README.md lists them") from error
    with as_guest():
        try:
            done = declared.call(words(given, keys))
        except Interrupted as error:
            done = Done(128 + error.signum, error=error)
    if isinstance(done.error, Interrupted):
        signal.raise_signal(done.error.signum)  # for the handler that was there before
    if done.error is not None:
        raise done.error
    if done.folder is None:
        return None
    tracked = done.tracked
    return Finished(
        done.folder,
        dict(records.from_folder(done.folder).metrics) if os.environ.get("RANK", "0") == "0" else {},
        None if tracked is None else tracked.run_id,
        tracked.url if tracked is not None and tracked.url.startswith("http") else None,
        done.exit_code,
    )


def distill(*given: Given, **keys: Any) -> Finished | None:
    """Distil a student from its teachers.

    >>> done = distill("cfg=quickstart", "method.kd_alpha=0.8", seed=1)  # doctest: +SKIP
    >>> done.metrics["final/acc_val_selected"], done.url  # doctest: +SKIP
    """
    return run("distill", *given, **keys)


def finetune(*given: Given, **keys: Any) -> Finished | None:
    """Fine-tune the teachers; distillations on this machine use them from then on."""
    return run("finetune", *given, **keys)


def evaluate(*given: Given, **keys: Any) -> Finished | None:
    """Evaluate a model.

    >>> evaluate("cfg=quickstart", model=done.folder, split="both")  # doctest: +SKIP
    """
    return run("evaluate", *given, **keys)


def sweep(*given: Given, **keys: Any) -> Finished | None:
    """Search hyperparameters.

    >>> sweep("cfg=quickstart", sweep="kd_ib_tau", trials=30, workers=2)  # doctest: +SKIP
    """
    return run("sweep", *given, **keys)
