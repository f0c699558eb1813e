"""Comparisons of hand-made runs: the numbers, the grouping, what is refused, and the page."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs

import numpy as np
import pytest
from scipy import stats

from pipeline.compare import compare, published, report
from pipeline.compose import rungs
from pipeline.errors import UserError
from pipeline.reporting import statistics
from pipeline.runs.records import Record
from tests.rendering import EVIL, elements, leads

IMAGES = 40


def record(rung: str | None, seed: int, right: int, val: float = 50.0, **changes: Any) -> Record:
    """A run that classified the first `right` test images."""
    config = {"seed": str(seed), "dataset.name": "npz", "method.use_ib": str(rung == "l1_ib").lower(), "threads": "1"}
    metrics = {
        "final/acc_val_selected": 100.0 * right / IMAGES,
        "final/val_acc": val,
        "final/teacher_0_acc": 60.0,
        "final/teacher_avg_acc": 65.0,
        "cost/updates/b": 16.0,
        "cost/forward_images/student": 512.0,
        "cost/seconds": 2.0,
        "cost/gmacs": 3.0,
    }
    values: dict[str, Any] = {
        "id": f"{rung}-{seed}",
        "name": f"{rung} seed {seed}",
        "status": "FINISHED",
        "tags": {"asib.data_digest": "d" * 64, "asib.step": "distill", "asib.config_hash": "c" * 64},
        "config": config,
        "metrics": metrics,
        "histories": {"student/acc": [(0, 10.0), (1, 20.0 + seed)]},
        "classes": 4,
        "correct": np.arange(IMAGES) < right,
    }
    if rung:
        values["tags"]["asib.rung"] = rung
    for key, change in changes.items():
        values[key] = {**values[key], **change} if isinstance(values[key], dict) else change
    return Record(**values)


def ladder() -> list[Record]:
    return [
        record("l1_ib", 1, 26, val=56.0),
        record("l1_ib", 0, 30, val=60.0),
        record("l0_baseline", 0, 20, val=70.0),
        record("l0_baseline", 1, 22, val=44.0),
    ]


def test_numbers_are_those_computed_by_hand() -> None:
    table = compare.compare(ladder()).table
    assert list(table.index) == ["l0_baseline", "l1_ib"], "in the ladder's order"
    l0, l1 = table.loc["l0_baseline"], table.loc["l1_ib"]
    assert (l0["acc"], l1["acc"]) == (52.5, 70.0)
    assert (l0["std"], l1["std"]) == (pytest.approx(np.sqrt(2 * 2.5**2)), pytest.approx(np.sqrt(2 * 5**2)))
    assert (l1["seeds"], l1["val_acc"], l1["parent"]) == (2, 58.0, "l0_baseline")
    assert (l1["vs l0_baseline"], l1["vs parent"]) == (17.5, 17.5)
    difference = np.stack([(np.arange(40) < a) * 100.0 - (np.arange(40) < b) * 100.0 for a, b in ((30, 20), (26, 22))])
    expected = statistics.interval(difference)
    assert (l1["vs parent low"], l1["vs parent high"]) == (expected.low, expected.high)
    assert np.isnan(l0["vs l0_baseline"])
    assert (l1["student updates"], l1["fusion updates"], l1["images student"], l1["GMACs"]) == (16, 0, 512, 3)


# pairs, teachers, code -----------------------------------------------------------------------------------------------

STRONG, WEAK = {"asib.teachers": "5" * 64 + "," + "6" * 64}, {"asib.teachers": "7" * 64 + "," + "8" * 64}
ALONE = {"asib.teachers": "none"}


def of_pair(student: str, rung: str, seed: int, right: int, made: dict[str, str], **changes: Any) -> Record:
    config = {"model.student.name": student, "model.teachers.0.name": "t", "model.teachers.1.name": "u"}
    config |= {"method.student_epochs_per_stage": "[2, 3]", "dataset.val_fraction": "0.1", "dataset.split_seed": "0"}
    changes["id"] = f"{student}-{rung}-{seed}-{changes.get('id', '')}"
    changes["config"] = config | changes.get("config", {})
    changes["tags"] = made | changes.get("tags", {})
    return record(rung, seed, right, **changes)


def two_pairs() -> list[Record]:
    """Pair A gains 2.5 points over its own L0, pair B 5; across pairs it would be 22.5 and -15."""
    return [
        *(of_pair("a", "l0_baseline", seed, 20, ALONE) for seed in range(3)),
        *(of_pair("b", "l0_baseline", seed, 28, ALONE) for seed in range(3)),
        *(of_pair("a", "l1_ib", seed, 21, STRONG, metrics={"final/synergy_acc": 70.0}) for seed in range(3)),
        *(of_pair("b", "l1_ib", seed, 30, WEAK, metrics={"final/synergy_acc": 90.0}) for seed in range(3)),
    ]


def test_parent_and_baseline_are_those_of_the_pair() -> None:
    table = compare.compare(two_pairs()).table
    assert list(table["parent"]) == ["", "", "l0_baseline", "l0_baseline (2)"]
    for column in ("vs parent", "vs l0_baseline"):
        assert table[column].tolist()[2:] == [2.5, 5.0]
        assert table[column].isna().tolist()[:2] == [True, True]
    assert table["pair"].tolist()[2] == "t + u (555555, 666666) → a"


def test_one_student_alone_serves_two_sets_of_teachers_that_it_never_saw() -> None:
    """Same student and epochs, other teachers: cross-entropy alone is the same for both."""
    runs = [of_pair("a", "l0_baseline", 0, 20, ALONE)]
    runs += [of_pair("a", "l1_ib", 0, 24, tags, id=n, config={"model.teachers.0.name": n}) for n, tags in
             (("t", STRONG), ("v", WEAK))]  # fmt: skip
    assert compare.compare(runs).table["vs l0_baseline"].tolist()[1:] == [10.0, 10.0]


def test_other_teachers_are_other_groups_wherever_their_files_lie() -> None:
    config = {"model.teachers.0.checkpoint": "here.pt"}
    runs = [of_pair("a", "l1_ib", seed, 20 + seed, STRONG, config=config) for seed in (0, 1)]
    runs += [of_pair("a", "l1_ib", 2, 22, STRONG, config={"model.teachers.0.checkpoint": "there.pt"})]
    runs += [of_pair("a", "l1_ib", 3, 40, WEAK, config=config)]
    assert [g.seeds for g in compare.compare(runs).groups] == [(0, 1, 2), (3,)]


UNFAIR: dict[str, tuple[dict[str, Any], str]] = {
    "teachers": ({"tags": WEAK}, "other teachers (t + u (555555, 666666) and t + u (777777, 888888))"),
    "epochs": ({"config": {"method.student_epochs_per_stage": "[4, 4]"}}, "other epochs (5 and 8)"),
    "split": ({"config": {"dataset.val_fraction": "0.2"}}, "another split (dataset.val_fraction: 0.1 and 0.2)"),
    "student": ({"config": {"model.student.name": "b"}}, "other students (a and b)"),
    "data": ({"tags": {"asib.data_digest": "e" * 64}}, "dddddddddddd"),
}


@pytest.mark.parametrize("case", UNFAIR)
def test_an_unfair_comparison_is_refused_unless_it_is_wanted_and_then_named(case: str) -> None:
    changes, said = UNFAIR[case]
    below = of_pair("a", "l0k_aver", 0, 20, STRONG, **changes)
    runs = [Record(**{**vars(below), "id": "below"}), of_pair("a", "l1_ib", 0, 30, STRONG)]
    with pytest.raises(UserError) as error:
        compare.compare(runs)
    assert said in str(error.value)
    assert "anyway=true" in str(error.value)
    assert "\n" not in str(error.value)
    found = compare.compare(runs, anyway=True)
    assert found.table.loc["l1_ib", "vs parent"] == 25.0
    assert any(said in note for note in found.notes)
    assert np.isnan(found.table.loc["l1_ib", "vs parent low"]) == (case == "data"), "other images are not paired"


def test_what_else_differs_stands_above_the_table_and_what_it_is_about_does_not() -> None:
    runs = [of_pair("a", "l0_baseline", 0, 20, ALONE), of_pair("a", "l1_ib", 0, 24, STRONG)]
    assert not any("differ" in note for note in compare.compare(runs).notes), "use_ib is what l1_ib changes"
    runs[1] = of_pair("a", "l1_ib", 0, 24, STRONG, config={"optim.student_lr": "0.1"})
    found = compare.compare(runs)
    assert "l1_ib and l0_baseline also differ in optim.student_lr (0.1, none)" in found.notes
    text = report.text(found)
    assert text.index("optim.student_lr") < text.index("vs parent")


def test_runs_of_different_code_are_not_seeds_of_one_configuration() -> None:
    old, new = {**STRONG, "asib.sources": "1" * 64}, {**STRONG, "asib.sources": "2" * 64}
    runs = [of_pair("a", "l1_ib", seed, 20, old if seed < 2 else new) for seed in range(4)]
    found = compare.compare(runs)
    assert [g.seeds for g in found.groups] == [(0, 1), (2, 3)]
    (note,) = (note for note in found.notes if note.startswith("runs of different code"))
    assert note.endswith(": 111111111111 made l1_ib; 222222222222 made l1_ib (2)")
    git = [of_pair("a", "l1_ib", s, 20, {**STRONG, "asib.git_sha": str(s) * 40}) for s in (3, 4)]
    assert len(compare.compare(git).groups) == 2, "runs from before that digest was kept have their commit"


def test_the_synergy_is_each_configurations_own_and_teachers_are_each_sets() -> None:
    found = compare.compare(two_pairs())
    assert found.table["synergy"].tolist()[2:] == [70.0, 90.0]
    assert not any("synergy" in name for name in found.references())
    runs = [of_pair("a", "l1_ib", 0, 20, STRONG, metrics={"final/teacher_0_acc": 10.0})]
    runs += [of_pair("a", "l1_ib", 1, 20, WEAK, metrics={"final/teacher_0_acc": 30.0})]
    seen = compare.compare(runs).references()
    assert (seen["teacher 0 (555555,666666)"], seen["teacher 0 (777777,888888)"]) == (10.0, 30.0)


def test_p_values_are_adjusted_for_the_number_of_comparisons() -> None:
    """Three: l1 over L0k, L0k over L0, l1 over L0; what stands in two columns is one comparison."""
    counts = {"l0_baseline": (20, 22, 21), "l0k_aver": (22, 23, 24), "l1_ib": (30, 27, 29)}
    tags = {"l0_baseline": ALONE, "l0k_aver": STRONG, "l1_ib": STRONG}
    runs = [of_pair("a", name, s, n, tags[name]) for name, values in counts.items() for s, n in enumerate(values)]
    table = compare.compare(runs).table
    p = {
        pair: stats.ttest_rel(counts[pair[0]], counts[pair[1]]).pvalue
        for pair in (("l0k_aver", "l0_baseline"), ("l1_ib", "l0k_aver"), ("l1_ib", "l0_baseline"))
    }
    (third, a), (second, b), (first, c) = sorted(p.items(), key=lambda item: -item[1])
    expected = {first: 3 * c, second: max(3 * c, 2 * b), third: max(3 * c, 2 * b, a)}
    assert table.loc["l1_ib", "vs parent p"] == pytest.approx(expected["l1_ib", "l0k_aver"])
    assert table.loc["l1_ib", "vs l0_baseline p"] == pytest.approx(expected["l1_ib", "l0_baseline"])
    for column in ("vs parent p", "vs l0_baseline p"):
        assert table.loc["l0k_aver", column] == pytest.approx(expected["l0k_aver", "l0_baseline"])


@pytest.mark.parametrize("seeds", [3, 5])
def test_few_seeds_are_called_indicative_and_have_students_interval_too(seeds: int) -> None:
    runs = [of_pair("a", "l0_baseline", s, 20 + s % 2, ALONE) for s in range(seeds)]
    runs += [of_pair("a", "l1_ib", s, 24 + s, STRONG) for s in range(seeds)]
    found = compare.compare(runs)
    cell = report.shown(found).loc["l1_ib", "vs parent"]
    means = 2.5 * np.array([4 + s - s % 2 for s in range(seeds)])
    bounds = stats.ttest_1samp(means, 0).confidence_interval(0.95)
    p = stats.ttest_1samp(means, 0).pvalue  # beside its own interval
    assert (f"t [{bounds.low:+.2f}, {bounds.high:+.2f}] p {p:.3f}, 3 seeds: indicative" in cell) == (seeds == 3)
    assert ("indicative" in cell) == (seeds == 3)
    assert f"these teachers ({'5' * 12} + {'6' * 12})" in report.text(found)
    assert "val_fraction 0.1, split_seed 0" in report.markdown(found)


# methods and pairs ---------------------------------------------------------------------------------------------------


def of_method(name: str, seed: int, right: int, gmacs: float, epochs: int = 10, **changes: Any) -> Record:
    """A run of a method with pair a, or of the student alone."""
    made = ALONE if name == "alone" else STRONG
    config = {"method.name": "asib" if name == "alone" else name, "method.student_epochs_per_stage": f"[{epochs}]"}
    changes["metrics"] = {"cost/gmacs": gmacs, "final/acc_last": 100.0 * (right - 1) / IMAGES} | changes.get(
        "metrics", {}
    )
    changes["id"] = f"{epochs}-{changes.get('id', '')}"
    changes["config"] = config | changes.get("config", {})
    changes["tags"] = {"asib.rung": ""} | changes.get("tags", {})
    return of_pair("a", name, seed, right, made, **changes)


def methods() -> list[Record]:
    """crd costs three times as much as kd does in 10 epochs, and the same as kd in 30 up to 3 %."""
    runs = [of_method("alone", s, 18 + s, 40) for s in (0, 1)]
    runs += [of_method("kd", s, 20 + s, 100) for s in (0, 1)]
    runs += [of_method("crd", s, 26 + s, 310) for s in (0, 1)]
    return runs + [of_method("kd", s, 24 + s, 300, epochs=30) for s in (0, 1)]


def test_methods_are_compared_with_the_baseline_and_with_the_baseline_at_their_cost() -> None:
    found = compare.compare(methods(), baseline="kd")
    names = [g.label for g in found.groups]
    assert names == ["alone", "kd", "crd", "kd"]
    table = found.table
    assert table["vs kd"].tolist()[0::2] == [-5.0, 15.0]
    assert table["vs kd"].isna().tolist() == [False, True, False, True], "the baseline is compared with nothing"
    assert table["at equal cost"].isna().tolist() == [True, True, False, True]
    assert (table["at equal cost"].iloc[2], table["epochs at equal cost"].iloc[2]) == (5.0, 30)
    assert table["last"].tolist() == pytest.approx([43.75, 48.75, 63.75, 58.75])
    rows = report.matrix(found)
    assert list(rows.index) == ["alone", "kd", "crd", "kd, 30 epochs"]
    assert rows.loc["crd"].tolist() == ["66.25 ± 1.77 (2)"]
    dearer = [*methods()[:-2], *(of_method("kd", s, 24, 330, epochs=33) for s in (0, 1))]
    assert compare.compare(dearer, baseline="kd").table["at equal cost"].isna().all(), "330 is 6 % more than 310"


def test_what_methods_set_is_what_their_comparison_is_about_and_other_epochs_are_unfair() -> None:
    runs = [of_method("kd", 0, 20, 100), of_method("crd", 0, 24, 100, config={"method.crd_negatives": "16384"})]
    alone = of_method("alone", 0, 18, 40, config={"model.teachers": "[]"})
    assert not any("also differ" in note for note in compare.compare([*runs, alone], baseline="alone").notes)
    runs[1] = of_method("crd", 0, 24, 100, config={"optim.student_lr": "0.1"})
    assert any("also differ in optim.student_lr (0.1, none)" in note for note in compare.compare(runs).notes)
    runs[1] = of_method("crd", 0, 24, 300, epochs=30)
    with pytest.raises(UserError, match=r"other epochs \(30 and 10\)"):
        compare.compare(runs)


def test_a_baseline_that_is_not_there_is_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean crd"):
        compare.compare(methods(), baseline="crdd")


def test_a_table_in_the_terminal_is_100_columns_wide_and_names_pairs_once() -> None:
    other = {"config": {"model.student.name": "b", "model.teachers.0.name": "a_teacher_with_a_long_name"}, "tags": WEAK}
    runs = [*methods(), *(of_method(name, s, 20 + s, 100, id=name, **other) for name in ("kd", "crd") for s in (0, 1))]
    found = compare.compare(runs, baseline="kd")
    assert list(found.pairs) == ["t+u-a", "a_teacher_with_a_long_name+u-b"]
    text = report.text(found)
    assert max(map(len, text.splitlines())) <= 100
    for word in ("differences", "cost of a run", "GMACs", "at equal cost, 30 epochs", "2 seeds: indicative"):
        assert word in text


def test_differences_from_one_seed_have_no_column_for_an_interval_over_seeds() -> None:
    one, two = (
        report.text(compare.compare([r for r in methods()[:6] if r.seed < seeds], baseline="kd")) for seeds in (1, 2)
    )
    assert "t 95 %" not in one
    assert re.search(r"against +points +95 % +p +seeds\n", one)
    assert re.search(r"against +points +95 % +t 95 % +p +seeds\n", two)


def test_published_values_and_their_band_stand_beside_those_of_the_pair() -> None:
    """70.66 in RepDistiller's README, 71.54 in its issue 62; the student alone has 69.06."""
    config = {"model.student.name": "cifar_resnet20", "model.teachers.0.name": "cifar_resnet56"}
    one = {"model.teachers.1.name": None, "dataset.name": "cifar100"}
    runs = [of_method("alone", 0, 20, 40), of_method("kd", 0, 22, 100), of_method("mine", 0, 22, 100)]
    changed = [{k: v for k, v in {**r.config, **config, **one}.items() if v is not None} for r in runs]
    found = compare.compare([Record(**{**vars(r), "config": c}) for r, c in zip(runs, changed, strict=True)])
    assert report.shown(found)["published"].tolist() == ["69.06 last", "70.66 last [70.66, 71.54]", ""]
    assert list(found.pairs) == ["resnet56-resnet20"]
    sample = [{**c, "dataset.name": "cifar100_sample"} for c in changed]
    other = compare.compare([Record(**{**vars(r), "config": c}) for r, c in zip(runs, sample, strict=True)])
    assert "published" not in report.shown(other)


