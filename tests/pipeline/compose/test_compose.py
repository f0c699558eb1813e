"""Composition: groups, files from anywhere, overrides of every form, one-line errors, round trips."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from pipeline.compose.compose import Setting, compose, dump, keys_of, params
from pipeline.compose.groups import CONF, groups
from pipeline.config import Config, config_hash, flatten
from pipeline.errors import UserError


def refusal(cfg: str | None = None, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        compose(cfg, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_defaults_are_the_schema() -> None:
    composed, plain = flatten(compose()), flatten(Config())
    assert {k: v for k, v in composed.items() if plain.get(k) != v} == {}


@pytest.mark.step  # Hydra composes every option of conf/
@pytest.mark.parametrize("group", [g for g in groups() if g not in ("experiment", "sweep", "cluster")])
def test_options_of_a_group_set_the_same_keys(group: str) -> None:
    """Otherwise choosing one over a file that has taken another would leave some of it behind."""

    def keys(option: str) -> set[object]:
        return set(OmegaConf.load(CONF / group / f"{option}.yaml"))

    first, *others = groups()[group]
    if group != "method":
        for option in others:
            assert keys(option) == keys(first), option
    for option in groups()[group]:
        extra = ["dataset.path=x.npz"] if option == "npz" else []
        extra += ["dataset.id=folder/"] if option == "timm" else []
        extra += ["dataset.class_list=cmc"] if option == "imagenet100" else []
        extra += ["method.student_epochs_per_stage=[240]"] if option == "step" else []
        extra += ["model.teachers=[{name: cifar_resnet20}]", "continual.num_tasks=2"] if group == "method" else []
        extra += ["continual.buffer_size=9"] if option == "der" else []
        compose(None, [f"{group}={option}", *extra])


# ------------------------------------------------------------------------------------------ overrides


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("method.kd_alpha=0.25", "method.kd_alpha", 0.25),
        ("++method.kd_alpha=0.25", "method.kd_alpha", 0.25),
        ("+seed=3", "seed", 3),
        ("method.ib_beta=1e-3", "method.ib_beta", 1e-3),
        ("method.student_freeze_level=-1", "method.student_freeze_level", -1),
        ("method.student_epochs_per_stage=[6, 7, 8, 9]", "method.student_epochs_per_stage", [6, 7, 8, 9]),
        ("method.student_epochs_per_stage.1=9", "method.student_epochs_per_stage", [3, 9, 3, 3]),
        ("method.beta_schedule=[0,1e-3,4]", "method.beta_schedule", [0, 1e-3, 4]),
        ("threads=null", "threads", None),
        ("~dataset.batch_size", "dataset.batch_size", 128),
        ("schedule.min_lr=${finetune.lr}", "schedule.min_lr", 3e-3),
        ("tracking=offline", "tracking.mode", "offline"),
        ("+tracking=offline", "tracking.mode", "offline"),
        ("dataset=cifar100", "dataset.name", "cifar100"),
        ("optim=sgd", "optim.student_lr", 0.05),
        ("model/student=cifar_resnet20", "model.student.name", "cifar_resnet20"),
        ("model/teacher=resnet32x4_wrn_40_2", "model.teachers.1.name", "cifar_wrn_40_2"),
        ("schedule={type: step, milestones: [3]}", "schedule.milestones", [3]),
        ("model.teachers.0.checkpoint=/a b/it's=x,y#.pt", "model.teachers.0.checkpoint", "/a b/it's=x,y#.pt"),
        ("model.teachers[1].checkpoint=runs:/ab/x", "model.teachers.1.checkpoint", "runs:/ab/x"),
        ("run_name=my run (2)", "run_name", "my run (2)"),
        ("run_name='quoted run'", "run_name", "quoted run"),
        ("run_name=12e4567", "run_name", "12e4567"),
        ("run_name=007", "run_name", "007"),
        ("run_name=true", "run_name", "true"),
        ("run_name=null", "run_name", None),
        ("run_name='null'", "run_name", "null"),
        ("run_name=a,b", "run_name", "a,b"),
        ("tracking.uri=postgresql+psycopg://u@h:1/db?x=1", "tracking.uri", "postgresql+psycopg://u@h:1/db?x=1"),
    ],
)
def test_override(override: str, key: str, value: Any) -> None:
    assert flatten(compose("quickstart", [override]))[key] == value


def test_the_last_override_wins_and_a_list_item_follows_its_list() -> None:
    config = compose(None, ["method.tau=2", "model/teacher=quickstart_pair", "model.teachers.1.name=resnet18",
                            "method.tau=3"])  # fmt: skip
    assert config.method.tau == 3
    assert [t.name for t in config.model.teachers] == ["cifar_resnet20", "resnet18"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.kd_alhpa=1", "method.kd_alhpa: unknown key; did you mean method.kd_alpha?"),
        ("kd_alpha=1", "kd_alpha: unknown key; did you mean method.kd_alpha?"),
        ("~method.kd_alhpa", "did you mean method.kd_alpha?"),
        ("method.tau.x=3", "did you mean method.tau?"),
        ("teacher_iters=3", "teacher_iters: this key is now method.teacher_adapt_epochs"),
        ("method.tau=abc", "method.tau: got 'abc'; give a number above 0"),
        ("method.tau=", "method.tau: got ''; give a number above 0"),
        (
            "epochs=5",
            "epochs: unknown key; give method.student_epochs_per_stage=[…] (the student's) or finetune.epochs",
        ),
        ("lr=0.1", "lr: unknown key; give optim.student_lr (the student's) or finetune.lr"),
        ("seed=0,1,2", "seed=0,1,2: several runs; a step that makes them takes seeds=0,1,2: table, ablate, sweep"),
        ("method.tau=1,2", "several values; a list is written method.tau=[…]"),
        ("method.student_epochs_per_stage=[6,", "the brackets or quotes of this value do not match"),
        ("method.tau=${method.nope}", "method.nope"),
        ("dataset=cifar1000", "dataset=cifar1000: no such option; did you mean cifar100?"),
        ("model/techer=none", "model/techer: no such group; did you mean model/teacher?"),
        ("~optim", "optim cannot be left out"),
        ("dataset@x=cifar10", "packages (@)"),
        ("foo", "'foo' is not an override: write key=value"),
        ("experiment=base", "experiment=base and cfg=quickstart name the same thing"),
        ("model.teachers.2.name=x", "model.teachers has 2 entries, numbered from 0"),
        ("schedule.milestones.0=2", "schedule.milestones has 0 entries"),
        ("method.synergy_eval_teacher_indices.0=1", "there is no list yet"),
        ("checkpoint=3", "checkpoint is a group of keys, got 3"),
    ],
)
def test_override_that_is_refused(override: str, message: str) -> None:
    assert message in refusal("quickstart", override)


def is_literal(text: str) -> bool:
    return not (text.startswith(("'", '"', "[", "{")) or text.lower() == "null" or "${" in text or "\\" in text)


texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=20)


@settings(deadline=None, max_examples=3)
@given(st.lists(texts.map(str.strip).filter(bool).filter(is_literal), min_size=5, max_size=5))
def test_any_text_survives_override_and_dump(tmp_path_factory: pytest.TempPathFactory, given: list[str]) -> None:
    keys = ("run_name", "rung", "resume", "student", "dataset.path")
    config = compose(None, [f"{key}={text}" for key, text in zip(keys, given, strict=True)])
    assert [flatten(config)[key] for key in keys] == given
    file = tmp_path_factory.mktemp("dump") / "config.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert compose(str(file)) == config


@settings(deadline=None, max_examples=5)
@given(st.floats(1e-9, 1e6), st.lists(st.integers(1, 300), min_size=1, max_size=4), st.booleans())
def test_any_number_survives_override_and_params(tau: float, epochs: list[int], flag: bool) -> None:
    config = compose(None, [f"method.tau={tau}", f"method.student_epochs_per_stage={epochs}",
                            f"method.num_stages={len(epochs)}", f"method.learnable_q={flag}"])  # fmt: skip
    assert (config.method.tau, list(config.method.student_epochs_per_stage)) == (tau, epochs)
    assert config.method.learnable_q is flag
    again = compose(None, [f"{k}={v}" for k, v in params(config).items()])
    assert again == config


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("++method.kd_alpha=1", {"method.kd_alpha"}),
        ("~seed", {"seed"}),
        ("optim=sgd", {"optim"}),
        ("~model/teacher", {"model/teacher"}),
        ("model.teachers[1].name=x", {"model.teachers.1.name"}),
        ("model={student: {name: a, pretrained: true}, teachers: []}",
         {"model.student.name", "model.student.pretrained", "model.teachers"}),
    ],
)  # fmt: skip
def test_keys_of(override: str, keys: set[str]) -> None:
    assert keys_of([override]) == keys


def test_presets_win_over_the_file_and_lose_to_overrides() -> None:
    def presets(composed: DictConfig) -> list[Setting]:
        return [Setting("seed", composed.finetune.epochs), Setting("method.tau", 9)]

    config = compose("quickstart", ["method.tau=2"], presets=presets)
    assert (config.seed, config.method.tau) == (compose("quickstart").finetune.epochs, 2)


# ------------------------------------------------------------------------------------------ files


def write(folder: Path, text: str, name: str = "my.yaml") -> str:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_a_file_anywhere_holds_changes(tmp_path: Path) -> None:
    config = compose(write(tmp_path / "a folder's", "method: {tau: 2}\nseed: 5\nfinetune:\n"))
    assert (config.method.tau, config.seed, config.finetune.epochs) == (2, 5, 20)


@pytest.mark.parametrize("header", ["", "# @package _global_\n"])
def test_a_file_anywhere_may_have_defaults(tmp_path: Path, header: str) -> None:
    text = header + "defaults:\n  - quickstart\n  - sibling\n  - _self_\n  - override /optim: sgd\nseed: 7\n"
    write(tmp_path, header + "rung: beside\n", "sibling.yaml")
    config = compose(write(tmp_path, text))
    assert (config.seed, config.rung, config.optim.optimizer) == (7, "beside", "sgd")
    assert config.model.student.name == "cifar_resnet8"


@pytest.mark.parametrize(
    "text", ["a${b}", "\\${x}", "12e4567", "???", "null", "1_000", "07", "yes", "~", "ü 漢", "a\\"]
)
def test_dump_composes_back(tmp_path: Path, text: str) -> None:
    config = Config.model_validate({**compose("quickstart").model_dump(), "run_name": text})
    again = compose(write(tmp_path, dump(config), "best.yaml"))
    assert again == config
    assert config_hash(again) == config_hash(config)


def test_what_is_chosen_wins_over_a_dumped_configuration(tmp_path: Path) -> None:
    file = write(tmp_path, dump(compose("quickstart", ["optim=sgd"])))
    config = compose(file, ["dataset=cifar10", "optim=adamw", "model/student=cifar_resnet20", "method.tau=2"])
    assert (config.dataset.name, config.optim.optimizer, config.optim.student_lr) == ("cifar10", "adamw", 1e-3)
    assert (config.model.student.name, config.method.tau) == ("cifar_resnet20", 2)
    assert config.finetune.epochs == compose("quickstart").finetune.epochs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [1\n", "not valid YAML in line"),
        (b"\xff\xfe\x00\x01", "not valid YAML"),
        ("method: {tau: 1}\nmethod: {tau: 2}\n", "not valid YAML"),
        ("- 1\n", "holds a list"),
        ("3\n", "single value"),
        ("defaults:\n  - override /dataset: cifar1000\n", "cifar1000"),
        ("method: {tau: '${nope}'}\n", "'nope' not found"),
        ("method: {kd_alhpa: 1}\n", "did you mean method.kd_alpha?"),
    ],
)
def test_a_file_that_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    (tmp_path / "my.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refusal(str(tmp_path / "my.yaml"))


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert compose(write(tmp_path, "")) == Config()


def test_names_of_files_that_do_not_exist(tmp_path: Path) -> None:
    write(tmp_path, "seed: 1\n")
    assert "did you mean quickstart?" in refusal("quikstart")
    assert f"did you mean {tmp_path}/my.yaml?" in refusal(str(tmp_path / "mi.yaml"))
    assert "is a folder" in refusal(str(tmp_path))
    assert "tracking server" in refusal("runs:/abc/best.yaml")


def test_a_run_file_is_fetched(tmp_path: Path) -> None:
    file = Path(write(tmp_path, "seed: 9\n"))
    assert compose("runs:/abc/best.yaml", [], fetch=lambda uri: file).seed == 9


def test_params_are_written_as_overrides() -> None:
    found = params(compose("quickstart"))
    assert found["method.student_epochs_per_stage"] == "[3,3,3,3]"
    assert (found["resume"], found["method.use_ib"], found["method.tau"]) == ("null", "true", "4.0")
