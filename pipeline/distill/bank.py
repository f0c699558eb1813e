"""The teacher bank of a run: whether there is one, where it is, what is computed ahead (docs/method.md section 8)."""

import logging
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import Config
from pipeline.config.places import output_dir
from pipeline.data.sources import ImageData
from pipeline.paths import user_path
from pipeline.runs.step import stop
from pipeline.training import distributed
from pipeline.training.bank.cache import BankCache
from pipeline.training.bank.lookup import BankedTeachers
from pipeline.training.bank.policy import bank_use
from pipeline.training.methods.asib.task import Distillation
from pipeline.training.optim import Precision

logger = logging.getLogger("asib")


def folder(config: Config) -> Path:
    """Where the banks of a configuration are."""
    return user_path(config.bank_folder, "bank_folder") if config.bank_folder else output_dir(config) / "bank"


def attach(task: Distillation, data: ImageData, hashes: Sequence[str]) -> BankedTeachers | None:
    """Give a task its bank where its configuration has one, built ahead where it says so; a line says what is done.

    Args:
        data: the images that the task was made with.
        hashes: of the weights of its teachers, in order.

    Raises:
        Interrupted: a signal arrived while it was built.
    """
    config, use = task.config, bank_use(task.config)
    if not use.on:
        if task.teachers:
            logger.info("no teacher bank: %s", use.reason)
        return None
    cache = BankCache(folder(config), int(config.bank_gb * 1e9))
    bank = BankedTeachers(cache, data, task.data.train, task.teachers, hashes)
    precision = Precision(config.optim, task.device)
    fault: OSError | None = None
    try:
        with precision.autocast():
            bank.begin()
    except OSError as error:
        fault = error
        logger.warning("no teacher bank: %s cannot be used (%s); bank_folder=… names another", cache.folder, error)
    if distributed.anyone(fault is not None):  # all processes have one, or none has
        bank.close()
        return None
    task.use_bank(bank)
    used, limit = cache.used() / 1e9, config.bank_gb
    logger.info("teacher bank: %s, in %s (%.2f of %g GB used)", use.mode, cache.folder, used, limit)
    if use.mode == "ahead":
        with precision.autocast():
            bank.build(task.asked_of_teachers(), stop)
        logger.info("teacher bank: %d images of all teachers computed ahead", bank.total.computed)
    return bank


def conclude(bank: BankedTeachers) -> None:
    """Say what the bank was good for, and let it go."""
    total = bank.total
    logger.info("teacher bank: %d images of all teachers served, %d computed", total.served, total.computed)
    bank.close()
