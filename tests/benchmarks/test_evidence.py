"""docs/results.md says what its records say, and the records agree with themselves and with the teacher's weights."""

from pathlib import Path

import pytest

from benchmarks.evidence import __main__ as evidence
from benchmarks.evidence import report
from models import zoo
from models.weights import load_weights, weights_hash
from pipeline.runs.records import Record

RECORDS = [path for path in sorted(evidence.FOLDER.glob("*.json")) if evidence.read(path).correct is not None]


@pytest.fixture(scope="module", params=RECORDS, ids=lambda path: path.stem)
def run(request: pytest.FixtureRequest) -> Record:
    path: Path = request.param
    return evidence.read(path)


def test_the_packed_bits_are_the_accuracy_that_the_run_logged(run: Record) -> None:
    assert run.correct is not None
    assert len(run.correct) == 10_000
    assert 100 * run.correct.mean() == pytest.approx(run.metrics["final/acc_val_selected"], abs=1e-9)


def test_validation_chose_the_epoch(run: Record) -> None:
    """`student/acc` is on validation images here: test images have chosen nothing."""
    assert run.tags["asib.eval_split"] == "val"
    assert run.metrics["final/val_acc"] == max(value for _, value in run.histories["student/acc"])


def test_the_second_teacher_is_the_one_whose_run_is_recorded() -> None:
    (path,) = evidence.FOLDER.glob("wrn_16_2-*.json")
    teacher = evidence.read(path)
    net = zoo.create_model("cifar_wrn_16_2", 100)
    load_weights(net, evidence.FOLDER / "wrn_16_2.safetensors")
    assert weights_hash(net.net) == teacher.tags["asib.weights"]
    assert teacher.metrics["final/val_acc"] == max(value for _, value in teacher.histories["teacher/acc"])


def test_the_pages_are_what_the_records_say() -> None:
    pages = [page.read_text() for page in evidence.PAGES]
    assert evidence.rendered(pages, report.parts(*evidence.kept())) == pages


def test_a_record_is_written_as_it_was_read(run: Record, tmp_path: Path) -> None:
    again = evidence.read(evidence.write(run, {}, tmp_path))
    assert again.correct is not None
    assert (again.correct == run.correct).all()
    assert (again.config, again.metrics, again.histories) == (run.config, run.metrics, run.histories)
