"""Every command of the pages is accepted as it stands there, or is marked as one that no test runs."""

import importlib
import inspect
import re
import tomllib
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from pipeline.runs.step import Step
from tests.pages import ROOT, WRITTEN, Command, blocks, commands

VERBATIM = ("docs/serving.md",)
"""Pages whose unmarked blocks run as they are: tests/steps/test_serving_page.py."""
OTHERS = ("deploy/README.md", "benchmarks/README.md")
"""Pages of which only the steps are read here."""
FILLED = {
    "runs:/<id>/best.yaml": "quickstart",  # a run's `cfg` is fetched from a server
    "runs:/<id>/config.yaml": "quickstart",
    "images=<folder>": "images=docs/pictures",
    "$SLURM_ARRAY_TASK_ID": "3",
    "<that number>": "3",
    "seeds=0,1,2": "seeds=0",  # the others are composed alike
    "seeds=0,1": "seeds=0",
}
"""What readers put in the place of words; in that of others in angle brackets, here, are the words."""
FILES = {
    "my_study.yaml": "defaults: [quickstart, _self_]\nseed: 3\nmethod: {tau: 2}\n",
    "teacher.pt": "",
    "mine.npz": "",
}
"""Files of a reader."""
BESIDE_STEPS = re.compile(
    r"make (?P<target>[\w-]+)|source \.venv/bin/activate|pre-commit install|export [A-Z_]+=|"
    r"""pip install -e ['"]?\.(\[(?P<extra>[\w-]+)\])?['"]?"""
)
STEPS = sorted(file.stem for file in (ROOT / "steps").glob("[!_]*.py"))


def filled(text: str) -> str:
    for words, value in FILLED.items():
        text = text.replace(words, value)
    number = count(1)
    return re.sub(r"<([\w ]+)>", lambda found: f"{found[1].replace(' ', '_')}{next(number)}", text)


def docstring(step: str) -> str:
    """The commands of a step's file, which `--help` and the site show."""
    about = inspect.cleandoc(importlib.import_module(f"steps.{step}").__doc__ or "")
    return "\n".join(line.strip() for line in about.splitlines() if line.strip().startswith("python "))


def typed(page: str) -> list[Command]:
    return [found for block in blocks(page) if not block.not_run for found in commands(filled(block.text))]


ON_PAGES = {page: typed(page) for page in WRITTEN}
SHOWN = [*(ON_PAGES | {page: typed(page) for page in OTHERS}).items()]
SHOWN += [(f"steps/{step}.py", list(commands(filled(docstring(step))))) for step in STEPS]
CASES = {
    found.line: pytest.param(found, id=f"{page}: {found.line[:90]}")
    for page, all_ in SHOWN
    for found in all_
    if found.step
}


@pytest.fixture
def readers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader types: the repository's folders, and files of their own."""
    for name in ("docs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "SEED", "METHOD", "STUDENT", "TEACHER_PAIR", "ASIB_STORAGE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_TOKEN", "a reader's")
    return tmp_path


@pytest.mark.step
@pytest.mark.parametrize("command", CASES.values())
def test_a_step_accepts_what_a_page_says(
    command: Command, readers_folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As far as DRY_RUN goes: the request is read, every configuration composed; no server is asked."""
    if command.step == "deliver":
        return  # its arguments are folders
    for name, value in {**command.variables, "DRY_RUN": "1"}.items():
        monkeypatch.setenv(name, value)
    step: Step = importlib.import_module(f"steps.{command.step}").STEP
    if command.step in ("doctor", "serve", "sweep", "tidy"):
        step = replace(step, act=None)  # it would examine the machine, serve, work for a study, or remove files
    if {"join", "reap"} & {argument.partition("=")[0] for argument in command.arguments}:
        step = replace(step, request=None, words=None)
    code = step.main(command.arguments)
    out, err = capfd.readouterr()
    assert code == 0, err
    assert out, "the configuration, the help, or a table"


def test_every_step_is_on_a_page() -> None:
    assert set(STEPS) == {command.step for page in ON_PAGES.values() for command in page} - {""}


@pytest.mark.parametrize("page", [page for page in WRITTEN if page not in VERBATIM])
def test_what_is_no_step_is_known_or_marked(page: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in (found for found in ON_PAGES[page] if not found.step):
        known = BESIDE_STEPS.match(command.line)
        assert known, f"{command.line}: test it, or write <!-- not run: why --> above its block"
        assert known["target"] in (None, *targets)
        assert known["extra"] in (None, *extras)


def test_the_example_of_a_method_is_the_files() -> None:
    page = (ROOT / "docs/own_method.md").read_text()
    for name in ("my_kd.py", "my_kd_step.py"):
        assert f"```python\n{(ROOT / 'examples/my_method' / name).read_text()}```" in page