def test_the_file_of_published_values_holds_its_sources_numbers() -> None:
    """DIST's README gives 75.51 nowhere: TTM quotes it, and the first source of a pair is the one that is shown."""
    of = published.find
    crd = of("cifar100", ["cifar_resnet32x4"], "cifar_resnet8x4", "crd")
    assert crd is not None
    assert (crd.value, crd.epoch, crd.low, crd.high) == (75.51, "last", 75.51, 75.51)
    dist = of("cifar100", ["cifar_resnet56"], "cifar_resnet20", "dist")
    assert dist is not None
    assert (dist.value, dist.low, dist.high) == pytest.approx((71.75, 71.45, 72.05))
    dkd = of("cifar100", ["cifar_resnet32x4"], "cifar_resnet8x4", "dkd")
    assert dkd is not None
    assert (dkd.value, dkd.low, dkd.high, dkd.epoch) == (76.32, 75.80, 76.50, "best")
    assert of("cifar10", ["cifar_resnet56"], "cifar_resnet20", "kd") is None


def test_contaminated_runs_are_marked() -> None:
    runs = [of_pair("a", "l0_baseline", 0, 20, ALONE)]
    runs += [of_pair("a", "l1_ib", 0, 24, {**STRONG, "asib.val_contaminated": "true"})]
    found = compare.compare(runs)
    assert report.shown(found)["val acc"].tolist() == ["50.00", "50.00 †"]
    assert any(note.startswith("†") for note in found.notes)


