"""A result of a method from outside the repository is another one after the method's source has changed."""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.ablate.plan import Cell, digest_of
from pipeline.config import Config, TeacherConfig, config_hash, configure, identity, methods, schema, sources_of
from pipeline.paths import REPOSITORY

SETTINGS = """
from typing import ClassVar, Literal
from pipeline.config.base import key
from pipeline.config.methods.base import MethodConfig
class Mine(MethodConfig):
    step: ClassVar[str] = "{step}:Step"
    name: Literal["mine"] = key("mine", "distillation method")
"""
LAYOUTS = {
    "a module": ("mine", "mine_step", {"mine_step.py"}, {"beside.py", "folder/helper.py"}),
    "a package": ("mine", "mine.step", {"mine/step.py", "mine/helper.py", "mine/in/helper.py"}, {"beside.py"}),
    "modules of a package": ("lab.mine", "lab.step", {"lab/step.py", "lab/helper.py"}, {"beside.py"}),
    "modules of two packages": ("lab.mine", "other.step", {"other/step.py", "other/helper.py"}, {"beside.py"}),
}
"""Module of the settings, that of the step, files that count, and files that do not."""


def put(folder: Path, name: str, text: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Forgets, as a new process does, what was read and imported from tmp_path."""

    def forget() -> None:
        for name in [n for n in sys.modules if n.partition(".")[0] in ("mine", "mine_step", "lab", "other")]:
            del sys.modules[name]
        importlib.invalidate_caches()
        for cached in (methods.settings, schema, identity._with_outside):
            cached.cache_clear()

    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield forget
    forget()


def chosen(module: str | None, name: str = "mine") -> Config:
    return configure(
        {"method": {"name": name, "module": module}, "model": {"teachers": [TeacherConfig(name="cifar_resnet14")]}}
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_of_a_method_from_outside_are_part_of_what_a_result_is(
    layout: str, tmp_path: Path, fresh: Callable[[], None]
) -> None:
    module, step, counted, ignored = LAYOUTS[layout]
    path = module.replace(".", "/")
    own = f"{path}/__init__.py" if layout == "a package" else f"{path}.py"
    texts = {own: SETTINGS.format(step=step)} | dict.fromkeys(counted | ignored, "x = 1\n")
    for file, text in texts.items():
        put(tmp_path, file, text)

    def found() -> tuple[str, str, str]:
        fresh()
        config = chosen(module)
        plan = digest_of(config, [Cell("row", config)])
        return config_hash(config), sources_of(config, REPOSITORY), plan

    first = found()
    assert found() == first
    for file in ignored:
        put(tmp_path, file, "x = 2\n")
    assert found() == first
    for file in (own, *counted):
        put(tmp_path, file, texts[file] + "# changed\n")
        hashed, sources, plan = found()
        assert hashed == first[0], "the configuration is the same"
        assert (sources == first[1], plan == first[2]) == (False, False), file
        put(tmp_path, file, texts[file])
        assert found() == first


def test_a_process_keeps_to_the_source_that_it_read(tmp_path: Path, fresh: Callable[[], None]) -> None:
    put(tmp_path, "mine.py", SETTINGS.format(step="mine_step"))
    config = chosen("mine")
    before = sources_of(config, REPOSITORY)
    put(tmp_path, "mine.py", SETTINGS.format(step="mine_step") + "# changed while it runs\n")
    assert sources_of(config, REPOSITORY) == before


def test_methods_of_the_repository_are_covered_by_its_digest() -> None:
    digest = identity.source_digest(REPOSITORY)
    assert sources_of(chosen(None, "kd"), REPOSITORY) == sources_of(Config(), REPOSITORY) == digest
