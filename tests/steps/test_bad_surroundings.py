"""What the machine, its file system and the environment lack is said in one line with code 2, and there is no run."""

import os
from pathlib import Path

import pytest
import torch

from tests.steps.lab import Lab

ABSENT = ("mps", "cuda:99", "cuda:-1", "meta", "xla", "cuda:٣", "cuda:99999", "gpu", "CPU")
LONG, NOBODY, NOT_UTF8, NUL = "x" * 300, "~nobody-of-this-name/x", "caf\udce9", "a\0b"
LOOP, DANGLING = "{here}/loop", "{here}/dangling/x"
KEYS: dict[str, tuple[str, str, list[str]]] = {
    "cfg": ("distill", LONG, []),
    "output_dir": ("distill", NOBODY, []),
    "bank_folder": ("distill", DANGLING, []),
    "dataset.root": ("distill", LOOP, ["dataset.name=image_folder"]),
    "dataset.path": ("distill", NOT_UTF8, []),
    "model.teachers.0.checkpoint": ("distill", NUL, []),
    "resume": ("distill", LONG, []),
    "student": ("evaluate", LOOP, []),
    "model": ("evaluate", LONG, []),
    "fusion": ("evaluate", NOBODY, ["mode=synergy", "model=runs:/0"]),
    "images": ("predict", LOOP, ["model={here}"]),
    "to": ("predict", LONG, ["model={here}", "images={here}/pictures"]),
    "sweep": ("sweep", NOT_UTF8, []),
    "cluster": ("sweep", LOOP, []),
    "storage": ("sweep", "sqlite:///" + LONG, []),
    "gate": ("promote", NOBODY, ["name=x", "tracking.mode=online"]),
    "parent": ("compare", LONG, []),
    "runs": ("compare", f"{LONG},other", []),
    "tracking.uri": ("distill", "sqlite:///" + LOOP, ["tracking.mode=online"]),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("surroundings") / "lab")
    (lab.folder / "loop").symlink_to(lab.folder / "loop")
    (lab.folder / "dangling").symlink_to(lab.folder / "nothing")
    (lab.folder / "pictures").mkdir()
    (lab.folder / "pictures" / "a.png").touch()
    return lab


@pytest.mark.parametrize("key", KEYS)
def test_a_path_that_cannot_be_is_refused_without_a_trace(place: Lab, key: str) -> None:
    step, value, others = KEYS[key]
    line = place.refuses(step, *(text.format(here=place.folder) for text in (f"{key}={value}", *others)))
    assert line.startswith(f"{key}=")


def test_home_is_expanded_where_no_shell_does_it(place: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlflow run -P output_dir=~/runs` made a folder of the name ~."""
    monkeypatch.setenv("HOME", str(place.folder))
    monkeypatch.chdir(place.folder)
    assert place.step("doctor", "output_dir=~/elsewhere").code in (0, 1)
    assert (place.folder / "elsewhere").is_dir()
    assert "~" not in os.listdir(place.folder)


@pytest.mark.parametrize(
    ("device", "step"),
    [
        *((name, "distill") for name in ABSENT),
        *(("cuda:7", step) for step in ("baseline", "finetune", "evaluate")),
    ],
)
def test_a_device_that_is_not_there(place: Lab, step: str, device: str) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    line = place.refuses(step, f"device={device}", *["model=runs:/0"] * (step == "evaluate"))
    assert line.startswith((f"device={device}", f"device={device!r}"))
    assert "cpu" in line


@pytest.mark.parametrize(
    ("step", "variable"),
    [("distill", "RANK=x"), ("distill", "WORLD_SIZE=-1"), ("distill", "LOCAL_RANK=1.5"), ("sweep", "RANK=3")],
)
def test_variables_of_torchrun(place: Lab, monkeypatch: pytest.MonkeyPatch, step: str, variable: str) -> None:
    name, value = variable.split("=")
    monkeypatch.setenv(name, value)
    assert place.refuses(step).startswith(f"{variable} ")


def test_a_tracking_store_that_cannot_be_named_by_the_environment(
    place: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}")
    assert place.refuses("distill", "tracking.mode=online").startswith("MLFLOW_TRACKING_URI=sqlite:///")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed=" + "9" * 5000, "too many digits"),
        ("method.student_epochs_per_stage=[1," + "9" * 5000 + "]", "too many digits"),
        ("run_name=a\0b", "control characters"),
        ("run_name=caf\udce9", "not valid UTF-8"),
        ("tracking.experiment=", "is empty"),
        ("model.student.name=" + "x" * 5000, "5000 letters"),
    ],
)
def test_values_that_no_record_can_hold(place: Lab, override: str, words: str) -> None:
    line = place.refuses("distill", override)
    assert line.startswith(override.partition("=")[0])
    assert words in line
    assert len(line) < 400


@pytest.mark.parametrize("text", ["seed: " + "9" * 5000, 'run_name: "a\\0b"', "seed: 2026-99-01"])
def test_values_of_a_file_that_no_record_can_hold(place: Lab, tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    line = place.refuses("distill", f"cfg={file}")
    assert len(line) < 500