def test_only_seeds_that_both_have_are_paired() -> None:
    runs = [*ladder(), record("l1_ib", 2, 40)]
    row = compare.compare(runs).table.loc["l1_ib"]
    assert row["acc"] == pytest.approx(80.0)
    assert row["vs l0_baseline"] == 17.5


def test_a_rung_is_compared_with_the_next_one_below_that_was_run() -> None:
    runs = [record("l4_full", 0, 30), record("l0_baseline", 0, 20), record("l0k_aver", 0, 24)]
    assert list(compare.compare(runs).table["parent"]) == ["", "l0_baseline", "l0k_aver"]


def test_the_best_is_chosen_by_validation_and_never_by_test() -> None:
    best = compare.compare([*ladder(), record("l2_cccp", 0, 40, val=10.0)]).best()
    assert best is not None
    assert (best[0].name, best[1].id) == ("l1_ib", "l1_ib-0")
    without = [Record(**{**vars(r), "metrics": {"final/acc_val_selected": 50.0}}) for r in ladder()]
    assert compare.compare(without).best() is None


def test_runs_without_rungs_are_grouped_by_configuration_seeds_left_out() -> None:
    same = [record(None, seed, 20, config={"method.tau": "4.0", "output_dir": f"r{seed}"}) for seed in (0, 1)]
    other = record(None, 0, 22, config={"method.tau": "2.0"}, id="x", tags={"asib.config_hash": "e" * 64})
    found = compare.compare([*same, other])
    assert [len(g.records) for g in found.groups] == [2, 1]
    assert [g.name for g in found.groups] == ["distill tau=4.0", "distill tau=2.0"]
    assert list(found.differing.index) == ["method.tau"]
    assert list(found.differing.loc["method.tau"]) == ["4.0", "2.0"]


