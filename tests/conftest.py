"""Fixtures for all tests, and the tiers: whether a test is a unit test follows from what its file imports.

A file that imports one of OUTSIDE, itself or through a helper in tests/, holds no unit tests; `-m unit` does not even
import it. A single slow test elsewhere is taken out of the tier by marking it `step`.
"""

from __future__ import annotations

import ast
import functools
import gc
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

settings.register_profile("steady", derandomize=True)
settings.load_profile("steady")  # the same examples in every run: CI is to fail for what was changed

HELPERS = ("cifar100", "disks", "servers", "postgres", "slurm", "team_server")
pytest_plugins = [f"tests.{name}" for name in HELPERS]

gc.disable()  # until all is collected: imports make no garbage, and looking for it takes a fifth of their time

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {"subprocess", "multiprocessing", "mlflow", "optuna", "matplotlib", "steps", "pipeline.runs.opening",
           "tests.servers", "tests.steps.lab"}  # fmt: skip
OTHER_TIERS = {"step", "slow", "gpu", "postgres", "slurm", "browser"}


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """What stands in a module or block, and in the blocks below it: imports are never part of an expression."""
    for field in ("body", "orelse", "handlers", "finalbody", "cases"):
        for child in getattr(node, field, ()):
            yield child
            yield from statements(child)


@functools.cache
def leaves_the_process(file: Path) -> bool:
    """Whether a file of tests, or a helper that it imports, imports one of OUTSIDE anywhere."""
    names = set()
    for node in statements(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    if any(name in OUTSIDE or name.partition(".")[0] in OUTSIDE for name in names):
        return True
    helpers = (ROOT / f"{name.replace('.', '/')}.py" for name in names if name.startswith("tests."))
    return any(leaves_the_process(helper) for helper in helpers if helper.exists())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out, for `-m unit`, the files that hold none, and folders of such files with their conftest.py."""
    if config.option.markexpr != "unit":
        return None  # pytest decides
    files = list(collection_path.rglob("test_*.py")) if collection_path.is_dir() else [collection_path]
    return all(file.suffix == ".py" and leaves_the_process(file) for file in files) or None


ONE_WORKER = {
    "team": ("tests/steps/test_four_users.py", "tests/steps/test_outage.py", "tests/steps/test_team_server.py",
             "tests/test_deploy.py", "tests/test_deploy_proxy.py"),
    "server": ("tests/steps/test_kill.py", "tests/browser/test_compare.py", "tests/browser/test_registry.py",
               "tests/browser/test_ui.py", *(f"tests/pipeline/tracking/test_{name}.py" for name in (
                   "deliver", "models", "process", "proxy", "races", "registry", "requests"))),
    "CIFAR-100": ("tests/pipeline/data/test_sources.py", "tests/pipeline/evaluate/test_measures.py",
                  "tests/steps/test_evaluate.py"),
    "slurm": ("tests/pipeline/launch/test_launch.py", "tests/steps/test_sweep_for_real.py",
              "tests/steps/test_grid_workers.py"),
}  # fmt: skip
"""Files that start the same server, or unpack the same data, for a quarter of a minute: one worker takes them all."""
TOGETHER = {file: name for name, files in ONE_WORKER.items() for file in files}
LONGEST = [*TOGETHER, *(f"tests/{name}.py" for name in (
    "steps/test_serving_page", "steps/test_every_method", "pipeline/sweep/step/test_sweep",
    "pipeline/sweep/step/test_sweep_disturbed"))]  # fmt: skip
"""Minutes each: whatever starts after them ends before them."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        """A worker keeps a file's fixtures, or those of files that start the same server."""

        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return TOGETHER.get(file, file)

    gc.enable()  # this process collects no tests
    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the unit tests, and put them last: all workers end together when the long files start first."""
    for item in items:
        if not leaves_the_process(item.path) and not OTHER_TIERS & {mark.name for mark in item.iter_markers()}:
            item.add_marker("unit")
    items.sort(
        key=lambda item: (
            item.nodeid.partition("::")[0] not in LONGEST,
            item.get_closest_marker("unit") is not None,
            item.get_closest_marker("slow") is None,
        )
    )


def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.markexpr == "unit" and "mlflow" in sys.modules:
        raise pytest.UsageError("a unit test imports MLflow at collection, 5 s for everyone: import it in the test")
    gc.enable()
    gc.collect()
    gc.freeze()  # what the imports made is no garbage: a full collection took half a second, and sweeps ask for one


def moved(value: Any, there: str, here: str) -> Any:
    """Containers of texts in which one folder is named, with another instead."""
    if isinstance(value, dict):
        return {key: moved(item, there, here) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item, there, here) for item in value]
    return value.replace(there, here) if isinstance(value, str) else value


@pytest.fixture(scope="session", autouse=True)
def composed_once() -> Iterator[None]:
    """What Hydra makes of the same files and choices is kept: it takes a seventh of a second, thousands of times.

    Files of two workplaces are the same if only their own folder's name differs in them.
    """
    from omegaconf import OmegaConf

    from pipeline.compose import compose

    original, kept = compose._compose_groups, dict[Any, Any]()

    def remembered(file: Path | None, theirs: str | None, choices: dict[str, str]) -> Any:
        folder = Path() if file is None else file.parent
        here, siblings = str(folder), [] if file is None else sorted(folder.glob("*.y*ml"))
        read = tuple((p.name, p.read_bytes().replace(here.encode(), b"{here}")) for p in siblings if p.is_file())
        key = (file and file.name, read, theirs, tuple(choices.items()))
        if key not in kept:
            kept[key] = here, original(file, theirs, choices)
        there, composed = kept[key]
        if there == here:
            return composed
        return OmegaConf.create(moved(OmegaConf.to_container(composed), there, here))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compose, "_compose_groups", remembered)
        yield


@pytest.fixture(autouse=True)
def fresh_log() -> Iterator[None]:
    """A step in this process shows its log on a standard error that is gone with its test."""
    yield
    log = logging.getLogger("asib")
    log.handlers.clear()
    log.propagate = True
    log.setLevel(logging.NOTSET)
