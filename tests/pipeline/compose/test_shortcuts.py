"""The environment's shortcuts: what they stand for, what wins over them, and what is refused."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

from pipeline.ablate import table
from pipeline.compose import cli, shortcuts
from pipeline.compose.compose import compose, dump
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.runs.step import configuration

VARIABLES = ("TEACHER_PAIR", "STUDENT", "METHOD", "SEED", "DRY_RUN")
PAIR = "TEACHER_PAIR"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Its `messages` are the lines of the log."""
    caplog.set_level(logging.INFO, "asib")
    return caplog


def composed(environment: dict[str, str], *argv: str) -> Config:
    with pytest.MonkeyPatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        return configuration(cli.parse(argv))


def names(config: Config) -> list[str]:
    return [teacher.name for teacher in config.model.teachers]


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("SEED", "3", "seed=3"),
        ("SEED", " 007 ", "seed=7"),
        ("METHOD", "asib", "method=asib"),
        ("STUDENT", "cifar_resnet20", "model/student=cifar_resnet20"),
        ("STUDENT", "resnet8x4_scratch", "model/student=cifar_resnet8x4"),
        ("STUDENT", "mobilenet_v2", "model/student=mobilenet_v2"),
        ("STUDENT", "resnet18", "model.student.name=resnet18 model.student.pretrained=false"),
        ("STUDENT", "resnet44", "model.student.name=cifar_resnet44 model.student.pretrained=false"),
        (PAIR, "resnet32x4, convnext_tiny", "model.teachers=[cifar_resnet32x4,convnext_tiny]"),
        (PAIR, '"wrn_40_2,wrn_40_2"', "model.teachers=[cifar_wrn_40_2,cifar_wrn_40_2]"),
    ],
)
def test_a_variable_stands_for_overrides(said: pytest.LogCaptureFixture, name: str, value: str, meant: str) -> None:
    found = shortcuts.read({name: value})
    assert said.messages == [f"{meant} (from the environment: {name})"]
    if name == PAIR:
        assert f"model.teachers=[{','.join(found.teachers)}]" == meant
    else:
        assert " ".join(found.overrides) == meant


