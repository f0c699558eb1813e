"""The schema against docs/method.md: defaults, ranges, identity, and what is derived before the lock."""

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.compose.compose import compose
from pipeline.config import Config, TeacherConfig, config_hash, explain, flatten, identity
from pipeline.config.continual import ContinualConfig
from pipeline.config.words import expects

PAGE = Path(__file__).resolve().parents[3] / "docs/method.md"
LINES = PAGE.read_text(encoding="utf-8").partition("## 10. Keys")[2].splitlines()
ROWS = [line.strip("| ").split(" | ") for line in LINES]
COLUMNS = {row[0].strip("`"): row[1:4] for row in ROWS if len(row) == 5 and row[0].startswith("`")}
"""Key -> default, base and asib_stage, as the page's last section has them."""


def typed(cell: str) -> Any:
    try:
        return float(cell)
    except ValueError:
        return yaml.safe_load(cell)


def column(number: int) -> dict[str, Any]:
    """Key -> value in a column; a dash stands for what is on its left."""
    rows = {key: [cell for cell in cells[: number + 1] if cell != "–"] for key, cells in COLUMNS.items()}
    return {key: typed(cells[-1]) for key, cells in rows.items()}


def refusal(**sections: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(sections)
    return explain(caught.value)


@pytest.mark.parametrize(("number", "cfg"), [(0, None), (1, "base"), (2, "asib_stage")])
def test_the_table_of_keys_has_the_values_that_are_composed(number: int, cfg: str | None) -> None:
    found, told = flatten(compose(cfg)), column(number)
    for key in told.keys() - {"model.teachers"}:
        assert (found[key], type(found[key]) is bool) == (told[key], type(told[key]) is bool), key
    assert {key for key in found if not key.startswith("model.teachers")} | {"model.teachers"} == told.keys()


def test_cifar_networks_are_pretrained_only_by_a_wrong_request() -> None:
    assert not TeacherConfig(name="cifar_resnet20").pretrained
    assert TeacherConfig(name="resnet50").pretrained
    message = refusal(model={"student": {"name": "cifar_resnet8", "pretrained": True}})
    assert message.startswith("model.student.pretrained=true: cifar_resnet8 has no published weights")


@pytest.mark.parametrize("student", ["mobilenet_v2", "mobilenetv2_100", "efficientnet_b0", "shufflenet_v2_x1_0"])
def test_small_students_get_a_width_of_256(student: str) -> None:
    config = Config.model_validate({"model": {"student": {"name": student}}})
    assert (config.method.distill_out_dim, config.method.ib_mbm_out_dim) == (256, 256)
    chosen = Config.model_validate({"model": {"student": {"name": student}}, "method": {"distill_out_dim": 64}})
    assert (chosen.method.distill_out_dim, chosen.method.ib_mbm_out_dim) == (64, 64)


@given(st.floats(0, 100), st.floats(0, 100))
def test_renormalised_weights_sum_to_one_and_stay(ce: float, kd: float) -> None:
    if ce + kd < 1e-6:
        return
    data: dict[str, Any] = {
        "model": {"teachers": [{}, {}]},
        "method": {"ce_alpha": ce, "kd_alpha": kd, "renorm_ce_kd": "true"},
    }
    method = Config.model_validate(data).method
    assert math.isclose(method.ce_alpha + method.kd_alpha, 1, abs_tol=1e-8)
    data["method"] |= {"ce_alpha": method.ce_alpha, "kd_alpha": method.kd_alpha}
    assert Config.model_validate(data).method == method


@pytest.mark.parametrize(
    ("given_as", "kept"),
    [("0.8", 0.8), (0.8, 0.8), (0, 0.0), (1, 1.0), ("avg", "avg"), ("avg-0", "avg"), ("avg - .020", "avg-0.02"),
     ("AVG-0.02", "avg-0.02"), ("avg+1e-2", "avg+0.01")],
)  # fmt: skip
def test_gate_threshold_has_one_spelling(given_as: Any, kept: Any) -> None:
    found = Config.model_validate({"method": {"enable_kd_after_syn_acc": given_as}}).method.enable_kd_after_syn_acc
    assert (found, type(found)) == (kept, type(kept))


@pytest.mark.parametrize(
    "bad", ["bad", "avg-", "avg-2", "80%", 80, "80", -0.1, math.nan, "nan", True, None, "mean-0.1"]
)
def test_gate_threshold_that_means_nothing_is_refused(bad: Any) -> None:
    assert "enable_kd_after_syn_acc" in refusal(method={"enable_kd_after_syn_acc": bad})


# ------------------------------------------------------------------------------------------ messages


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"method": {"tau": "abc"}}, "method.tau: got 'abc'; give a number above 0"),
        ({"method": {"tau": -1}}, "method.tau: got -1; give a number above 0"),
        ({"method": {"tau": True}}, "method.tau: got true; give a number above 0"),
        ({"method": {"tau": math.nan}}, "method.tau: got nan; give a number above 0"),
        ({"method": {"num_stages": 1.5}}, "method.num_stages: got 1.5; give a whole number from 1"),
        ({"method": {"num_stages": True}}, "method.num_stages: got true; give a whole number from 1"),
        ({"method": {"use_ib": "maybe"}}, "method.use_ib: got 'maybe'; give true or false"),
        ({"method": {"kd_alpha": -0.1}}, "method.kd_alpha: got -0.1; give a number from 0"),
        ({"method": {"kd_view": "clear"}},
         "method.kd_view: got 'clear'; give one of clean, mixed (did you mean clean?)"),
        ({"method": {"student_epochs_per_stage": [True]}},
         "method.student_epochs_per_stage: got [true]; give a list of whole numbers from 0"),
        ({"method": {"tau_schedule": [1]}},
         "method.tau_schedule: got [1]; give a list of 2: a number above 0, a number above 0, or null"),
        ({"method": {"teacher_weights": [1, -1]}},
         "method.teacher_weights: got [1,-1]; give equal, or a list of numbers from 0"),
        ({"method": {"synergy_temp_init": math.inf}}, "method.synergy_temp_init: got inf; "
             "give a number from -20 to 20 (it is the logarithm of a temperature)"),
        ({"dataset": {"small_input": "x"}}, "dataset.small_input: got 'x'; give auto, or true or false"),
        ({"method": 3}, "method is a group of keys, got 3; give for example method.name=…"),
        ({"method": {"tua": 1}}, "method.tua: unknown key; did you mean method.tau?"),
        ({"tau": 1}, "tau: unknown key; did you mean method.tau?"),
        ({"optim": {"tau": 1}}, "optim.tau: unknown key; did you mean method.tau?"),
        ({"finetune": {"schedule": {"typ": 1}}},
         "finetune.schedule.typ: unknown key; did you mean finetune.schedule.type?"),
        ({"model": {"teachers": [{"nam": "x"}]}},
         "model.teachers.0.nam: unknown key; did you mean model.teachers.0.name?"),
        ({"model": {"teachers": [{}, {"checkpoint": []}]}},
         "model.teachers.1.checkpoint: got []; give a text, or null"),
        ({"zzzz": 1}, "zzzz: unknown key; --help all lists all keys"),
    ],
)  # fmt: skip
def test_one_line_says_key_value_and_what_would_do(sections: Any, message: str) -> None:
    assert refusal(**sections) == message


