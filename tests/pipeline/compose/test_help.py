"""What `--help` prints: a step on one screen, all keys, a group, a configuration's values."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import steps
from pipeline.compose.cli import parse
from pipeline.compose.help import USUAL, step_help
from pipeline.config import Config, methods
from pipeline.config.words import key_names, written
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[3]
STEPS = [module.name for module in pkgutil.iter_modules(steps.__path__) if module.name != "deliver"]


def printed(*argv: str) -> str:
    return step_help("distill", "Distils.", {"own": "a key of the step's own"}, USUAL, parse(["--help", *argv]))


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_explained_on_one_screen(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    step = import_module(f"steps.{name}")
    assert step.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith(f"usage: python -m steps.{name} ")
    assert any(line.startswith(f"  python -m steps.{name} ") for line in lines[2:]), "no example"
    keys = [line.split()[0] for line in lines if line.startswith("  ") and not line.startswith("   ")]
    assert set(step.STEP.keys) | {key.replace(".", ".…") if key.endswith(".") else key for key in step.STEP.own} <= {
        *keys
    }
    assert len(step.STEP.keys) <= 10


@pytest.mark.parametrize("name", STEPS)
def test_what_a_step_names_is_there(name: str) -> None:
    """Jobs are imported late: a misspelt one would be noticed by the run that needs it."""
    step = import_module(f"steps.{name}").STEP
    for target in filter(None, (step.job, step.request, step.act)):
        assert callable(pkgutil.resolve_name(target) if isinstance(target, str) else target)


def test_mlflow_run_knows_every_key_that_a_step_has_of_its_own() -> None:
    """`mlflow run -P key=…` passes keys it does not know too; those of MLproject are listed by the UI."""
    entries = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    for name in set(STEPS) & set(entries):
        own = import_module(f"steps.{name}").STEP.own
        given = set(entries[name]["parameters"]) - {"cfg", "overrides"}
        assert given <= set(own), name


def test_all_names_every_key() -> None:
    text = printed("all")
    assert max(map(len, text.splitlines())) <= 100
    for name in key_names(Config):
        if not name.startswith("model.teachers.1"):
            assert f" {name} = " in text, name
    assert "  own        " in text
    assert "TEACHER_PAIR=t1,t2 STUDENT METHOD SEED" in text


@pytest.mark.parametrize("method", methods.names())
def test_a_method_names_its_keys_with_their_published_values_though_it_has_no_teachers(method: str) -> None:
    """The values are those of conf/method, which states its source."""
    words = printed(f"method={method}").split()
    for key in methods.settings(method).model_fields:
        assert f"method.{key}" in words
    content = yaml.safe_load((ROOT / "conf" / "method" / f"{method}.yaml").read_text())
    for key, value in content.get("method", content).items():
        told = words[words.index(f"method.{key}") + 2]
        assert told == written(value) or float(told) == float(value)


def test_a_method_of_ones_own_names_its_keys_with_the_values_of_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.compose.help.CONF", tmp_path)
    module = "method.module=examples.my_method.my_kd"
    assert "  method.scale = 1.0 " in printed("method=my_kd", module)
    file = tmp_path / "method" / "my_kd.yaml"
    file.parent.mkdir()
    file.write_text("name: my_kd\nmodule: examples.my_method.my_kd\nscale: 2\n")
    assert "* method.scale = 2.0  [1.0]" in printed("method=my_kd")
    file.write_text("name: my_kd\nmodule: examples.my_method.my_kd\nscale: 0\n")
    with pytest.raises(UserError, match=r"my_kd\.yaml: scale: got 0; give a number above 0"):
        printed("method=my_kd")


def test_a_group_is_its_section_alone() -> None:
    text = printed("optim")
    assert text.startswith("optim: ")
    assert {line.split()[0].partition(".")[0] for line in text.splitlines() if " = " in line[:48]} == {"optim"}
    assert printed("method.tau").splitlines() == [
        f"{'  method.tau = 4.0':<48}temperature of distillation (a number above 0)"
    ]


def test_a_configuration_is_shown_with_its_values() -> None:
    for argv in (["cfg=quickstart", "method.tau=3"], ["method", "cfg=quickstart", "method.tau=3"]):
        text = printed(*argv)
        assert "* method.kd_alpha = 0.5  [0.0]" in text
        assert "* method.tau = 3.0  [4.0]" in text
    assert "* model.teachers.1.name = cifar_wrn_16_1" in printed("cfg=quickstart")


def test_an_unknown_topic_is_refused_with_what_there_is() -> None:
    with pytest.raises(
        UserError, match="--help metod: did you mean method\\? give all, a key, or one of dataset, model"
    ):
        printed("metod")
