"""The ablation as a step, on data of seconds: what MLflow shows, reuse, interruption, comparison of its runs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pandas as pd
import pytest

from pipeline.distill import train
from pipeline.runs import records
from tests.steps.lab import Done, Lab, ending, journal, points, run_id, see, signal_at, until, write_npz

TWO = ("rungs=l0_baseline,l1_ib", "seeds=0,1")
PER_L0, PER_TEACHER = 8, 4  # questions that the loop asks for a signal


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, Done]:
    """Two rungs with two seeds, off line, undisturbed."""
    lab = Lab(tmp_path_factory.mktemp("ladder"))
    done = lab.step("ablate", *TWO)
    assert done.code == 0, done.err
    return lab, done


@pytest.fixture
def copy(ladder: tuple[Lab, Done], tmp_path: Path) -> Lab:
    """A workplace in which the ladder has been run."""
    lab = Lab(tmp_path / "copy")
    shutil.copytree(ladder[0].runs, lab.runs)
    return lab


def table(folder: Path) -> pd.DataFrame:
    """The comparison, without what depends on the clock."""
    return pd.read_csv(folder / "comparison/comparison.csv", index_col="group").drop(columns="seconds")


def nested(folder: Path) -> list[str]:
    return sorted(path.parent.name[: -len("-12345678")] for path in folder.glob("l*/journal.jsonl"))


@pytest.mark.slow
def test_mlflow_shows_a_parent_with_a_run_for_each_rung_and_seed(lab: Lab, sqlite_uri: str, trained: list[str]) -> None:
    online = ("tracking.mode=online", f"tracking.uri={sqlite_uri}")
    done = lab.step("ablate", *TWO, "log_model=true", *online)
    assert done.code == 0, done.err
    found = see(sqlite_uri, run_id(done.folder))
    names = ["l0_baseline seed 0", "l0_baseline seed 1", "l1_ib seed 0", "l1_ib seed 1"]
    assert set(found.children) == {*names, "teacher_0", "teacher_1"}
    assert (found.name, found.status) == ("ablate rungs=l0_baseline,l1_ib seeds=0,1", "FINISHED")
    assert (found.params["rungs"], found.params["seeds"]) == ("l0_baseline,l1_ib", "0,1")
    for name in names:
        child = found.children[name]
        rung, seed = name.split(" seed ")
        below = {"l0_baseline": "none", "l1_ib": "l1d_deterministic"}[rung]
        assert (child.tags["asib.rung"], child.tags["asib.parent_rung"], child.params["seed"]) == (rung, below, seed)
        assert child.status == "FINISHED"
        assert {"predictions.npz", "config.yaml", "checkpoints/student.safetensors"} <= child.artifacts
        assert child.models_out == []
    assert {f"comparison/comparison.{kind}" for kind in ("csv", "md", "png", "html")} <= found.artifacts
    note = found.tags["mlflow.note.content"]
    assert "#/compare-runs?runs=" in note
    assert note.split("\n\n")[1] == f"Repeat: `{found.tags['asib.command']}`"
    assert all(found.children[name].id in note for name in names)
    assert len(found.models_out) == 1, "the best rung's student"
    assert found.tags["asib.best_rung"] in ("l0_baseline", "l1_ib")
    assert found.tags["asib.reused"] == "none"
    assert "l1_ib" in done.out

    again = lab.step("ablate", *TWO, "log_model=true", *online)
    assert (again.code, len(trained)) == (0, 4), "nothing is trained again"
    second = see(sqlite_uri, run_id(again.folder))
    assert second.tags["asib.reused"].split(",") == [found.children[name].id for name in names]
    assert all(found.children[name].id in second.tags["mlflow.note.content"] for name in names)
    assert (second.children, second.models_out) == ({}, [])
    assert see(sqlite_uri, found.id).children["l1_ib seed 0"].status == "FINISHED"
    pd.testing.assert_frame_equal(table(again.folder), table(done.folder))

    expected = table(done.folder)
    # what a folder says of a run and what the server says of it is the same
    for folder in done.folder.glob("l*-seed*"):
        local = records.from_folder(folder)
        assert local.id == found.children[local.name].id
    compared = lab.step("compare", f"parent={second.id}", *online)
    assert compared.code == 0, compared.err
    pd.testing.assert_frame_equal(table(compared.folder), expected)
    assert "comparison/comparison.html" in see(sqlite_uri, second.id).artifacts
    some = [found.children[name].id for name in names[:3]]
    picked = lab.step("compare", f"runs={','.join(some)}", *online)
    assert picked.code == 0, picked.err
    assert list(table(picked.folder)["seeds"]) == [2, 1]

    # the server alone has the results: another machine
    shutil.rmtree(lab.runs)
    elsewhere = lab.step("ablate", *TWO, *online)
    assert (elsewhere.code, len(trained)) == (0, 4), elsewhere.err
    pd.testing.assert_frame_equal(table(elsewhere.folder), expected)


def test_what_has_finished_is_reused_until_forced(copy: Lab, ladder: tuple[Lab, Done], trained: list[str]) -> None:
    done = copy.step("ablate", *TWO)
    assert (done.code, trained, nested(done.folder)) == (0, [], [])
    assert "4 of 4 runs had finished before" in done.err
    assert done.err.count("had finished before") == 1
    pd.testing.assert_frame_equal(table(done.folder), table(ladder[1].folder))
    more = copy.step("ablate", "rungs=l0_baseline,l0k_aver", "seeds=0")
    assert (more.code, trained) == (0, ["l0k_aver seed 0"])
    forced = copy.step("ablate", "rungs=l0_baseline", "seeds=0", "force=true")
    assert (forced.code, trained) == (0, ["l0k_aver seed 0", "l0_baseline seed 0"])


def test_another_configuration_is_not_reused(copy: Lab, trained: list[str]) -> None:
    done = copy.step("ablate", "rungs=l0_baseline", "seeds=0", "optim.student_lr=0.002")
    assert (done.code, trained) == (0, ["l0_baseline seed 0"])


@pytest.mark.slow
def test_a_run_delivered_later_is_reused_with_its_record(copy: Lab, sqlite_uri: str, trained: list[str]) -> None:
    """What was run off line comes to the server with the parent that reuses it."""
    done = copy.step("ablate", *TWO, "tracking.mode=online", f"tracking.uri={sqlite_uri}")
    assert (done.code, trained) == (0, []), done.err
    found = see(sqlite_uri, run_id(done.folder))
    assert set(found.children) == {f"{rung} seed {seed}" for rung in ("l0_baseline", "l1_ib") for seed in (0, 1)}
    assert {child.status for child in found.children.values()} == {"FINISHED"}
    assert found.tags["asib.reused"].split(",") == [found.children[name].id for name in sorted(found.children)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question", "left"),
    [
        pytest.param(PER_TEACHER + 2, 4, id="in a teacher's fine-tuning"),
        pytest.param(2 * PER_TEACHER + 2 * PER_L0 + 8, 2, id="in the third run"),
    ],
)
def test_an_interrupted_ladder_started_again_ends_with_the_same_table(
    lab: Lab, ladder: tuple[Lab, Done], monkeypatch: pytest.MonkeyPatch, trained: list[str], question: int, left: int
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(train, "Loop", signal_at(question).loop)
        killed = lab.step("ablate", *TWO)
    assert (killed.code, ending(killed.folder)) == (143, ("KILLED", "killed", 143))
    trained.clear()
    again = lab.step("ablate", *TWO)
    assert (again.code, again.new) == (0, []), again.err
    assert len(trained) == left, "finished runs are not made again"
    assert ending(killed.folder) == ("FINISHED", "completed", 0)
    pd.testing.assert_frame_equal(table(killed.folder), table(ladder[1].folder))
    assert nested(killed.folder) == nested(ladder[1].folder)
    for folder in ladder[1].folder.glob("l*-seed*"):
        assert points(killed.folder / folder.name) == points(folder)


def test_another_command_does_not_go_on_with_an_interrupted_ladder(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(train, "Loop", signal_at(2 * PER_TEACHER + PER_L0 + 2).loop)
        killed = lab.step("ablate", *TWO)
    other = lab.step("ablate", "rungs=l0_baseline", "seeds=0")
    assert (other.code, len(other.new)) == (0, 1), other.err
    assert ending(killed.folder)[0] == "KILLED"
    assert "1 of 1 runs had finished before" in other.err


@pytest.mark.slow
def test_a_ladder_killed_with_minus_9_ends_with_the_same_table(lab: Lab, ladder: tuple[Lab, Done]) -> None:
    process = lab.start("ablate", *TWO, "checkpoint.every_seconds=1e-6")
    reached = "*-ablate-*/l1_ib-seed0-*/checkpoints/manifest.json"
    try:
        until(lambda: list(lab.runs.glob(reached)) or process.poll() is not None, 120)
        assert process.poll() is None, "it ended before it was killed"
    finally:
        process.kill()
    (folder,) = lab.run_folders()
    assert journal(folder)[-1].kind != "end"
    again = lab.step("ablate", *TWO, "checkpoint.every_seconds=1e-6")
    assert (again.code, again.new) == (0, []), again.err
    pd.testing.assert_frame_equal(table(folder), table(ladder[1].folder))


# bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rungs=l9"], "no such rung"),
        (["seeds=x"], "seeds=x"),
        (["force=maybe"], "force=maybe"),
        (["rungs=l4_full"], "set method.num_stages=4"),
        (["rungs=l1_ib", "method.use_ib=false"], "rung l1d_deterministic sets it"),
        (["rungs=l1_ib", "method.kd_alpha=0"], "method.kd_alpha=0"),
        (["rung=l1_ib,l2_cccp", "method.num_stagess=4"], "method.num_stages"),
    ],
)
def test_bad_input_ends_before_there_is_a_run(lab: Lab, arguments: list[str], said: str) -> None:
    done = lab.step("ablate", *arguments)
    assert (done.code, done.new) == (2, [])
    assert len(done.lines) == 1
    assert said in done.lines[0]


def test_arguments_come_as_mlflow_run_passes_them(copy: Lab, trained: list[str]) -> None:
    words = ["--cfg", str(copy.cfg), "--rungs", "l1_ib", "--seeds", "", "--force", "", "--overrides", ""]
    done = copy.raw("ablate", [*words, "--output_dir", str(copy.runs)])
    assert (done.code, trained) == (0, []), done.err
    assert "1 of 1 runs had finished before" in done.err


def test_the_tables_of_rungs_and_keys_are_printed(lab: Lab) -> None:
    assert "| `l4_full` | `l3d_adaptive` |" in lab.raw("ablate", ["rungs=table", "cfg=quickstart"]).out
    assert re.search(r"^  seeds +such as 0,1,2", lab.raw("ablate", ["--help"]).out, re.MULTILINE)


def test_runs_on_different_data_are_not_compared(copy: Lab, tmp_path: Path) -> None:
    other = Lab(tmp_path / "other")
    write_npz(other.data, seed=5)
    distilled = other.step("distill")
    assert distilled.code == 0, distilled.err
    mine = next(copy.runs.glob("*-ablate-*/l1_ib-seed0-*"))
    done = copy.step("compare", f"runs={mine},{distilled.folder}")
    assert done.code == 2
    assert "runs on different data are not compared" in done.lines[-1]
    assert all(records.from_folder(f).digest[:12] in done.lines[-1] for f in (mine, distilled.folder))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give parent=<run id>, or runs=<id>,<id>"),
        (["parent=a", "runs=a,b"], "one of them"),
        (["runs=a"], "comparing needs two"),
        (["runs=a,b"], "runs=a: no such run"),
        (["parent=abc"], "parent=abc: no such run"),
    ],
)
def test_what_is_not_there_is_not_compared(lab: Lab, arguments: list[str], said: str) -> None:
    done = lab.step("compare", *arguments)
    assert done.code == 2
    assert said in done.lines[-1]


def test_an_unknown_run_of_a_server_is_refused(lab: Lab, sqlite_uri: str) -> None:
    done = lab.step("compare", f"runs={'0' * 32},{'1' * 32}", "tracking.mode=online", f"tracking.uri={sqlite_uri}")
    assert done.code == 2
    assert "0" * 32 in done.lines[-1]
