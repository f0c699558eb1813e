"""What the machine and the environment lack is said in one line with code 2, before there is a run."""

from pathlib import Path

import pytest

from tests.steps.lab import Lab


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("surroundings") / "lab")


def refused(place: Lab, step: str, *overrides: str) -> str:
    before = sorted(place.folder.rglob("*"))
    done = place.step(step, *overrides)
    assert done.code == 2, done.err
    (line,) = done.lines
    assert line.isprintable()
    assert sorted(place.folder.rglob("*")) == before
    return line


@pytest.mark.parametrize("step", ["distill", "evaluate"])
@pytest.mark.parametrize("device", ["mps", "cuda:99", "cuda:-1", "meta", "xla", "cuda:٣", "cuda:99999", "gpu", "CPU"])
def test_a_device_that_is_not_there(place: Lab, step: str, device: str) -> None:
    import torch

    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    line = refused(place, step, f"device={device}", *["model=runs:/0"] * (step == "evaluate"))
    assert line.startswith((f"device={device}", f"device={device!r}"))
    assert "cpu" in line


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("WORLD_SIZE", "-1"), ("LOCAL_RANK", "1.5"), ("RANK", "3")])
@pytest.mark.parametrize("step", ["distill", "sweep"])
def test_variables_of_torchrun(place: Lab, monkeypatch: pytest.MonkeyPatch, step: str, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert refused(place, step).startswith(f"{name}={value} ")


def test_a_tracking_store_that_cannot_be_named_by_the_environment(
    place: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}")
    assert refused(place, "distill", "tracking.mode=online").startswith("MLFLOW_TRACKING_URI=sqlite:///")


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
    line = refused(place, "distill", override)
    assert line.startswith(override.partition("=")[0])
    assert words in line
    assert len(line) < 400


@pytest.mark.parametrize("text", ["seed: " + "9" * 5000, 'run_name: "a\\0b"', "seed: 2026-99-01"])
def test_values_of_a_file_that_no_record_can_hold(place: Lab, tmp_path: Path, text: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    line = refused(place, "distill", f"cfg={file}")
    assert len(line) < 500
