"""The command line, as people type it and as `mlflow run` passes it."""

import pytest

from pipeline.compose.cli import Command, parse, split_overrides
from pipeline.errors import UserError


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
        (["--help"], Command(help="")),
        (["cfg=a", "-h"], Command("a", help="")),
        (["--help", "method", "cfg=a"], Command("a", help="method")),
        (["--help", "--debug"], Command(None, ("debug=true",), help="", debug=True)),
        (["--debug", "a=1"], Command(None, ("debug=true", "a=1"), debug=True)),
        (["--debug", "false"], Command(None, ("debug=false",), debug=False)),
        (["debug=true"], Command(None, ("debug=true",), debug=True)),
        (["overrides=debug=true"], Command(None, ("debug=true",), debug=True)),
        (["+a=1", "++b=2", "~c", "model/teacher=none"], Command(None, ("+a=1", "++b=2", "~c", "model/teacher=none"))),
    ],
)
def test_parse(argv: list[str], command: Command) -> None:
    assert parse(argv) == command


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quickstart"], "did you mean cfg=quickstart?"),
        (["-m", "seed=1,2"], "-m is Hydra's: several runs are a table, a ladder or a sweep"),
        (["--multirun", "seed=1,2"], "python -m steps.table … seeds=0,1,2"),
        (["--resume"], "--resume has no value"),
        (["--resume", "--cfg", "x"], "--resume has no value"),
        (["=3"], "has no key"),
        (["overrides=a=[1"], "a bracket is not closed in 'a=[1'"),
        (["overrides=a='x"], "a quote is not closed"),
        (["overrides=a=1]"], "the brackets do not match"),
    ],
)
def test_parse_refuses(argv: list[str], message: str) -> None:
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
def test_split_overrides(text: str, words: list[str]) -> None:
    assert split_overrides(text) == words


def test_a_steps_own_keys_are_no_overrides() -> None:
    command = parse(
        ["--rungs", "l1", "gate.alpha=0.1", "a.b=1", "model={student: {}}", "empty="], ["rungs", "gate.", "model"]
    )
    assert command.own == {"rungs": "l1", "gate.alpha": "0.1"}
    assert command.overrides == ("a.b=1", "model={student: {}}")
