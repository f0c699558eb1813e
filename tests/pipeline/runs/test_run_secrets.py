"""What a run leaves on disk, and so in MLflow, holds no secret of the machine that it ran on."""

from __future__ import annotations

import logging
import subprocess
from pathlib import Path

import pytest

from pipeline.compose.compose import compose
from pipeline.runs import git as revision
from pipeline.runs.ending import Ending
from pipeline.runs.opening import open_run
from pipeline.runs.run_log import log_to

SECRET = "sword-fish-77"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One whose tracked file has got a token since its commit."""
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "settings.py").write_text("rate = 1\n")
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@x"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], check=True)
    (folder / "settings.py").write_text(f'rate = 2\napi_token = "ghp_{"a1" * 18}"\nplace = "{SECRET}"\n')
    monkeypatch.setattr(revision, "REPOSITORY", folder)
    return folder


def run(tmp_path: Path, *overrides: str) -> Path:
    config = compose("quickstart", [f"output_dir={tmp_path / 'runs'}", "tracking.mode=offline", *overrides])
    made = open_run("distill", config)
    with log_to(made.folder):
        logging.getLogger("asib").warning("401 for %s at http://me:%s@host", SECRET, SECRET)
    made.close(Ending("FAILED", "failed", 1, f"wrong password {SECRET}"))
    return made.folder


def test_no_file_of_a_run_holds_a_secret(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way it came: a shell that filled in a name, a diff, an error, a line of the log."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", SECRET)
    folder = run(tmp_path, f"run_name=run {SECRET}", f"tracking.experiment={SECRET}")
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"config.yaml", "git.diff", "journal.jsonl", "run.log"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    diff = (folder / "git.diff").read_text()
    assert "ghp_" not in diff
    assert "+rate = 2" in diff
    assert '+api_token = "***"' in diff
