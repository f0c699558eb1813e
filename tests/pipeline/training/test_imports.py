"""Training runs on a bare machine: torch, timm and pydantic."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_training_loads_no_outside_system() -> None:
    code = """
import importlib, pkgutil, sys
import pipeline.training
for module in pkgutil.walk_packages(pipeline.training.__path__, "pipeline.training."):
    importlib.import_module(module.name)
assert "pipeline.training.methods.asib.task" in sys.modules
print(sorted({n.split(".")[0] for n in sys.modules} & {"mlflow", "hydra", "omegaconf", "optuna", "submitit"}))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
