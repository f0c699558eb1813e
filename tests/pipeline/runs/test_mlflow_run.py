"""What `mlflow run` started a step, and its end."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("shell", [True, False])
def test_mlflow_run_is_ended_through_its_shell(tmp_path: Path, shell: bool) -> None:
    step = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom pipeline.runs import mlflow_run\n"
    (tmp_path / "step.py").write_text(step + "print(mlflow_run.kill_mlflow_run_parent(), flush=True)\n")
    inner = [sys.executable, str(tmp_path / "step.py")]
    command = ["bash", "-c", f"{' '.join(inner)}; true"] if shell else inner
    # Stands for the `mlflow` command: a Python script of that name which starts the step and would wait for it.
    (tmp_path / "mlflow").write_text(
        f"import json, subprocess, time\nsubprocess.run({json.dumps(command)})\ntime.sleep(60)\n"
    )
    for words, ended in ((["run", "."], True), (["server"], False)):
        parent = subprocess.Popen([sys.executable, str(tmp_path / "mlflow"), *words], stdout=subprocess.PIPE, text=True)
        assert parent.stdout is not None
        said = parent.stdout.readline().strip()
        assert said == (str(parent.pid) if ended else "None")
        if not ended:
            parent.kill()
        assert parent.wait(10) == (-signal.SIGTERM if ended else -signal.SIGKILL)
        parent.stdout.close()
