"""Packages of extras that are not installed: one line that names the extra, whichever step misses them."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipeline.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
STEPS = """
import contextlib, io, json, runpy, sys
sys.modules.update(dict.fromkeys({hidden!r}))  # an import of None fails as that of a missing package
for module, *arguments in {commands!r}:
    sys.argv = [module, *arguments]
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as left:
            print(json.dumps([left.code, err.getvalue()]))
    sys.modules["logging"].getLogger("asib").handlers.clear()
"""
CASES = {
    ("steps.sweep", "cfg=quickstart", "workers=2"): "sweep needs optuna: pip install 'asib[sweep]'",
    ("steps.sweep", "join=a-study"): "sweep needs optuna: pip install 'asib[sweep]'",
    ("steps.serve", "model=runs:/1"): "serve needs uvicorn: pip install 'asib[serve]'",
    ("steps.ablate", "cfg=quickstart", "workers=2"): "cluster=local needs submitit: pip install 'asib[sweep]'",
    ("steps.distill", "notify.url=json://host"): "notify.url needs apprise: pip install 'asib[notify]'",
    ("steps.distill", "tracking.system_metrics=true"): (
        "tracking.system_metrics=true needs psutil: pip install 'asib[system]'"
    ),
}


def test_the_table_is_that_of_the_project() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    modules = {"nvidia-ml-py": "pynvml"}  # a distribution that is not called as what it installs
    names = {text: Requirement(text).name for texts in declared.values() for text in texts}
    found = {modules.get(names[text], names[text]): extra for extra, texts in declared.items() for text in texts}
    assert EXTRAS.items() <= found.items()
    assert found.keys() - EXTRAS.keys() <= {"optuna-dashboard"}  # a program of its own


@pytest.mark.slow
def test_a_step_without_its_packages_says_which_extra_has_them(tmp_path: Path) -> None:
    commands = [(*command, f"output_dir={tmp_path}", "tracking=offline") for command in CASES]
    code = STEPS.format(hidden=[*EXTRAS], commands=commands)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert said == [[2, f"{words}\n"] for words in CASES.values()]
    assert list(tmp_path.iterdir()) == []
