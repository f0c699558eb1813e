"""What the code before the move has left goes on as it did: resumed, delivered, compared, searched, promoted, served.

The numbers and names expected are those of the old code, which did the same with copies of the same workplace
(tests/fixtures/before_the_move.json). Sources count in a result's identity (docs/method.md): what was finished is
not reused by `ablate`, teachers in `runs/teachers` are fine-tuned anew, and a study is only joined.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import source_digest
from pipeline.distill import export
from tests.fixtures import before_the_move as before
from tests.fixtures.before_the_move import House, lines
from tests.steps.desk import to_onnx

RECORD: dict[str, Any] = before.record()
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def house(tmp_path: Path) -> House:
    return House(tmp_path / "house", RECORD["made_in"])


def same_machine() -> bool:
    """Bits are the same only on a processor and with a torch as then."""
    info = Path("/proc/cpuinfo")
    return torch.__version__ == RECORD["torch"] and info.exists() and RECORD["cpu"] in info.read_text()


def agree(found: dict[str, Any], expected: dict[str, Any], *rounded: str) -> None:
    """All facts, without those that depend on the processor's rounding where it is another."""
    for key in expected:
        if key not in rounded or same_machine():
            assert found[key] == expected[key], key


def test_configurations_keep_their_hashes() -> None:
    assert before.compositions() == RECORD["hashes"]


def test_keys_keep_their_names_and_defaults(house: House) -> None:
    found = before.keys(house)
    assert {key: found.get(key) for key in RECORD["keys"]} == RECORD["keys"]


def test_refusals_keep_their_exit_codes(house: House) -> None:
    assert before.refuse(house) == RECORD["refused"]


def test_an_interrupted_run_ends_as_the_finished_one(house: House) -> None:
    found = before.resume(house)
    agree(json.loads(json.dumps(found)), RECORD["resume"], "said", "same", "far")
    assert found["far"] < 0.05
    assert RECORD["resume"]["same"], "bit for bit, before the move"


def test_a_finished_run_is_evaluated_from_its_folder(house: House) -> None:
    agree(before.evaluate(house), RECORD["evaluate"], "same", "test")


def test_a_journal_of_work_off_line_is_delivered(house: House) -> None:
    agree(before.deliver(house), RECORD["deliver"])


@pytest.mark.slow
def test_a_study_goes_on_with_the_trial_that_was_left(house: House) -> None:
    found = json.loads(json.dumps(before.join(house)))
    agree(found, RECORD["join"], "trials")
    assert [t["state"] for t in found["trials"]] == ["COMPLETE", "COMPLETE"]
    assert found["trials"][1]["params"] == RECORD["join"]["trials"][1]["params"]


def test_a_sweep_of_other_sources_does_not_go_on_with_a_study(house: House) -> None:
    of_then = {e["values"]["asib.sources"] for e in lines(house.folder_of("finished")) if "asib.sources" in str(e)}
    if source_digest(ROOT) in of_then:
        pytest.skip("the sources are still those of then")
    name = before.study(house)
    done = house.step("sweep", f"sweep={house.folder / 'space.yaml'}", f"study={name}", f"storage={house.storage}")
    assert (done.code, len(done.lines)) == (2, 1), done.err
    assert f"study {name}" in done.lines[0]
    assert "the sources differ: give study=<another name>" in done.lines[0]


@pytest.mark.slow
def test_a_new_run_has_the_names_and_numbers_of_the_old_one(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "to_onnx", to_onnx)
    agree(before.distill(house), RECORD["distill"], "same")


@pytest.mark.slow
def test_the_champion_classifies_pictures(house: House) -> None:
    found = before.predict(house)
    agree(found, RECORD["predict"], "rows")
    for row, expected in zip(found["rows"], RECORD["predict"]["rows"], strict=True):
        assert float(row[2]) == pytest.approx(float(expected[2]), abs=1e-3)


@pytest.mark.slow
def test_a_better_version_replaces_the_champion_and_is_rolled_back(house: House) -> None:
    assert json.loads(json.dumps(before.promote(house))) == RECORD["promote"]
