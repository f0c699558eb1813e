"""The predict step: a folder of pictures becomes a table, with the probabilities of the training checkpoint."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from PIL import Image

from pipeline.distill import export
from tests.steps.lab import CLASSES, Done, Lab, client, deliver, ending, images, journal, run_id, see
from tests.steps.predictions import checkpoint, crown

NAMES = ["ash.png", "b/Cedar.PNG", "b/deep/er.jpg", "b/same.jpeg", "z.png"]
"""In the order of the table."""


@pytest.fixture(scope="module")
def student(bench: Lab) -> Done:
    """A trained student, off line, with its model prepared."""
    done = bench.step("baseline", "log_model=true")
    assert done.code == 0, done.err
    return done


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given") / "pictures"
    (folder / "b/deep").mkdir(parents=True)
    for name, image in zip(NAMES, images(len(NAMES), seed=77)[0], strict=True):
        Image.fromarray(image).save(folder / name, quality=90)
    (folder / "notes.txt").write_text("no picture, and none by its name")
    return folder


@pytest.fixture(scope="module")
def expected(bench: Lab, student: Done, pictures: Path) -> np.ndarray:
    """(n, N) of the training checkpoint for the files as Pillow reads them."""
    x = np.stack([np.asarray(Image.open(pictures / name).convert("RGB")) for name in NAMES])
    return checkpoint(bench, student.folder / "checkpoints/student.safetensors")(x)


def check(table: pandas.DataFrame, expected: np.ndarray) -> None:
    """Sorted files, best class, its probability, and all others down to the fourth: there are four classes."""
    ranks = ["", "_2", "_3", "_4"]
    assert list(table.columns) == ["file", *(f"{name}{rank}" for rank in ranks for name in ("class", "probability"))]
    assert list(table["file"]) == NAMES
    for row, (_, values) in zip(expected, table.iterrows(), strict=True):
        order = sorted(range(len(CLASSES)), key=lambda k: -row[k])
        assert [values[f"class{rank}"] for rank in ranks] == [CLASSES[k] for k in order]
        assert [values[f"probability{rank}"] for rank in ranks] == pytest.approx([row[k] for k in order], abs=1e-4)


def test_a_folder_becomes_a_table_of_the_checkpoints_probabilities(
    bench: Lab, student: Done, pictures: Path, expected: np.ndarray
) -> None:
    done = bench.step("predict", f"model={student.folder / 'model'}", f"images={pictures}")
    assert done.code == 0, done.err
    check(pandas.read_csv(done.folder / "predictions.csv"), expected)
    assert done.out == f"5 pictures classified, 0 skipped: {done.folder / 'predictions.csv'}\n"
    assert ending(done.folder) == ("FINISHED", "completed", 0)
    (data,) = [e.data for e in journal(done.folder) if e.kind == "dataset"]
    assert (data["name"], data["profile"]) == ("pictures", {"images": 5, "skipped": 0})


def test_predictions_are_those_of_the_served_model(bench: Lab, student: Done, pictures: Path, tmp_path: Path) -> None:
    """Pictures of other sizes and kinds, too: there preprocessing would differ, if it were not the same."""
    import mlflow

    folder = tmp_path / "odd"
    folder.mkdir()
    rng = np.random.default_rng(4)
    Image.fromarray(rng.integers(0, 256, (40, 90, 3), dtype=np.uint8)).save(folder / "wide.jpg")
    Image.fromarray(rng.integers(0, 256, (9, 7, 4), dtype=np.uint8)).save(folder / "glass.png")
    Image.fromarray(rng.integers(0, 256, (30, 30), dtype=np.uint8)).save(folder / "grey.png")
    Image.fromarray(rng.integers(0, 65536, (30, 30), dtype=np.uint16)).save(folder / "deep.png")
    (folder / ".ipynb_checkpoints").mkdir()
    shutil.copy(folder / "grey.png", folder / ".ipynb_checkpoints/grey-checkpoint.png")
    (folder / "._grey.png").write_bytes(b"\0\5\x16\7")
    (folder / "round").symlink_to(folder)
    done = bench.step("predict", f"model={student.folder / 'model'}", f"images={folder}")
    assert done.code == 0, done.err
    assert [line for line in done.lines if "3 ignored: hidden files and folders" in line]
    table = pandas.read_csv(done.folder / "predictions.csv")
    prepared = {"net": "student.onnx", "meta": "meta.json", "weights": "student.safetensors", "timm": "timm"}
    mlflow.pyfunc.save_model(
        tmp_path / "saved",
        python_model=str(student.folder / "model/student_pyfunc.py"),
        artifacts={name: str(student.folder / "model" / file) for name, file in prepared.items()},
        pip_requirements=["mlflow"],
    )
    texts = [base64.b64encode((folder / name).read_bytes()).decode() for name in table["file"]]
    answers = mlflow.pyfunc.load_model(str(tmp_path / "saved")).predict(texts)
    assert list(table["file"]) == ["deep.png", "glass.png", "grey.png", "wide.jpg"]
    assert list(table["class"]) == [answer["class"] for answer in answers]
    assert list(table["probability"]) == pytest.approx([answer["probability"] for answer in answers], abs=1e-6)


def test_broken_pictures_are_listed_and_left_out(
    bench: Lab, student: Done, pictures: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    folder = tmp_path / "some"
    shutil.copytree(pictures, folder)
    (folder / "empty.png").write_bytes(b"")
    (folder / "b/half.png").write_bytes((pictures / "ash.png").read_bytes()[:200])
    table = tmp_path / "out.parquet"
    done = bench.step("predict", f"model={student.folder / 'model'}", f"images={folder}", f"to={table}")
    assert done.code == 0, done.err
    check(pandas.read_parquet(table), expected)
    assert (done.folder / "predictions.parquet").read_bytes() == table.read_bytes()
    assert [line.split(": ")[1] for line in done.lines] == [str(folder / name) for name in ("b/half.png", "empty.png")]
    assert list(pandas.read_csv(done.folder / "skipped.csv")["file"]) == ["b/half.png", "empty.png"]
    assert done.out.splitlines() == [
        f"5 pictures classified, 2 skipped: {table}",
        f"2 pictures that cannot be read, with reasons: {done.folder / 'skipped.csv'}",
    ]
    artifacts = {e.data["path"] for e in journal(done.folder) if e.kind == "artifact"}
    assert {"predictions.parquet", "skipped.csv", "config.yaml"} <= artifacts
    for path in (folder / "b").rglob("*"):
        if path.is_file():
            path.write_bytes(b"gone")
    for name in ("ash.png", "z.png"):
        (folder / name).unlink()
    done = bench.step("predict", f"model={student.folder / 'model'}", f"images={folder}")
    assert done.code == 2
    reasons = done.folder / "skipped.csv"
    assert done.lines[-1] == f"images={folder}: none of its 5 pictures can be read; see {reasons}"
    assert ending(done.folder) == ("FAILED", "refused", 2)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": ""}, "model is not set"),
        ({"images": ""}, "images is not set"),
        ({"images": "{tmp}/nowhere"}, "no such folder"),
        ({"images": "{tmp}"}, "no .jpg, .jpeg, .png, "),
        ({"to": "{tmp}/table.xlsx"}, "to={tmp}/table.xlsx: give a file that ends with .csv or .parquet"),
        ({"to": "{tmp}/nowhere/table.csv"}, "cannot write in {tmp}/nowhere"),
    ],
)
def test_what_cannot_be_is_refused_before_there_is_a_run(
    lab: Lab, pictures: Path, tmp_path: Path, changes: dict[str, str], says: str
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    given = {"model": "models:/any@champion", "images": str(pictures), **changes}
    done = lab.step("predict", *(f"{k}={v.format(tmp=empty)}" for k, v in given.items()))
    assert (done.code, done.new, len(done.lines)) == (2, [], 1)
    assert says.format(tmp=empty) in done.lines[0]


def test_a_folder_that_is_no_student_is_refused(bench: Lab, student: Done, pictures: Path, tmp_path: Path) -> None:
    for folder, says in ((tmp_path, "no student is in it"), (tmp_path / "nowhere", "no such folder")):
        done = bench.step("predict", f"model={folder}", f"images={pictures}")
        assert (done.code, len(done.lines)) == (2, 1), done.err
        assert done.lines[0].startswith(f"model={folder}: {says}")
    broken = tmp_path / "model"
    shutil.copytree(student.folder / "model", broken)
    (broken / "student.onnx").write_bytes(b"no network")
    done = bench.step("predict", f"model={broken}", f"images={pictures}")
    assert (done.code, len(done.lines)) == (2, 1), done.err
    assert "its files cannot be read" in done.lines[0]


@pytest.mark.slow
def test_the_champion_is_fetched_and_becomes_the_runs_input(
    bench: Lab, student: Done, pictures: Path, expected: np.ndarray, lab: Lab, sqlite_uri: str
) -> None:
    deliver(sqlite_uri, student.folder)
    model_id = crown(sqlite_uri, run_id(student.folder), "trees")
    tracked = ("tracking.mode=online", f"tracking.uri={sqlite_uri}", f"images={pictures}")
    for model in ("models:/trees@champion", f"runs:/{run_id(student.folder)}"):
        done = lab.step("predict", *tracked, f"model={model}")
        assert done.code == 0, done.err
        seen = see(sqlite_uri, run_id(done.folder))
        assert (seen.status, seen.tags["asib.step"], seen.models_in) == ("FINISHED", "predict", [model_id])
        assert (seen.tags["asib.student"], seen.tags["asib.model_id"]) == (run_id(student.folder), model_id)
        assert seen.tags["asib.model"] == ("models:/trees/1" if "champion" in model else model)
        assert seen.metrics["predict/images", 0] == [5.0]
        assert [name for name, _, context in seen.datasets if context == "prediction"] == ["pictures"]
        check(pandas.read_csv(client(sqlite_uri).download_artifacts(seen.id, "predictions.csv")), expected)
    done = lab.step("predict", *tracked, "model=models:/trees@nobody")
    assert (done.code, len(done.lines)) == (2, 1), done.err
    assert done.lines[0].startswith("model=models:/trees@nobody: ")
    assert "alias nobody" in done.lines[0]


def test_a_student_whose_export_is_wrong_is_not_logged(
    lab: Lab, student: Done, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_another(net: Any, data: Any, path: Path) -> None:
        shutil.copy(student.folder / "model/student.onnx", path)

    monkeypatch.setattr(export, "to_onnx", of_another)
    done = lab.step("baseline", "log_model=true", "seed=1")
    assert done.code == 1
    assert "the exported student is not logged" in json.dumps([e.data for e in journal(done.folder) if e.kind == "end"])
    assert not [e for e in journal(done.folder) if e.kind == "model"]
