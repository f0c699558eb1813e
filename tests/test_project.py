"""The project's own files agree with each other: lock, environments, entry points."""

import re
import shutil
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def pins() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==([^\s;\\]+)", lock(), re.MULTILINE):
        found.setdefault(name.lower().replace("_", "-"), []).append(version)
    return found


def lock() -> str:
    return (ROOT / "requirements.lock").read_text()


def test_lock_satisfies_every_requirement() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    locked = pins()
    extras = project["project"]["optional-dependencies"].values()
    for text in chain(project["project"]["dependencies"], *extras, project["dependency-groups"]["dev"]):
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert name in locked, f"{name} is not in requirements.lock: run make lock"
        assert any(requirement.specifier.contains(v) for v in locked[name]), f"{text}: locked {locked[name]}; make lock"


def test_lock_has_hashes_and_names_no_index() -> None:
    assert re.search(r"https?://", lock()) is None
    packages = len(re.findall(r"^[A-Za-z0-9._-]+(?:\[[^\]]*\])?==", lock(), re.MULTILINE))
    assert lock().count("--hash=sha256:") >= packages > 100


def test_torch_and_torchvision_belong_together() -> None:
    assert pins()["torch"] == ["2.14.1"]
    assert pins()["torchvision"] == ["0.29.1"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (torch,) = (Requirement(t) for t in project["project"]["dependencies"] if Requirement(t).name == "torch")
    assert torch.specifier.contains("2.11.0")


def test_conda_environment_reads_the_lock() -> None:
    environment = yaml.safe_load((ROOT / "conda.yaml").read_text())
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-r requirements.lock"]
    assert "python=3.11" in environment["dependencies"]


def test_every_entry_point_has_its_step() -> None:
    project = yaml.safe_load((ROOT / "MLproject").read_text())
    assert project["conda_env"] == "conda.yaml"
    assert {"main", "finetune", "distill", "evaluate"} <= set(project["entry_points"])
    for name, entry in project["entry_points"].items():
        parameters = " ".join(f"--{key} {{{key}}}" for key in entry["parameters"])
        assert sorted(entry["command"].split()) == sorted(f"python -m steps.{name} {parameters}".split())
        assert (ROOT / "steps" / f"{name}.py").exists()


def test_no_machine_paths_and_no_large_files_are_tracked() -> None:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in names:
        assert (ROOT / name).stat().st_size <= 6_000_000, name


@pytest.mark.slow
def test_a_users_own_experiments_break_no_test(tmp_path: Path) -> None:
    """One that composes, a rung, one that is refused and one that is no YAML, where tests look at conf/experiment."""
    skipped = shutil.ignore_patterns(".git", ".venv", "mlruns", "mlartifacts", "*.db", ".*_cache")
    shutil.copytree(
        ROOT,
        tmp_path / "copy",
        ignore=lambda folder, names: skipped(folder, names) | ({"runs"} if Path(folder) == ROOT else set()),
    )
    texts = {
        "mine": "defaults: [base, _self_]\nseed: 7\n",
        "my_rung": "defaults: [l1_ib, _self_]\nrung: my_rung\nmethod: {tau: 2}\n",
        "refused": "defaults: [base, _self_]\nmethod: {tua: 2}\n",
        "broken": "a: [",
    }
    for name, text in texts.items():
        (tmp_path / "copy/conf/experiment" / f"{name}.yaml").write_text(text)
    looking = [f"tests/pipeline/{file}.py" for file in ("compose/test_rungs", "compose/test_shortcuts")]
    looking += [f"tests/pipeline/{file}.py" for file in ("compose/test_recipes", "sweep/space/test_check")]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow and not gpu", *looking]
    done = subprocess.run(command, cwd=tmp_path / "copy", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_make_clean_moves_runs_and_deletes_nothing(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / "mlflow.db").write_text("all experiments")
    for said in ("moved to cleaned/", "nothing to move"):
        told = subprocess.check_output(["make", "--no-print-directory", "clean"], cwd=tmp_path, text=True)
        assert told.startswith(said)
    (kept,) = (tmp_path / "cleaned").iterdir()
    assert (kept / "runs" / "one").is_dir()
    assert (kept / "mlflow.db").read_text() == "all experiments"
    assert not (tmp_path / "runs").exists()
