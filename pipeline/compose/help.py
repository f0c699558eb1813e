"""The text of `--help`: a step on one screen, or all keys, or a group of them.

Imports neither torch nor MLflow: `--help` answers at once.
"""

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from pipeline.compose.cli import Command
from pipeline.compose.groups import CONF, groups
from pipeline.compose.settings import parse_data
from pipeline.config import Config, methods, schema
from pipeline.config.continual import ContinualConfig
from pipeline.config.words import expects, explain, is_list_of_sections, is_text, section_of, suggestion, written
from pipeline.errors import UserError

WIDTH = 100
COLUMN = 48
"""The column where a key's description begins."""
USUAL = (
    "model.student.name",
    "dataset.name",
    "dataset.root",
    "method.kd_alpha",
    "method.tau",
    "method.student_epochs_per_stage",
    "optim.student_lr",
    "seed",
    "output_dir",
    "resume",
)
"""Keys that matter most to a step that trains."""
WHERE = ("tracking.uri", "tracking.experiment")
ELSEWHERE = ("device", "output_dir", "run_name", *WHERE)
"""The same for steps that train nothing."""
ALL = "all"


class Key(NamedTuple):
    """A key of the configuration with its value, or a section's heading (no field)."""

    name: str
    field: Any
    value: Any
    words: str


def step_help(step: str, about: str, own: Mapping[str, str], keys: Sequence[str], command: Command) -> str:
    """What `--help` prints, in 100 columns.

    Without a topic: what the step does, its own keys and the most important others, on one screen. With `all`, a group
    or a key (`--help method`, `--help tracking.uri`) or a configuration: the keys with types, defaults and, given a
    configuration, its values. Raises UserError: the topic is neither a group nor a key, or the configuration is wrong.

    Args:
        about: the docstring of the step's file.
        own: the step's own keys, with words.
        keys: keys of the configuration that matter most here.
    """
    config, topic = None, command.help
    given = dict(text.partition("=")[::2] for text in command.overrides)
    if not command.cfg and "method" in given and given.keys() <= {"method", "method.module"}:
        config, topic = _of_method(given["method"], given.get("method.module")), topic or "method"
    elif command.cfg or command.overrides:
        from pipeline.compose.compose import compose

        config, topic = compose(command.cfg, command.overrides), topic or ALL
    if not topic:
        return _screen(step, about, own, keys)
    every = list(_keys(config or Config()))
    found = [key for key in every if topic == ALL or f"{key.name}.".startswith(f"{topic}.")]
    if not found:
        hint = suggestion(topic, [ALL, *(key.name for key in every)])
        sections = ", ".join(name for name, field in Config.model_fields.items() if section_of(field))
        raise UserError(f"--help {topic}: {hint}give all, a key, or one of {sections}")
    lines = _introduction(step, own) if topic == ALL else []
    if config is not None:
        of = f"cfg={command.cfg}" if command.cfg else "these overrides"
        lines += [f"Values with {of}; * differs from the default, which follows it in brackets.", ""]
    for key in found:
        lines += _described(key)
    return "\n".join(lines).strip("\n") + "\n"


def _of_method(name: str, module: str | None = None) -> Config:
    """The defaults with a method and the values of its file; not validated as a whole, since it may need teachers.

    Raises UserError: no such method, or a key of its file is wrong.
    """
    file = CONF / "method" / f"{name}.yaml"
    said: Any = (parse_data(file.read_text(), f"method={name}") if file.exists() else None) or {}
    values = said.get("method", said)  # with keys of other sections beside it, or alone
    values = {"name": name, **values} | ({"module": module} if module else {})
    settings = methods.settings(values["name"], values.get("module"))
    try:
        method = settings.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{file}: {explain(error, settings)}") from error
    continual = ContinualConfig(**said.get("continual", {}))
    return schema(values["name"], values.get("module")).model_construct(method=method, continual=continual)


