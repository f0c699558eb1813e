"""What a step imports, and when: `--help` and refusals answer without torch, training starts without MLflow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

REPORT = """
import contextlib, io, json, runpy, sys
for module, *arguments in {commands!r}:
    sys.argv = [module, *arguments]
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as left:
            code = left.code
    print(json.dumps([code, out.getvalue(), [*sys.modules]]))
"""


def printed_by(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def imported_by(statement: str) -> set[str]:
    (line,) = printed_by(f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})")
    return set(line.split())


def test_help_and_refusals_need_neither_torch_nor_mlflow() -> None:
    helps = [(f"steps.{step}", "--help") for step in ("distill", "evaluate", "ablate", "sweep")]
    composed = ("steps.distill", "--help", "cfg=quickstart", "method.tau=3")
    misspelt = ("steps.distill", "cfg=quickstart", "method.kd_alhpa=1")
    commands = [*helps, composed, misspelt]
    lines = printed_by(REPORT.format(commands=commands))
    assert len(lines) == len(commands)
    for command, line in zip(commands, lines, strict=True):
        code, text, modules = json.loads(line)
        assert code == (2 if command is misspelt else 0)
        assert not {"torch", "timm", "mlflow", "optuna"} & set(modules), command
        if command in helps:
            assert f"usage: python -m {command[0]} " in text


@pytest.mark.slow
def test_a_steps_own_process_never_imports_mlflow() -> None:
    found = imported_by("import pipeline.runs.step, pipeline.distill.distill")
    assert not {"mlflow", "optuna"} & found


@pytest.mark.slow
def test_delivery_is_started_before_the_slow_imports() -> None:
    """It imports MLflow meanwhile, and training begins two seconds earlier."""
    assert not {"timm", "torchvision", "matplotlib"} & imported_by("import pipeline.runs.opening")