def test_what_may_be_reused_is_one_row_and_a_result_with_a_bank_is_another() -> None:
    """The identity of a result has whether there was a bank and a compiled network, not how that was asked for."""
    words = [("lazy", "lazy", "auto"), ("auto", "lazy", "false"), ("ahead", "ahead", "auto"), ("auto", "off", "auto")]
    runs = [
        record(None, seed, 20, config={"bank": asked, "optim.compile": how}, tags={"asib.bank": used})
        for seed, (asked, used, how) in enumerate(words)
    ]
    runs += [record(None, 4, 20, config={"bank": "off", "optim.compile": "true"}, tags={"asib.bank": "off"})]
    runs[-1] = Record(**{**vars(runs[-1]), "metrics": {**runs[-1].metrics, "cost/compile_seconds": 9.0}})
    assert [g.seeds for g in compare.compare(runs).groups] == [(0, 1, 2), (3,), (4,)]
    banks = {"alone": "off", "kd": "lazy"}
    table = [r for r in methods() if r.label in banks and r.metrics["cost/gmacs"] != 300]
    made = [Record(**{**vars(r), "tags": {**r.tags, "asib.bank": banks[r.label]}}) for r in table]
    assert compare.compare(made, baseline="kd").notes == (), "a student alone has no bank: that is no remark"