def test_at_most_three_problems_are_told() -> None:
    message = refusal(method={"tau": 0, "tau_syn": 0, "num_stages": 0, "cccp_nt": 0})
    assert message.count("give") == 3
    assert message.endswith("; and 1 more")


@pytest.mark.parametrize(
    ("old", "new"),
    [("mbm_out_dim", "method.ib_mbm_out_dim"), ("student_iters", "method.student_epochs_per_stage"),
     ("teacher_iters", "method.teacher_adapt_epochs"), ("student_epochs_schedule", "method.student_epochs_per_stage"),
     ("teacher1_type", "model.teachers.0.name"), ("teacher2_freeze_bn", "method.teacher_freeze_bn"),
     ("cl_mode", "continual"), ("ib_mbm_dropout", "method.synergy_head_dropout"), ("data_aug", "augment.crop_flip"),
     ("train_distill_adapter_only", "method.use_teacher_finetuning"), ("mbm_something", "ib_mbm_"),
     ("small_input", "dataset.small_input")],
)  # fmt: skip
def test_old_names_lead_to_the_new_one(old: str, new: str) -> None:
    assert new in refusal(**{old: 1})
    assert new in refusal(method={old: 1})


def test_a_password_in_the_tracking_uri_is_refused_and_not_shown() -> None:
    message = refusal(tracking={"uri": "postgresql+psycopg://anna:se/cr@t@db:5432/mlflow"})
    assert "tracking.uri holds a password" in message
    assert "cr@t" not in message