def test_empty_variables_are_none(said: pytest.LogCaptureFixture) -> None:
    assert shortcuts.read(dict.fromkeys(VARIABLES, " ")) == shortcuts.Shortcuts()
    assert not said.messages


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("SEED", "three", "SEED=three in the environment: give a whole number from 0"),
        ("SEED", "-1", "SEED=-1 in the environment: give a whole number from 0"),
        ("SEED", "1,2", "SEED=1,2 in the environment: give a whole number from 0"),
        ("METHOD", "ASIP", "METHOD=ASIP in the environment: no such method; did you mean asib?"),
        (
            "METHOD",
            "kd,crd",
            "a run has one method; compare several with -e table (python -m steps.table methods=kd,crd)",
        ),
        ("METHOD", "kd  crd at", "(python -m steps.table methods=kd,crd,at)"),
        ("STUDENT", "cifar_resnet9x4", "no network is called cifar_resnet9x4; did you mean cifar_resnet8x4?"),
        ("STUDENT", "resnt8x4", "no network is called resnt8x4; did you mean cifar_resnet8x4?"),
        ("STUDENT", "?", "no network is called ?; give a timm classifier or a cifar_* network"),
        (PAIR, "cifar_resnet56", "TEACHER_PAIR=cifar_resnet56 in the environment: give two networks"),
        (PAIR, "resnet20,resnet56,vgg8", "in the environment: give two networks"),
        (PAIR, "cifar_resnet56,", "in the environment: give two networks"),
        (PAIR, "resnet56,cifar_wrn_40_3", "no network is called cifar_wrn_40_3; did you mean cifar_wrn_40_"),
    ],
)
def test_a_value_that_does_not_do_is_refused(name: str, value: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        shortcuts.read({name: value})
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{name}={value} in the environment: ")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------ the rows of a table


def rows_of_a_table(environment: dict[str, str], **own: str) -> list[str]:
    """The methods that `-e table` would train."""
    with pytest.MonkeyPatch.context() as patched:
        for name, value in environment.items():
            patched.setenv(name, value)
        command = cli.Command(own=own)
        _, plan = table.read(configuration(command, table.OWN), command)
    return list(dict.fromkeys(cell.tags["asib.row"] for cell in plan.cells))


@pytest.mark.parametrize("value", ["kd,alone,crd", "[kd, alone, crd]", " kd alone  crd "])
def test_METHOD_gives_the_rows_of_a_table(said: pytest.LogCaptureFixture, value: str) -> None:
    assert rows_of_a_table({"METHOD": value}) == ["kd", "alone", "crd"]
    assert set(said.messages) == {"methods=kd,alone,crd (from the environment: METHOD)"}


def test_methods_given_win_over_METHOD(said: pytest.LogCaptureFixture) -> None:
    assert rows_of_a_table({"METHOD": "kd,crd"}, methods="kd,at") == ["kd", "at"]
    assert set(said.messages) == {"METHOD=kd,crd in the environment is ignored: methods is given"}
    assert len(rows_of_a_table({})) == 5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("kd,crx", "METHOD=crx: not in this table; did you mean crd?"),
        ("crd", "table.baseline=kd: no row of this table"),
    ],
)
def test_METHOD_that_the_table_does_not_have_is_refused(value: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        rows_of_a_table({"METHOD": value})


# ------------------------------------------------------------------------------------------ what wins


def test_shortcuts_win_over_the_file_and_overrides_over_shortcuts(tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("defaults: [quickstart]\nseed: 9\nmodel: {student: {name: resnet18, pretrained: true}}\n")
    environment = {"SEED": "3", "STUDENT": "cifar_resnet20", PAIR: "resnet32x4,wrn_40_2", "METHOD": "asib"}
    config = composed(environment, f"cfg={file}")
    assert (config.seed, config.model.student.name, config.model.student.pretrained) == (3, "cifar_resnet20", False)
    assert (names(config), config.method.name) == (["cifar_resnet32x4", "cifar_wrn_40_2"], "asib")
    assert config.method.kd_alpha == 0.5  # of quickstart
    explicit = ["seed=5", "model.student.name=resnet34", "model/teacher=quickstart_pair", "method.name=asib"]
    config = composed(environment, f"cfg={file}", *explicit)
    assert (config.seed, config.model.student.name) == (5, "resnet34")
    assert names(config) == ["cifar_resnet20", "cifar_wrn_16_1"]


@pytest.mark.parametrize(
    ("name", "value", "override", "key"),
    [
        ("SEED", "3", "seed=5", "seed"),
        ("SEED", "no number", "++seed=5", "seed"),
        ("STUDENT", "resnet18", "model/student=cifar_resnet20", "model/student"),
        ("STUDENT", "resnet18", "model={student: {name: cifar_resnet20}}", "model.student.name"),
        (PAIR, "resnet20,resnet20", "model.teachers=[]", "model.teachers"),
        (PAIR, "resnet20,resnet20", "~model/teacher", "model/teacher"),
        ("METHOD", "asib", "method={name: asib}", "method.name"),
    ],
)
def test_an_override_of_the_same_key_counts(
    said: pytest.LogCaptureFixture, name: str, value: str, override: str, key: str
) -> None:
    assert shortcuts.read({name: value}, [override]) == shortcuts.Shortcuts()
    assert said.messages == [f"{name}={value} in the environment is ignored: {key} is given"]


def test_overrides_of_other_keys_stand_beside_a_shortcut() -> None:
    config = composed({"SEED": "3", "STUDENT": "resnet18"}, "finetune.seed=5", "model.student.pretrained=true")
    assert (config.seed, config.finetune.seed) == (3, 5)
    assert (config.model.student.name, config.model.student.pretrained) == ("resnet18", True)


def test_STUDENT_is_not_the_key_student() -> None:
    config = composed({"STUDENT": "cifar_resnet20"}, "cfg=quickstart", "student=runs:/ab")
    assert (config.student, config.model.student.name) == ("runs:/ab", "cifar_resnet20")
    assert composed({"STUDENT": "cifar_resnet20"}).student is None
    assert composed({"student": "cifar_resnet20"}) == composed({})


# ------------------------------------------------------------------------------------------ the pair


def test_a_pair_where_there_were_no_teachers(said: pytest.LogCaptureFixture) -> None:
    config = composed({PAIR: "resnet20,resnet50"}, "method.kd_alpha=0.5", "model.teachers.0.checkpoint=x.pt")
    first, second = config.model.teachers
    assert (first.name, first.pretrained, first.checkpoint) == ("cifar_resnet20", False, "x.pt")
    assert (second.name, second.pretrained, second.checkpoint) == ("resnet50", True, None)
    config = composed({PAIR: "resnet20,resnet50"}, "cfg=quickstart", "model.teachers.1.name=cifar_vgg8",
                      "model.teachers.1.pretrained=false")  # fmt: skip
    assert names(config) == ["cifar_resnet20", "cifar_vgg8"]
    assert said.messages[-1].endswith("(from the environment: TEACHER_PAIR; model.teachers.1.name is given)")


def test_what_is_said_of_teachers_stays(said: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text(
        "model:\n  teachers:\n"
        "    - {name: resnet18, pretrained: false, checkpoint: a.pt}\n"
        "    - {name: efficientnet_b0, pretrained: true, checkpoint: b.pt, efficientnet_dropout: 0.1}\n"
        "    - {name: cifar_resnet56, pretrained: false, checkpoint: c.pt}\n"
    )

    def pair(value: str) -> list[tuple[str, bool, str | None, float]]:
        found = composed({PAIR: value}, f"cfg={file}").model.teachers
        return [(t.name, t.pretrained, t.checkpoint, t.efficientnet_dropout) for t in found]

    # the same networks, in another order or spelling, are the same teachers
    assert pair("resnet56,resnet18") == [("cifar_resnet56", False, "c.pt", 0.3), ("resnet18", False, "a.pt", 0.3)]
    assert said.messages[-1] == "checkpoint b.pt of efficientnet_b0 is left out"
    # others take over what does not depend on the network; no weights are published for cifar_*
    assert pair("resnet34,efficientnet_b1") == [("resnet34", False, None, 0.3), ("efficientnet_b1", True, None, 0.1)]
    assert pair("shufflenet_v2,wrn_16_2") == [("shufflenet_v2", False, None, 0.3), ("cifar_wrn_16_2", False, None, 0.1)]


@pytest.mark.parametrize(("value", "wants"), [("1", True), ("true", True), ("", False), ("off", False), (None, False)])
def test_dry_run_is_yes_or_no(value: str | None, wants: bool) -> None:
    assert shortcuts.wants_dry_run({} if value is None else {"DRY_RUN": value}) is wants


@pytest.mark.parametrize(
    ("file", "overrides", "experiment"),
    [
        ("{}", [], "from the shell"),
        ("tracking: {mode: offline}", [], "from the shell"),
        ("tracking: {experiment: of the file}", [], "of the file"),
        ("tracking: {experiment: of the file}", ["tracking.experiment=typed"], "typed"),
        ("{}", ["tracking.experiment=asib"], "asib"),
    ],
)
def test_mlflows_variable_names_the_experiment(
    tmp_path: Path, file: str, overrides: list[str], experiment: str
) -> None:
    (tmp_path / "mine.yaml").write_text(file)
    found = shortcuts.read({"MLFLOW_EXPERIMENT_NAME": "from the shell"}, overrides)
    config = compose(str(tmp_path / "mine.yaml"), [*found.overrides, *overrides], None, found.presets)
    assert config.tracking.experiment == experiment


def test_what_a_run_records_is_what_it_does_whatever_the_shell_says_then(tmp_path: Path) -> None:
    config = compose("quickstart", ["tracking.experiment=typed"])
    (tmp_path / "config.yaml").write_text(dump(config))
    later = shortcuts.read({"MLFLOW_EXPERIMENT_NAME": "x"})
    assert compose(str(tmp_path / "config.yaml"), [], None, later.presets) == config


def test_teachers_are_named_in_a_list(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "asib")
    overrides = shortcuts.named_teachers(["seed=1", "model.teachers=[resnet56, wrn_40_2,mobilenetv3_small_050]"])
    teachers = compose("quickstart", overrides).model.teachers
    assert [(t.name, t.pretrained, t.checkpoint) for t in teachers] == [
        ("cifar_resnet56", False, None),
        ("cifar_wrn_40_2", False, None),
        ("mobilenetv3_small_050", True, None),
    ]
    assert caplog.messages == ["teachers: cifar_resnet56, cifar_wrn_40_2, mobilenetv3_small_050 (pretrained)"]
    spelt_out = "model.teachers=[{name: cifar_resnet56, checkpoint: x.pt}]"
    assert shortcuts.named_teachers([spelt_out, "model.teachers=[]"]) == [spelt_out, "model.teachers=[]"]
    with pytest.raises(UserError, match=r"model.teachers=\[wrn_402\]: no network .*did you mean cifar_wrn_40_2\?"):
        shortcuts.named_teachers(["model.teachers=[wrn_402]"])
