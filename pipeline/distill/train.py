"""What the training runs of a machine share: threads, data, the loop with its record, and what may be continued."""

import logging
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from pipeline.config import Config, DatasetConfig, config_hash
from pipeline.config.identity import Identity, computation, sources_of
from pipeline.data import sources
from pipeline.data.sources import ImageData
from pipeline.distill import networks
from pipeline.errors import NonFinite, UserError
from pipeline.paths import REPOSITORY, user_path
from pipeline.runs.run import Run
from pipeline.training import distributed
from pipeline.training.checkpoint import pack, require_space, unpack
from pipeline.training.loop import Loop, Watch
from pipeline.training.optim import Precision
from pipeline.training.run_data import Task

logger = logging.getLogger("asib")
ALL_THREADS = torch.get_num_threads()
"""Torch's own choice: all cores, or OMP_NUM_THREADS."""


def prepare(config: Config, threads: int | None = None) -> None:
    """Threads and determinism, before the first tensor. Raises UserError: an unknown network."""
    networks.check_names(config)
    torch.set_num_threads(threads or config.threads or ALL_THREADS)
    if config.optim.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        # torch would also fill all that it allocates, a pass over memory each time; our kernels write what they read
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False


def images(config: Config) -> ImageData:
    """The configuration's images; the last data set stays in memory for a process's next run."""
    path = user_path(config.dataset.path, "dataset.path") if config.dataset.path else None
    dataset = config.dataset.model_copy(update={"batch_size": 1, "eval_batch_size": 1})  # the same images
    return _load(dataset, path.stat().st_mtime_ns if path is not None and path.exists() else 0)


@lru_cache(maxsize=1)
def _load(dataset: DatasetConfig, changed: int) -> ImageData:
    return sources.load(dataset)


def load_data(run: Run) -> ImageData:
    """The run's images, stated in its record."""
    data = images(run.config)
    run.journal.tags({"asib.data_digest": data.digest})
    profile = {"classes": data.num_classes, "train": len(data.train_y), "test": len(data.test_y)}
    # MLflow keeps one context for each digest, and the digest covers both splits
    context = "test" if run.step in ("evaluate", "promote") else "training"
    run.journal.dataset(data.name, data.digest, context, data.source, profile=profile)
    return data


def train(
    run: Run,
    task: Task,
    data: ImageData,
    teachers: Sequence[str] = (),
    part: str = "",
    watch: Watch | None = None,
    bank: bool = False,
) -> Loop:
    """Run the task to its end from where the run stands; its metrics and checkpoints are in the run's record.

    After `safe_retry_patience` non-finite steps in a row under AMP the run restarts once from its last good checkpoint
    with AMP off (SAFE-RETRY, docs/method.md section 5).

    Args:
        teachers: hashes of the teachers' weights.
        part: which of several results of this configuration the run makes.
        watch: it may end the run after an epoch.
        bank: whether teachers' outputs come from the bank.

    Raises:
        NonFinite: without AMP, or the second time.
        Pruned, Taken: as `watch` decided.
    """
    config, device = run.config, networks.device_of(run.config)
    retried = run.state is not None and run.state["header"].get("safe_retry", False)
    precision = Precision(config.optim.model_copy(update={"use_amp": config.optim.use_amp and not retried}), device)
    header: dict[str, Any] = {
        "config_hash": config_hash(config),
        "computation": computation(config),
        "data_digest": data.digest,
        "teachers": list(teachers),
        "bank": bank,
        "compiled": task.compiled,
        "amp_dtype": precision.name,
        "safe_retry": retried,
        "threads": torch.get_num_threads(),
        "cpu": cpu_name(),
    }
    state_identity(run, header, part)
    require_space(run.folder, [p.objective.trained for p in task.phases.values()])
    loop = Loop(
        task,
        run.journal,
        None if run.follower else run.slots,
        header,
        precision,
        device,
        stop=run.stop,
        every_seconds=config.checkpoint.every_seconds,
        watch=watch,
    )
    if run.state is not None:
        check_continuation(run, header)
        loop.load_state_dict(run.state | ({"finished": False} if config.extend else {}))
        if config.extend:
            run.restate()
        logger.info("continuing at epoch %d of %d", min(loop.epoch + 1, len(task.plan)), len(task.plan))
    run.ready()
    with run.stop.between_batches(), logging_redirect_tqdm([logger]):
        if precision.dtype is None:
            loop.run()
        else:
            loop = _run_with_retry(run, loop, part)
    _check_lock(run, header["config_hash"])
    return loop


