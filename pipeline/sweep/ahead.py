"""The teacher bank of a sweep, built by the driver so that workers do not all compute the same."""

from collections.abc import Sequence

from pipeline.config import Config
from pipeline.data.sources import ImageData
from pipeline.distill import bank, networks
from pipeline.distill.teachers import Teacher
from pipeline.runs.signals import Stop
from pipeline.sweep.request import Plan
from pipeline.training.bank.policy import bank_use, shared
from pipeline.training.student import task_of


def pays(config: Config, plan: Plan, left: int) -> bool:
    """Whether the driver should build the bank that the trials of `config` will use.

    With one worker the first trial fills the bank for the next ones at the same cost; several that start together would
    each compute it. Trials of other seeds see other views, and a Slurm worker may run on another machine.

    Args:
        left: trials still to run.
    """
    if (
        not bank_use(shared(config)).on
        or left < 2
        or "seed" in plan.sweep.space
        or plan.workers.cluster.kind != "local"
    ):
        return False
    return config.bank == "ahead" or (config.bank == "auto" and plan.workers.number > 1)


def build(config: Config, data: ImageData, found: Sequence[Teacher], stop: Stop) -> None:
    """Compute what trials with the epochs of `config` will ask the teachers.

    Raises:
        Interrupted: a signal arrived; what is computed is kept.
    """
    config = config.model_copy(update={"bank": "ahead"})
    student = networks.build_student(config, data)
    opener = bank.opener(config, data, [t.hash for t in found])
    task = task_of(config.method)(config, data, student, [t.net for t in found], networks.device_of(config), opener)
    try:
        bank.build_ahead(task, stop)
    finally:
        if task.bank is not None:
            task.bank.close()
