"""Doctor says whether a run would work, and its exit code agrees with what a run would do."""

from pathlib import Path

import pytest

from steps.doctor import main

pytest_plugins = ["tests.servers"]


@pytest.mark.slow
@pytest.mark.step
@pytest.mark.usefixtures("warm_deliveries")
def test_good_machine_is_told_so(sqlite_uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cfg=quickstart", f"tracking.uri={sqlite_uri}", f"output_dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "a run would work" in said
    assert "2000 + 500 images, 32×32×3, 20 classes" in said
    assert sqlite_uri in said
    assert "FAIL" not in said
    assert len(said.splitlines()) <= 25


def test_missing_data_and_unwritable_folder_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    where = [f"dataset.root={tmp_path}", f"output_dir={blocked}", "tracking=offline"]
    assert main(["dataset=cifar100", *where]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(lines) == 2
    assert "output_dir" in lines[0]
    assert "dataset.root" in lines[1]


def test_wrong_configuration_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["method.tua=3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "method.tau" in line
