"""Every number that a user can give has a lowest and a highest value, and the error says why there is no more."""

import contextlib
import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

import pipeline
from pipeline.config import Config, explain, flatten
from pipeline.config.numbers import processes, whole
from pipeline.errors import UserError

ROOT = Path(pipeline.__file__).parents[1]
ABSURD: dict[type, tuple[Any, ...]] = {
    int: (10**30, -(10**30)),
    float: (1e30, -1e30, 10**400, math.inf, -math.inf, math.nan),
}


def models() -> set[type[BaseModel]]:
    """Every pydantic model in the sources, found by reading them."""
    for file in sorted((ROOT / "pipeline").rglob("*.py")):
        if re.search(r"\bpydantic\b|\((Section|Part)\):", file.read_text()):
            importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts))
    found: set[type[BaseModel]] = set()
    waiting = [BaseModel]
    while waiting:
        for model in waiting.pop().__subclasses__():
            waiting.append(model)
            if model.__module__.startswith("pipeline."):
                found.add(model)
    return found


def numbers(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[tuple[type, Any]]:
    """int and float wherever they are in an annotation, each with its own constraints."""
    origin = get_origin(annotation)
    if annotation in (int, float):
        yield annotation, Annotated[(annotation, *metadata)] if metadata else annotation
    elif origin is Annotated:
        inner, *own = get_args(annotation)
        yield from numbers(inner, (*own, *metadata))
    elif origin in (Union, UnionType, tuple, list, dict):
        for argument in get_args(annotation):
            yield from numbers(argument)
    else:
        assert origin in (None, Literal), f"unknown shape: {annotation}"


def test_every_number_of_every_model_has_bounds() -> None:
    seen = 0
    for model in models():
        for name, field in model.model_fields.items():
            for number, leaf in numbers(field.annotation, tuple(field.metadata)):
                seen += 1
                for value in ABSURD[number]:
                    with contextlib.suppress(ValidationError):
                        TypeAdapter(leaf).validate_python(value)
                        for content in (value, [value]):
                            with pytest.raises(ValidationError):  # then a validator of its model refuses it
                                model.model_validate({name: content})
    assert seen > 120


@pytest.mark.parametrize("sign", [1, -1])
def test_an_absurd_number_is_refused_with_its_key_and_what_to_give(sign: int) -> None:
    for key, value in flatten(Config.model_validate({"model": {"teachers": [{}]}})).items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            content: Any = sign * (10**12 + 0.5 if "." in key else 10**30)
            for part in reversed(key.split(".")):
                content = [content] if part == "0" else {part: content}
            with pytest.raises(ValidationError) as refused:
                Config.model_validate(content)
            line = explain(refused.value)
            assert line.isprintable()
            assert key in line
            assert "give" in line or "fraction" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"dataset": {"workers": 100_000}}, "dataset.workers: got 100000; give a whole number from 0 to 1024, or null "
         "(each is a process"),
        ({"method": {"student_epochs_per_stage": [10**9]}}, "twelve days"),
        ({"dataset": {"image_size": 10**5}}, "200 MB"),
        ({"seed": 10**5000}, "seed: got 0x"),
        ({"optim": {"student_lr": float("inf")}}, "optim.student_lr: got inf; give a number above 0"),
    ],
)  # fmt: skip
def test_the_sentence_says_why(content: Any, words: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Config.model_validate(content)
    assert words in explain(refused.value)
    assert len(explain(refused.value)) < 300


@pytest.mark.parametrize("text", ["", "x", "0", "-1", "1.5", "101", "9" * 5000, "١", "1e3", " ", "0x10"])
def test_a_whole_number_of_a_command_line_is_one_or_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^trials=.*: give a whole number from 1 to 100") as refused:
        whole("trials", text, 1, 100, "a reason")
    assert len(str(refused.value)) < 200
    assert whole("trials", " 100 ", 1, 100) == 100


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x"}, "RANK=x in the environment"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 in the environment"),
        ({"RANK": "9" * 5000}, "RANK=999"),
        ({"RANK": "1"}, "RANK=1 with WORLD_SIZE=1"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "numbered from 0"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "h", "MASTER_PORT": "x"}, "MASTER_PORT=x"),
    ],
)
def test_what_the_environment_says_of_processes_is_checked(variables: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        processes(variables)
    assert words in str(refused.value)
    assert str(refused.value).isprintable()


def test_torchrun_s_own_variables_are_taken() -> None:
    assert processes({}) == (0, 1)
    assert processes({"RANK": "", "WORLD_SIZE": ""}) == (0, 1)
    found = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    assert processes(found) == (1, 2)