def test_other_configurations_of_one_rung_are_groups_of_their_own() -> None:
    runs = [record("l1_ib", 0, 20), record("l1_ib", 0, 30, config={"method.tau": "1.0"}, id="other")]
    assert [g.name for g in compare.compare(runs).groups] == ["l1_ib", "l1_ib (2)"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tags": {"asib.data_digest": "e" * 64}}, ("l1_ib seed 9", "l1_ib seed 1", "d" * 12, "e" * 12)),
        ({"classes": 10}, ("l1_ib seed 9", "has 4 classes", "has 10")),
        ({"status": "RUNNING"}, ("l1_ib seed 9", "is RUNNING")),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line_that_names_both(
    change: dict[str, Any], said: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as error:
        compare.compare([*ladder(), record("l1_ib", 9, 20, **change)])
    assert all(word in str(error.value) for word in said), error.value
    assert "\n" not in str(error.value)


def test_runs_that_trained_no_student_are_refused() -> None:
    with pytest.raises(UserError, match="has no final/acc_val_selected"):
        compare.compare([Record(**{**vars(ladder()[0]), "metrics": {"final/teacher_0_acc": 1.0}})])
    with pytest.raises(UserError, match="nothing to compare"):
        compare.compare([])


def test_what_the_table_cannot_say_is_said_beside_it() -> None:
    sample = [Record(**{**vars(r), "config": {**r.config, "dataset.name": "cifar100_sample"}}) for r in ladder()]
    assert compare.compare(sample).notes == ("smoke test: cannot rank methods",)
    assert compare.compare(ladder()).notes == ()
    notes = compare.compare([record("l2_cccp", 0, 20, correct=None), record("l0_baseline", 0, 20)])
    assert any("l2_control" in note for note in notes.notes)
    assert any("not that of the seed" in note for note in notes.notes)
    assert any("no intervals" in note for note in notes.notes)
    assert notes.table.loc["l2_cccp", "vs l0_baseline"] == 0.0
    assert np.isnan(notes.table.loc["l2_cccp", "vs l0_baseline low"])


def test_the_page_is_one_file_with_everything_in_it(tmp_path: Any) -> None:
    found = compare.compare(ladder())
    paths = report.write(found, tmp_path)
    assert [p.suffix for p in paths] == [".csv", ".md", ".png", ".html", ".tex", ".png"]
    page = paths[3].read_text()
    links = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert [link[:22] for link in links] == ["data:image/png;base64,"] * 2
    assert "http" not in page.replace("data:image", "")[:2000]
    for word in ("l1_ib", "70.00 ± 7.07", "+17.50", "teachers averaged 65.00", "method.use_ib", "l1_ib-0"):
        assert word in page
    assert paths[2].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "| l1_ib | l0_baseline | 2 | 70.00 ± 7.07 |" in paths[1].read_text()
    import pandas as pd

    read = pd.read_csv(paths[0], index_col="group")
    assert read.loc["l1_ib", "acc"] == 70.0


def test_the_link_opens_all_runs_and_the_note_fits_into_a_tag() -> None:
    ids = [f"{number:032x}" for number in range(105)]
    link = report.link(ids, "7")
    query = parse_qs(link.partition("?")[2])
    assert link.startswith("#/compare-runs?")
    assert (json.loads(query["runs"][0]), json.loads(query["experiments"][0])) == (ids, ["7"])
    runs = [
        record(name, seed, 20 + seed)
        for name in [*rungs.ladder(), *map("side_{}".format, range(12))]
        for seed in range(5)
    ]
    note = report.note(compare.compare(runs), link)
    assert link in note
    assert len(note) <= 8000
    assert "| l4_full |" in report.note(compare.compare(runs), report.link(ids[:21], "7"))


def test_the_note_begins_with_what_validation_prefers_and_the_command() -> None:
    """By validation l1_ib is the better one, 58 against 57; its difference is the table's."""
    found = compare.compare(ladder())
    row = found.table.loc["l1_ib"]
    first, again, link, *_ = report.note(found, "#/x", "Repeat: `me`").split("\n\n")
    said = f"+17.50 [{row['vs parent low']:+.2f}, {row['vs parent high']:+.2f}] vs l0_baseline"
    assert first == f"**70.00 ± 7.07 %**: test top-1 of l1_ib, the best on validation; {said}"
    assert (again, link) == ("Repeat: `me`", "[**Compare these runs**](#/x)")


def test_rows_of_methods_are_not_called_rungs() -> None:
    for runs, baseline, corner in ((ladder(), None, "rung"), (methods(), "kd", "method")):
        assert f"| {corner} | " in report.note(compare.compare(runs, baseline=baseline), "")


@pytest.mark.parametrize("name", EVIL)
def test_names_of_runs_load_nothing_and_lead_nowhere(name: str) -> None:
    own: dict[str, Any] = {
        "name": name,
        "tags": {"asib.rung": name},
        "config": {"dataset.name": name, "model.student.name": name},
    }
    found = compare.compare(
        [record("l0_baseline", 0, 20), record("x", 0, 22, **own), record("x", 1, 24, **own)], anyway=True
    )
    assert name in {group.name for group in found.groups}
    assert leads(report.note(found, report.link(["1"], "7"))) == [report.link(["1"], "7")]
    assert leads(report.markdown(found)) == []
    assert len(report.markdown(found).split(" ± ")) == 4, "in the matrix, the table and its legend"
    page = report.page(found, b"")
    assert "script" not in elements(page)
    assert report.latex(found).count("\\begin") == report.latex(found).count("\\end") == 1 + len(found.pairs)
    (image,) = re.findall(r"<(?:img|a|link) [^>]*", page)
    assert image.endswith('src="data:image/png;base64,"')
