"""A step as a guest in a process that lives on, such as a notebook's."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.runs.run_log import log_to_terminal

HANDLED = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def as_guest() -> Iterator[None]:
    """Show the step's log, and put back what a step changes in its process: handlers, environment, torch's settings.

    Freed memory stays with the process all the same (`allocator.keep_freed_memory`).
    """
    log = logging.getLogger("asib")
    logged = log.handlers[:], log.level, log.propagate
    environment, threads = dict(os.environ), torch.get_num_threads()
    handlers = [(number, signal.getsignal(number)) for number in HANDLED]
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    benchmark = torch.backends.cudnn.benchmark
    log_to_terminal()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers:
                signal.signal(number, handler or signal.SIG_DFL)
        log.handlers[:], level, log.propagate = logged
        log.setLevel(level)
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = benchmark
