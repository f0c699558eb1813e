"""The command line, as people type it and as `mlflow run` passes it, and what --help prints."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.compose.cli import Command, help_text, parse, split_overrides
from pipeline.config.names import known_names
from pipeline.errors import UserError

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        ([], Command()),
        (["cfg=quickstart", "method.kd_alpha=0.5"], Command("quickstart", ("method.kd_alpha=0.5",))),
        (["--cfg", "quickstart"], Command("quickstart")),
        (["--cfg=/a b/c.yaml"], Command("/a b/c.yaml")),
        (["--method.kd_alpha", "0.5", "--method.tau=2"], Command(None, ("method.kd_alpha=0.5", "method.tau=2"))),
        (["--method.student_freeze_level", "-1"], Command(None, ("method.student_freeze_level=-1",))),
        (["--run_name", "my run"], Command(None, ("run_name=my run",))),
        (["--tracking.uri", "http://h?a=b"], Command(None, ("tracking.uri=http://h?a=b",))),
        (["--overrides", "a=1 b=[1, 2]"], Command(None, ("a=1", "b=[1, 2]"))),
        (["overrides=a=1  'c=x y'", "d=2"], Command(None, ("a=1", "c=x y", "d=2"))),
        (["cfg=", "overrides=", "--overrides", "", "resume="], Command()),
        (["method.tau="], Command(None, ("method.tau=",))),
        (["cfg=a", "cfg="], Command("a")),
        (["--help"], Command(help=True)),
        (["cfg=a", "-h"], Command("a", help=True)),
        (["--debug", "a=1"], Command(None, ("debug=true", "a=1"), debug=True)),
        (["--debug", "false"], Command(None, ("debug=false",), debug=False)),
        (["debug=true"], Command(None, ("debug=true",), debug=True)),
        (["overrides=debug=true"], Command(None, ("debug=true",), debug=True)),
        (["+a=1", "++b=2", "~c", "model/teacher=none"], Command(None, ("+a=1", "++b=2", "~c", "model/teacher=none"))),
    ],
)
def test_parse(argv, command):
    assert parse(argv) == command


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quickstart"], "did you mean cfg=quickstart?"),
        (["--resume"], "--resume has no value"),
        (["--resume", "--cfg", "x"], "--resume has no value"),
        (["=3"], "has no key"),
        (["overrides=a=[1"], "a bracket is not closed in 'a=[1'"),
        (["overrides=a='x"], "a quote is not closed"),
        (["overrides=a=1]"], "the brackets do not match"),
    ],
)
def test_parse_refuses(argv, message):
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        ("a=1\tb=2\n c=3", ["a=1", "b=2", "c=3"]),
        ("a='x y' b=\"u v\"", ["a='x y'", 'b="u v"']),
        ("a={b: [1, {c: 2}]} d=e", ["a={b: [1, {c: 2}]}", "d=e"]),
        ("a=it's b=2", ["a=it's", "b=2"]),
        ("a=['x ]', 2] b=1", ["a=['x ]', 2]", "b=1"]),
    ],
)
def test_split_overrides(text, words):
    assert split_overrides(text) == words


def test_help_names_every_key_within_100_columns():
    text = help_text("distill")
    assert max(map(len, text.splitlines())) <= 100
    for name in known_names():
        if not name.startswith("model.teachers.1"):
            assert f" {name} = " in text, name
    assert "python -m steps.distill" in text
    assert "TEACHER_PAIR=t1,t2 STUDENT METHOD SEED" in text
    assert "  method.tau = 4.0 " in text


def test_help_marks_what_a_configuration_changes():
    text = help_text("distill", "quickstart")
    assert "* method.kd_alpha = 0.5  [0.0]" in text
    assert "  method.tau = 4.0 " in text
    assert "* model.teachers.1.name = cifar_wrn_16_1" in text
    assert max(map(len, text.splitlines())) <= 100


def test_help_imports_no_torch():
    code = "import sys, pipeline.compose.cli as c; c.help_text('x', 'quickstart'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