def test_every_key_has_words_for_help() -> None:
    for name, field in type(Config().method).model_fields.items():
        assert field.description, name
        assert expects(field) != "a group of keys", name


# ------------------------------------------------------------------------------------------ identity


def changed(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return "other" if value is None or isinstance(value, str) else [*value, 1]


UNCOMPUTED = {"device", "threads", "output_dir", "run_name", "rung", "resume", "extend", "log_model", "debug", "bank",
              "bank_folder", "bank_gb", "register", "student", "dataset.root", "dataset.path", "dataset.download",
              "dataset.id", "dataset.train_split", "dataset.test_split",
              "dataset.eval_batch_size", "dataset.workers", "optim.use_amp", "optim.compile",
              "checkpoint.every_seconds", "checkpoint.keep", "log.level", "log.filename",
              "tracking.uri", "tracking.mode", "tracking.experiment", "tracking.git_diff",
              "tracking.finish_seconds", "tracking.system_metrics",
              "method.plus_alpha", "method.plus_tau",  # nothing is in method.plus
              "model.overlap", "model.overlap_seed", "model.unseen",  # no teacher is taught a part
              *(f"continual.{key}" for key in ContinualConfig.model_fields)}  # one training  # fmt: skip


def test_hash_covers_what_is_computed_and_nothing_else() -> None:
    plain, before = flatten(Config()), config_hash(Config())

    def hash_with(name: str) -> str:
        with mock.patch.object(identity, "flatten", return_value=plain | {name: changed(plain[name])}):
            return config_hash(Config())

    assert {name for name in plain if hash_with(name) == before} == UNCOMPUTED


def test_hash_goes_by_validated_values() -> None:
    def hashed(**method: Any) -> str:
        return config_hash(Config.model_validate({"method": method}))

    assert hashed(tau=4) == hashed(tau=4.0) == hashed(tau="4") == hashed()
    assert hashed(hybrid_beta=-0.0) == hashed(hybrid_beta=0)
    assert hashed(enable_kd_after_syn_acc="0.5") == hashed(enable_kd_after_syn_acc=0.5) != hashed()
    assert hashed(student_epochs_per_stage=(20,)) == hashed(student_epochs_per_stage=[20])


def test_keys_added_later_leave_earlier_hashes_as_they_were() -> None:
    def keys(**dataset: Any) -> set[str]:
        return set(identity.computation(Config.model_validate({"dataset": dataset})))

    assert not keys(normalisation="exact") & set(identity.ONLY_WHERE_SET)
    assert keys(normalisation="published") - keys() == {"dataset.normalisation"}
    assert keys(mean=[0.5] * 3) - keys() == {"dataset.mean"}


def test_hash_leaves_paths_of_teachers_out() -> None:
    def hashed(**teacher: Any) -> str:
        return config_hash(Config.model_validate({"model": {"teachers": [teacher]}}))

    assert hashed(checkpoint="a") == hashed(checkpoint="b") == hashed()
    others: list[dict[str, Any]] = [
        {"name": "resnet18"},
        {"name": "resnet18", "pretrained": False},
        {"efficientnet_dropout": 0.1},
    ]
    assert len({hashed(), *(hashed(**other) for other in others)}) == 4
