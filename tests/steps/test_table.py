"""Tables as a step, on data of seconds: pairs by methods, teachers once, equal cost, reuse, interruption, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from pipeline.ablate import table
from pipeline.compose.compose import compose
from pipeline.distill import train
from pipeline.runs import records
from tests.steps.lab import Done, Lab, ending, points, short, signal_at

PAIRS = {
    "one": {"teachers": ["cifar_resnet8", "cifar_wrn_16_1"], "student": "cifar_resnet8"},
    "two": {"teachers": ["cifar_wrn_16_1", "cifar_resnet8"], "student": "cifar_resnet8"},
}
FIRST = {"one": "cifar_resnet8 ", "two": "cifar_wrn_16_1"}
METHODS = {"alone": None, "average": ["method.kd_target=avg"], "synergy": ["method.kd_target=synergy"]}
NAMES = {f"{method} {pair} seed 0" for method in ("average", "synergy") for pair in PAIRS} | {"alone resnet8 seed 0"}


def write(lab: Lab, **changes: Any) -> str:
    """`table=<file>` of these pairs and methods, with the lab's configuration as the recipe."""
    content = {"recipe": str(lab.cfg), "pairs": PAIRS, "methods": METHODS, "baseline": "average"} | changes
    file = lab.folder / "small.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return f"table={file}"


def run(lab: Lab, *words: str, **changes: Any) -> Done:
    return lab.raw("table", [write(lab, **changes), f"output_dir={lab.runs}", *words])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lab, Done]:
    """The table, off line, undisturbed."""
    lab = Lab(tmp_path_factory.mktemp("table"))
    done = run(lab)
    assert done.code == 0, done.err
    return lab, done


def found(folder: Path) -> pd.DataFrame:
    """The comparison, without what depends on the clock."""
    return pd.read_csv(folder / "comparison/comparison.csv", index_col="group").drop(columns="seconds")


def by_name(folder: Path) -> dict[str, records.Record]:
    return {short(r.name): r for r in (records.from_folder(p.parent) for p in folder.glob("*/journal.jsonl"))}


def test_every_method_is_trained_with_every_pair_and_teachers_and_students_alone_once(made: tuple[Lab, Done]) -> None:
    nested = by_name(made[1].folder)
    teachers = {f"{pair}-teacher_{k}" for pair in PAIRS for k in (0, 1)}
    longer = {name for name in nested if " epochs " in name}
    assert set(nested) == NAMES | teachers | longer
    taught = {name: r.tags["asib.teachers"] for name, r in nested.items() if name.startswith(("average", "synergy"))}
    one, two = ({taught[name] for name in taught if f" {pair} " in name} for pair in PAIRS)
    assert len(one) == len(two) == 1, "a pair's methods have the same teachers"
    assert one != two, "and each pair its own, though their nested runs are numbered alike"
    weights = [[nested[f"{pair}-teacher_{k}"].tags["asib.weights"] for k in (0, 1)] for pair in PAIRS]
    assert one | two == {",".join(hashes) for hashes in weights}


def test_a_cell_is_the_run_that_distill_makes_of_its_recipe_pair_and_method(made: tuple[Lab, Done]) -> None:
    lab, done = made
    alike = lab.step("distill", "method.kd_target=avg", "method.teacher_adapt_epochs=1", "bank=lazy")
    assert alike.code == 0, alike.err
    cell = by_name(done.folder)["average one seed 0"]
    assert records.from_folder(alike.folder).tags["asib.config_hash"] == cell.tags["asib.config_hash"]
    shutil.rmtree(alike.folder)


def test_the_baseline_is_trained_until_it_costs_what_a_dearer_method_costs(made: tuple[Lab, Done]) -> None:
    rows = found(made[1].folder)
    nested = by_name(made[1].folder)
    for pair in PAIRS:
        usual, dear = (nested[f"{m} {pair} seed 0"].metrics["cost/gmacs"] for m in ("average", "synergy"))
        epochs = round(2 * dear / usual)
        assert epochs > 2
        longer = nested[f"average {pair} {epochs} epochs seed 0"]
        assert (
            longer.metrics["cost/updates/b"] == epochs / 2 * nested[f"average {pair} seed 0"].metrics["cost/updates/b"]
        )
        (row,) = (r for _, r in rows.iterrows() if (r["method"], r["pair"][:14]) == ("synergy", FIRST[pair]))
        if abs(longer.metrics["cost/gmacs"] / dear - 1) <= 0.05:
            accuracies = (r.metrics["final/acc_val_selected"] for r in (nested[f"synergy {pair} seed 0"], longer))
            assert row["at equal cost"] == pytest.approx(next(accuracies) - next(accuracies))
            assert row["epochs at equal cost"] == epochs
        else:
            assert pd.isna(row["at equal cost"])


