"""The teacher bank of a run: whether it has one, where it is, what is computed ahead (docs/method.md section 8)."""

import logging
from collections.abc import Sequence
from pathlib import Path

from models.features import FeatureNet
from pipeline.config import Config
from pipeline.config.places import output_dir
from pipeline.data.batches import TrainBatches
from pipeline.data.sources import ImageData
from pipeline.paths import user_path
from pipeline.runs.signals import Stop
from pipeline.training import distributed
from pipeline.training.bank.cache import BankCache
from pipeline.training.bank.lookup import BankedTeachers
from pipeline.training.bank.policy import bank_use
from pipeline.training.costs import Costs
from pipeline.training.optim import Precision
from pipeline.training.student import Distillation, OpenBank

logger = logging.getLogger("asib")


def folder(config: Config) -> Path:
    """The folder of a configuration's banks."""
    return user_path(config.bank_folder, "bank_folder") if config.bank_folder else output_dir(config) / "bank"


def opener(config: Config, data: ImageData, hashes: Sequence[str]) -> OpenBank:
    """Return a function that opens a task's bank where its configuration has one, and logs a line about it.

    `data`: the images that the task is made with; `hashes`: of its teachers' weights, in order.
    """
    use = bank_use(config)

    def opened(batches: TrainBatches, teachers: Sequence[FeatureNet], costs: Costs) -> BankedTeachers | None:
        if not use.on:
            if teachers:
                asked = config.bank != "auto" or config.bank_folder is not None
                logger.log(logging.INFO if asked else logging.DEBUG, "no teacher bank: %s", use.reason)
            return None
        cache = BankCache(folder(config), int(config.bank_gb * 1e9))
        bank = BankedTeachers(cache, data, batches, teachers, hashes, costs)
        failed = False
        try:
            with Precision(config.optim, batches.device).autocast():
                bank.begin()
        except OSError as error:
            failed = True
            logger.warning("no teacher bank: %s cannot be used (%s); bank_folder=… names another", cache.folder, error)
        if distributed.anyone(failed):  # all processes have one, or none has
            bank.close()
            return None
        used, limit = cache.used() / 1e9, config.bank_gb
        logger.info("teacher bank: %s, in %s (%.2f of %g GB used)", use.mode, cache.folder, used, limit)
        return bank

    return opened


def build_ahead(task: Distillation, stop: Stop) -> None:
    """Fill a task's bank with everything that training will ask for, if its configuration says so.

    Raises Interrupted: a signal arrived; what is done is kept.
    """
    if task.bank is None or bank_use(task.config).mode != "ahead":
        return
    with Precision(task.optim, task.device).autocast():
        task.bank.build(task.asked_of_teachers(), stop)
    logger.info("teacher bank: %d images of all teachers computed ahead", task.bank.total.computed)


def conclude(task: Distillation) -> None:
    """Log how much a task's bank served, and close it."""
    if task.bank is not None:
        total = task.bank.total
        logger.info("teacher bank: %d images of all teachers served, %d computed", total.served, total.computed)
        task.bank.close()
