"""The recipes of the KD tables against the settings that the field publishes (RepDistiller, mdistiller)."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.ablate import table
from pipeline.compose import cli
from pipeline.compose.compose import Setting, compose, compose_each, params
from pipeline.compose.groups import CONF, names
from pipeline.config import Config, config_hash, flatten, methods
from pipeline.config.methods.base import PROTOCOL
from pipeline.errors import UserError

SCHEDULE = {"type": "step", "milestones": [150, 180, 210], "gamma": 0.1, "lr_warmup_epochs": 0}
RECIPE = {
    "dataset.name": "cifar100", "dataset.batch_size": 64, "dataset.val_fraction": 0.0,
    "method.name": "kd", "method.ce_alpha": 0.1, "method.kd_alpha": 0.9, "method.tau": 4.0,
    "method.num_stages": 1, "method.student_epochs_per_stage": [240],
    "optim.optimizer": "sgd", "optim.momentum": 0.9, "optim.student_lr": 0.05, "optim.student_weight_decay": 5e-4,
    "optim.grad_clip_norm": 0.0, "optim.select_weights": "raw", "optim.ema_decay": None,
    "augment.crop_flip": True, "augment.pad_mode": "zero", "augment.randaugment": False,
    "finetune.epochs": 240, "finetune.optimizer": "sgd", "finetune.lr": 0.05, "finetune.weight_decay": 5e-4,
    "finetune.label_smoothing": 0.0, "finetune.cutmix_alpha": 0.0,
    **{f"schedule.{key}": value for key, value in SCHEDULE.items()},
    **{f"finetune.schedule.{key}": value for key, value in SCHEDULE.items()},
}  # fmt: skip
RATES = {
    "cifar_resnet8x4": 0.05, "cifar_wrn_16_2": 0.05, "cifar_vgg8": 0.05, "resnet18": 0.05, "mobilenet_v2": 0.05,
    "cifar_mobilenetv2_half": 0.01, "mobilenetv2_half": 0.01, "MobileNetV2": 0.01,
    "cifar_shufflenet_v1": 0.01, "cifar_shufflenet_v2": 0.01, "shufflenet_v2": 0.01, "ShuffleV1": 0.01,
}  # fmt: skip
ROWS: dict[str, Any] = yaml.safe_load((CONF / "table/kd_short.yaml").read_text())["methods"]


@pytest.fixture(scope="module")
def recipe() -> Config:
    return compose("kd_cifar100")


def differences(one: Config, other: Config) -> dict[str, Any]:
    """What the second has where it differs from the first."""
    first = flatten(one)
    return {key: value for key, value in flatten(other).items() if first[key] != value}


def test_the_recipe_is_the_published_one(recipe: Config) -> None:
    assert {key: flatten(recipe)[key] for key in RECIPE} == RECIPE


def test_the_one_with_validation_differs_in_the_split_only(recipe: Config) -> None:
    assert differences(recipe, compose("kd_cifar100_val")) == {"dataset.val_fraction": 0.1}


def test_the_short_one_is_the_recipe_stretched_to_30_epochs(recipe: Config) -> None:
    short, falls = compose("kd_short"), [19, 22, 26]
    assert falls == [round(30 * epoch / 240) for epoch in SCHEDULE["milestones"]]  # type: ignore[attr-defined]
    teachers = {"finetune.epochs": 30, "finetune.schedule.milestones": falls}
    assert differences(table.stretched(recipe, 30), short) == teachers


@pytest.mark.parametrize("row", ROWS)
def test_warm_ups_of_the_short_table_are_in_proportion(row: str) -> None:
    file = CONF / f"method/{row}.yaml"
    published = yaml.safe_load(file.read_text()) if file.exists() else {}
    warm_ups = {key: value for key, value in published.items() if key in ("kd_warmup_epochs", "paraphraser_epochs")}
    given = dict(text.removeprefix("method.").split("=") for text in ROWS[row] or [] if text.startswith("method."))
    rows = {key: value for key, value in given.items() if key.endswith("_epochs")}
    assert rows == {key: str(round(value * 30 / 240)) for key, value in warm_ups.items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", [name for name in methods.names() if methods.settings(name).from_teachers])
def test_every_method_goes_with_the_recipe(method: str) -> None:
    several = methods.settings(method).teachers[0] > 1
    teacher = [f"model/teacher={'resnet32x4_wrn_40_2' if several or method == 'asib' else 'resnet32x4'}"]
    found = compose("kd_cifar100_val", [f"method={method}", *teacher])
    of_file = methods.settings(method)(**yaml.safe_load((CONF / f"method/{method}.yaml").read_text()))
    assert found.method == of_file.model_copy(update={"student_epochs_per_stage": (240,)})
    plain = {key: value for key, value in RECIPE.items() if not key.startswith("method.")}
    assert {key: flatten(found)[key] for key in plain} == plain | {"dataset.val_fraction": 0.1}


def test_of_the_cfgs_method_another_one_keeps_the_protocol_only(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    kept = {"num_stages": 2, "student_epochs_per_stage": [20, 10], "ce_label_smoothing": 0.1, "mixup_alpha": 0.2}
    mine = kept | {"kd_view": "mixed", "kd_alpha": 0.7, "tau": 2, "kd_warmup_epochs": 3}
    file.write_text(yaml.safe_dump({"defaults": ["kd_cifar100", "_self_"], "method": mine}))
    method = compose(str(file), ["method=crd", "method.kd_view=mixed"]).method
    assert set(kept) < set(PROTOCOL)
    assert method.model_dump(mode="json", include=set(kept)) == kept
    assert (method.kd_alpha, method.tau, method.kd_warmup_epochs) == (0.8, 0.07, 0)


# ------------------------------------------------------------------------------------------ learning rates by student


def test_the_learning_rate_goes_by_student() -> None:
    def student(name: str) -> Any:
        return lambda composed: [Setting("model.student", {"name": name, "pretrained": False})]

    configs = list(compose_each([student(name) for name in RATES], "kd_cifar100"))
    assert {config.model.student.name: config.optim.student_lr for config in configs} == RATES
    assert {params(config)["optim.student_lr"] for config in configs} == {"0.05", "0.01"}
    assert {config.finetune.lr for config in configs} == {0.05}, "of a teacher, which has its own"


@pytest.mark.parametrize("choice", [["model.student.name=cifar_shufflenet_v2"], ["model/student=shufflenet_v2"]])
def test_an_override_replaces_the_table_and_the_hash_covers_the_value(choice: list[str]) -> None:
    by_table = compose("kd_cifar100", choice)
    told, other = (compose("kd_cifar100", [*choice, f"optim.student_lr={rate}"]) for rate in (0.01, 0.03))
    assert (by_table, config_hash(by_table)) == (told, config_hash(told))
    assert other.optim.student_lr == 0.03
    assert config_hash(other) != config_hash(told)


def test_a_table_in_a_file_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {student_lr: '${by_student:0.1,{cifar_resnet8*: 0.2}}'}\n")
    assert compose(str(file)).optim.student_lr == 0.2
    assert compose(str(file), ["model.student.name=resnet18"]).optim.student_lr == 0.1
    for wrong in ("${by_student:0.1}", "${by_student:0.1,0.2}"):
        file.write_text(f"optim: {{student_lr: '{wrong}'}}\n")
        with pytest.raises(UserError, match=r"by_student|table") as caught:
            compose(str(file))
        assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ tables


@pytest.mark.step  # all cells of all tables are composed
@pytest.mark.parametrize("name", names("table"))
def test_tables_have_the_recipes_rates_for_every_pair(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METHOD", raising=False)
    content = yaml.safe_load((CONF / f"table/{name}.yaml").read_text())
    recipe = compose(content["recipe"])
    own = {"multi_teacher": "alone,aver,stack,asib", "continual": "finetune,lwf", "evidence": "aver,stack,asib_l3d"}
    rows = own.get(name, "alone,kd,crd")
    _, plan = table.read(recipe, cli.Command(own={"table": name, "methods": rows}))
    for cell in plan.cells:
        network = cell.config.model.student.name
        rate = RATES.get(network, 0.05) if content["recipe"].startswith("kd_") else recipe.optim.student_lr
        assert cell.config.optim.student_lr == rate, cell.row
        assert cell.config.method.b_epochs == recipe.method.b_epochs
        assert cell.config.method.distils is (cell.tags["asib.row"] not in ("alone", "finetune"))
    assert len({cell.pair for cell in plan.cells}) == len(content["pairs"])