def test_what_users_see_names_pairs_and_methods_and_fits_a_terminal(made: tuple[Lab, Done]) -> None:
    folder, out = made[1].folder, made[1].out
    assert max(map(len, out.splitlines())) <= 100
    for word in ("resnet8+wrn_16_1-resnet8", "wrn_16_1+resnet8-resnet8", "alone", "vs average", "1 seed: indicative"):
        assert word in out
    kinds = {path.name for path in (folder / "comparison").iterdir()}
    assert kinds == {*(f"comparison.{kind}" for kind in ("csv", "md", "png", "html", "tex")), "cost.png"}
    tags = records.from_folder(folder)
    assert tags.name.startswith("table small")
    assert (folder / "comparison/comparison.tex").read_text().count(r"\begin{tabular}") == 3


@pytest.mark.slow
def test_a_table_that_has_finished_is_reused_and_a_ladder_has_the_same_engine(
    made: tuple[Lab, Done], trained: list[str]
) -> None:
    lab, first = made
    again = run(lab)
    assert (again.code, trained) == (0, []), again.err
    pd.testing.assert_frame_equal(found(again.folder), found(first.folder))
    ladder = lab.step("ablate", "rungs=l0_baseline", "seeds=0")
    assert ladder.code == 0, ladder.err
    assert trained == ["l0_baseline seed 0"]
    part = run(lab, "pairs=two", "methods=average,alone")
    assert (part.code, trained[1:]) == (0, []), part.err
    assert list(found(part.folder)["method"]) == ["average", "alone"]


@pytest.mark.slow
def test_an_interrupted_table_started_again_ends_with_the_same_table(
    lab: Lab, made: tuple[Lab, Done], monkeypatch: pytest.MonkeyPatch, trained: list[str]
) -> None:
    shutil.copytree(made[0].runs / "teachers", lab.runs / "teachers")
    with monkeypatch.context() as patched:
        patched.setattr(train, "Loop", signal_at(14).loop)  # in the second run: the first asks 8 times
        killed = run(lab)
    assert (killed.code, ending(killed.folder)) == (143, ("KILLED", "killed", 143))
    trained.clear()
    again = run(lab)
    assert (again.code, again.new) == (0, []), again.err
    assert "alone resnet8 seed 0" not in trained
    theirs = json.loads(found(made[1].folder).to_json())
    assert json.loads(found(killed.folder).to_json()) == theirs
    for folder in made[1].folder.glob("*-seed0-*"):
        assert points(killed.folder / folder.name) == points(folder)


def test_overrides_are_read_over_the_tables_recipe(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRY_RUN", "1")
    done = lab.raw("table", ["table=quick", "method.student_epochs_per_stage=[1,1,1,1]", f"output_dir={lab.runs}"])
    assert done.code == 0, done.err
    assert "5 runs" in done.out


# bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["table=quik"], "did you mean quick"),
        (["pairs=onne"], "did you mean one"),
        (["methods=averag"], "did you mean average"),
        (["table.baseline=kd"], "table.baseline=kd: no row"),
        (["methods=alone,synergy"], "table.baseline=average"),
        (["model.student.name=cifar_resnet14"], "model.student.name: a table's rows have their own"),
        (["method=asib"], "method: a table's rows have their own"),
        (["seeds=x"], "seeds=x"),
        (["table.baselin=alone"], "did you mean table.baseline"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest_before_there_is_a_run(
    lab: Lab, words: list[str], said: str
) -> None:
    line = run(lab, *words).lines[-1] if words[0] != "table=quik" else lab.raw("table", words).lines[-1]
    assert said in line
    assert not lab.runs.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"methods": {"average": ["method.kd_target=avg"], "kdd": None}}, "method=kdd: no such option"),
        ({"methods": {"average": ["method.kd_target=agv"]}}, "method.kd_target"),
        ({"methods": {"average": ["dataset.val_fraction=0.3"]}}, "methods.average sets dataset.val_fraction"),
        ({"methods": {"average": ["method.tau=4"], "same": ["method.tau=4.0"]}}, "average and same are the same"),
        (
            {"methods": {"average": [], "long": ["method.student_epochs_per_stage=[2,2]"]}},
            "long has 4 epochs and average 2",
        ),
        ({"pairs": {"p": {**PAIRS["one"], "student": "cifar_resnet9"}}}, "cifar_resnet9"),
        ({"pairs": {"p": {"teachers": ["cifar_resnet8"], "student": "cifar_resnet8"}}}, "kd_target"),
        ({"recipe": "quickstrat"}, "quickstart"),
    ],
)
def test_a_table_that_cannot_be_trained_or_compared_is_refused_before_there_is_a_run(
    lab: Lab, changes: dict[str, Any], said: str
) -> None:
    done = run(lab, **changes)
    assert (done.code, done.new) == (2, [])
    assert len(done.lines) == 1
    assert said in done.lines[0]


# the baseline's longer training ---------------------------------------------------------------------------------------


def test_a_stretched_recipe_falls_at_the_same_shares_of_its_epochs() -> None:
    overrides = ["method.num_stages=1", "method.student_epochs_per_stage=[240]", "schedule=step"]
    config = table.stretched(compose(None, overrides), 720)
    assert config.method.student_epochs_per_stage == (720,)
    assert config.schedule.milestones == (450, 540, 630)
    assert sum(table.stretched(compose("quickstart"), 31).method.student_epochs_per_stage) == 31