def state_identity(run: Run, header: Mapping[str, Any], part: str = "") -> None:
    """Tag the run with the identity of its result. `header`: what checkpoints state; `part`: as `train` takes it."""
    code, teachers = sources_of(run.config, REPOSITORY), tuple(header["teachers"])
    made_of = (header["config_hash"], header["amp_dtype"], teachers, header["data_digest"], code)
    identity = Identity(*made_of, part, header["bank"], header["compiled"]).digest()
    tags = {"asib.identity": identity, "asib.teachers": ",".join(teachers) or "none", "asib.sources": code}
    run.journal.tags(tags)


def _check_lock(run: Run, before: str) -> None:
    """Check that the configuration is what it was when the run began (docs/method.md section 6)."""
    if run.config_hash != before:
        raise RuntimeError(f"the configuration changed during the run: {before} before, {run.config_hash} now")


def _run_with_retry(run: Run, loop: Loop, part: str) -> Loop:
    """SAFE-RETRY: once, from the last good checkpoint (or the start), with AMP off; return the loop that finished."""
    start, record = pack(loop.state_dict()), run.journal.snapshot()
    try:
        loop.run()
        return loop
    except NonFinite as error:
        logger.warning("SAFE-RETRY with AMP off: %s", error)
        reason = str(error)
    header = loop.header | {"amp_dtype": "float32", "safe_retry": True}
    _check_lock(run, header["config_hash"])
    distributed.barrier()  # the first process has finished writing
    good = run.slots.read_good() if run.slots.manifest.exists() else None
    state = unpack(start) if good is None else good[0]
    distributed.barrier()  # every process has read what the first one is about to overwrite
    if good is None:
        run.rewind(record, None)
    else:
        run.rewind(state["journal"], good[1])
    run.journal.tags({"asib.safe_retry": reason})
    state_identity(run, header, part)
    precision = Precision(run.config.optim.model_copy(update={"use_amp": False}), loop.device)
    again = replace(loop, recorder=run.journal, header=header, precision=precision)
    again.load_state_dict(state)
    again.run()
    return again


def check_continuation(run: Run, header: dict[str, Any]) -> None:
    """Raise UserError for other data or teachers than before; the configuration was checked when the run was opened."""
    before = run.state["header"]
    check_material(run, before, header)
    if (before["threads"], before["cpu"]) != (header["threads"], header["cpu"]):
        logger.warning(
            "continued with threads=%d on %s after threads=%d on %s: results agree within rounding only",
            *(header["threads"], header["cpu"], before["threads"], before["cpu"]),
        )
    for key, words in (("bank", "the teacher bank"), ("compiled", "torch.compile")):
        if before.get(key, False) != header[key]:
            change = "without" if before.get(key, False) else "with"
            logger.warning("continued %s %s, unlike before: results agree within rounding only", change, words)


def check_material(run: Run, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError for other data or teachers than a result began with."""
    for key, words in (("data_digest", "data"), ("teachers", "teachers")):
        if before[key] != now[key]:
            name = run.config.resume or run.folder.name
            raise UserError(f"resume={name}: {words} {before[key]} cannot be continued with {now[key]}")


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:(.*)", info.read_text() if info.exists() else "", re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def threads_of(run: Run) -> int | None:
    """The threads that a continued run began with, so that it ends bit-identical; None: not continued, or set."""
    return run.state["header"]["threads"] if run.state is not None and run.config.threads is None else None
