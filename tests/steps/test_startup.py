"""What a step imports, and when: `--help` and refusals answer without torch, training starts without MLflow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

REPORT = """
import runpy, sys
sys.argv = {argv!r}
code = 0
try:
    runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
except SystemExit as left:
    code = left.code
names = ("torch", "timm", "mlflow", "hydra", "optuna", "pandas", "matplotlib")
print("exit", code, "loaded", *[name for name in names if name in sys.modules])
"""


def loaded(module: str, *arguments: str) -> tuple[str, list[str]]:
    """What a step's process prints, and its exit code with the large packages that it has imported."""
    code = REPORT.format(argv=[module, *arguments], module=module)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    return "\n".join(lines), last.split()


def imported_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("step", ["distill", "evaluate", "ablate", "sweep"])
def test_help_needs_neither_torch_nor_mlflow(step: str) -> None:
    text, ending = loaded(f"steps.{step}", "--help")
    assert ending[:2] == ["exit", "0"]
    assert not {"torch", "timm", "mlflow", "optuna"} & set(ending)
    assert f"usage: python -m steps.{step} " in text


def test_help_with_a_configuration_needs_no_torch() -> None:
    _, ending = loaded("steps.distill", "--help", "cfg=quickstart", "method.tau=3")
    assert ending[:2] == ["exit", "0"]
    assert "torch" not in ending


def test_bad_input_is_refused_before_torch_is_imported() -> None:
    _, ending = loaded("steps.distill", "cfg=quickstart", "method.kd_alhpa=1")
    assert ending[:2] == ["exit", "2"]
    assert not {"torch", "timm", "mlflow"} & set(ending)


@pytest.mark.slow
def test_a_steps_own_process_never_imports_mlflow() -> None:
    found = imported_by("import pipeline.runs.step, pipeline.distill.distill")
    assert not {"mlflow", "optuna"} & found


def test_delivery_is_started_before_the_slow_imports() -> None:
    """It imports MLflow meanwhile, and training begins two seconds earlier."""
    assert not {"timm", "torchvision", "matplotlib"} & imported_by("import pipeline.runs.opening")