def _usage(step: str) -> str:
    return f"usage: python -m steps.{step} [cfg=<name or file>] [key=value …] [--debug] [--help [<topic>]]"


def _screen(step: str, about: str, own: Mapping[str, str], keys: Sequence[str]) -> str:
    every = {key.name: key for key in _keys(Config())}
    lines = [
        _usage(step),
        "",
        *("  " * line.startswith("python ") + line for line in map(str.strip, about.strip().splitlines())),
        "",
        *_own_help(own),
    ]
    if keys:
        lines += ["Often given, with their defaults:"]
        for name in keys:
            key = every[name]
            left = f"  {name} = {written(key.value)}"
            line = f"{left:<{COLUMN}}{key.words}"
            lines.append(line if len(line) <= WIDTH else line[: WIDTH - 2].rpartition(" ")[0] + " …")
        lines += [""]
    lines += [
        "--help all           every key, and the groups        --help method          the keys of a group",
        "--help cfg=<name>    every key, with its value there   --help tracking.uri    one key",
    ]
    return "\n".join(lines) + "\n"


def _introduction(step: str, own: Mapping[str, str]) -> list[str]:
    lines = [
        _usage(step),
        f"       mlflow run . -e {step} [-P cfg=<name or file>] [-P key=value …] [-P overrides='a=1 b=[1,2]']",
        "",
        "cfg names a file of conf/experiment, or any YAML file. A key may also be written --key value.",
        "Items of lists by number: model.teachers.0.checkpoint=<file>.",
        "Environment: TEACHER_PAIR=t1,t2 STUDENT METHOD SEED are overrides; DRY_RUN=1 shows the plan.",
        "",
        *_own_help(own),
        "Groups (group=option):",
    ]
    for group, options in groups().items():
        name = "cfg" if group == "experiment" else group
        lines += textwrap.wrap(" ".join(options), WIDTH, initial_indent=f"  {name:<16}", subsequent_indent=" " * 18)
    return [*lines, ""]


def _own_help(own: Mapping[str, str]) -> list[str]:
    lines = ["Keys of this step:"] if own else []
    for key, words in own.items():
        left = f"  {key}{'…' if key.endswith('.') else ''}"
        lines += textwrap.wrap(words, WIDTH, initial_indent=f"{left:<13} ", subsequent_indent=" " * 14)
    return [*lines, ""] if own else []


def _keys(section: BaseModel, prefix: str = "") -> Iterator[Key]:
    """Every key with its value, and headings of sections."""
    for name, field in type(section).model_fields.items():
        inner, value = section_of(field), getattr(section, name)
        if inner is None:
            yield Key(prefix + name, field, value, field.description or "")
        elif is_list_of_sections(field):
            yield Key(prefix + name, None, None, field.description or "")
            for i, item in enumerate(value or [inner.model_construct()]):
                yield from _keys(item, f"{prefix}{name}.{i}.")
        else:
            if not prefix:
                yield Key(name, None, None, " ".join((inner.__doc__ or "").split()))
            yield from _keys(value, f"{prefix}{name}.")


def _described(key: Key) -> list[str]:
    """Key and value in the left column, the description in the right one."""
    name, field, value, words = key
    if field is None:
        top = "." not in name
        return [""] * top + textwrap.wrap(f"{name}: {words}", WIDTH, initial_indent="" if top else "  ")
    differs = value != field.default
    left = f"{'*' if differs else ' '} {name} = {written(value)}" + (f"  [{written(field.default)}]" if differs else "")
    words += "" if is_text(field) else f" ({expects(field)})"
    if len(left) < COLUMN - 1:
        return textwrap.wrap(words, WIDTH, initial_indent=f"{left:<{COLUMN}}", subsequent_indent=" " * COLUMN)
    head = textwrap.wrap(left, WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False)
    return head + textwrap.wrap(words, WIDTH, initial_indent=" " * COLUMN, subsequent_indent=" " * COLUMN)
