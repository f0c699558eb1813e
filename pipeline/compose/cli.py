"""The command line of the steps, as people type it and as `mlflow run` passes it, and the text of `--help`.

Imports neither torch nor MLflow: `--help` answers at once.
"""

import os
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from pipeline.compose.groups import groups
from pipeline.config import Config
from pipeline.config.describe import expects, is_list_of_sections, is_text, section_of, written
from pipeline.config.names import suggestion
from pipeline.config.numbers import processes
from pipeline.errors import UserError
from pipeline.paths import is_plain, printable

WIDTH = 100
TRUE = ("true", "1", "yes", "on")
FALSE = ("false", "0", "no", "off")
_BRACKETS = {"]": "[", "}": "{", ")": "("}


@dataclass(frozen=True)
class Command:
    """A parsed command line; `overrides` in the given order, for `compose`."""

    cfg: str | None = None
    overrides: tuple[str, ...] = ()
    help: bool = False
    debug: bool = False


def parse(argv: Sequence[str]) -> Command:
    """Read `cfg=x a.b=1`, `--cfg x --a.b 1`, `--a.b=1`, `overrides="a=1 b=[1,2]"`, `--debug`, `--help`.

    Empty values of `cfg`, `overrides` and keys without a dot are parameters that `mlflow run` passes unset: ignored.

    Raises:
        UserError: an argument that is neither a flag nor key=value.
    """
    cfg: str | None = None
    overrides: list[str] = []
    wants_help = False
    for argument in argv:
        if not is_plain(argument):
            key = argument.removeprefix("--").partition("=")[0]
            raise UserError(
                f"{printable(argument)}: this value of {printable(key)} holds control characters, or is not valid "
                "UTF-8; give a plain text (rename a file with such a name)"
            )
    for key, value in _pairs(list(argv)):
        if key == "help":
            wants_help = True
        elif key == "cfg":
            cfg = value.strip() or cfg
        elif key == "overrides":
            overrides += split_overrides(value)
        elif key.startswith("~") and not value:
            overrides.append(key)
        elif value.strip() or "." in key:
            overrides.append(f"{key}={value}")
    return Command(cfg, tuple(overrides), wants_help, _debug(overrides))


def take(argv: Sequence[str], own: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """A step's own keys, which the schema does not know, and the other arguments.

    Args:
        own: keys, and prefixes of keys that end with a dot.

    Example:
        >>> take(["--rungs", "ladder", "cfg=quickstart", "method.tau=2"], ["rungs"])
        ({'rungs': 'ladder'}, ['cfg=quickstart', 'method.tau=2'])

    Raises:
        UserError: as `parse`.
    """
    command = parse(argv)
    prefixes = tuple(key for key in own if key.endswith("."))
    pairs = [(text, *text.partition("=")[::2]) for text in command.overrides]
    mine = [key in own or key.startswith(prefixes) for _, key, _ in pairs]
    rest = [text for (text, _, _), taken in zip(pairs, mine, strict=True) if not taken]
    taken = {k: v.strip().strip("'\"") for (_, k, v), taken in zip(pairs, mine, strict=True) if taken}
    first = [f"cfg={command.cfg}"] if command.cfg else []
    return taken, [*first, *rest, *["--help"] * command.help]


def _pairs(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Key and value of each argument, whichever way it is written."""
    while argv:
        argument = argv.pop(0)
        if argument in ("--help", "-h"):
            yield "help", ""
        elif argument == "--debug" and (not argv or argv[0].lower() not in TRUE + FALSE):
            yield "debug", "true"
        elif argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            if not equals:
                if not argv or (argv[0].startswith("--") and argv[0] != "--"):
                    raise UserError(f"{argument} has no value: write {argument} <value> or {key}=<value>")
                value = argv.pop(0)
            yield _known_form(key, argument), value
        elif argument.startswith("~") and "=" not in argument:
            yield argument, ""
        elif "=" in argument:
            key, _, value = argument.partition("=")
            yield _known_form(key, argument), value
        elif argument.strip():
            raise UserError(f"{argument!r} is not key=value; did you mean cfg={argument}? --help lists all keys")


def _known_form(key: str, argument: str) -> str:
    if not key.strip() or key.startswith("-"):
        raise UserError(f"{argument!r} has no key: write key=value, such as method.kd_alpha=0.5")
    return key.strip()


def _debug(overrides: Sequence[str]) -> bool:
    """Whether debug is set: needed before composing, for tracebacks of its errors."""
    said = [o.lstrip("+").partition("=")[2].strip().lower() for o in overrides if o.lstrip("+").startswith("debug=")]
    return bool(said) and said[-1] in TRUE


def flag(own: Mapping[str, str], key: str, default: bool = False) -> bool:
    """A step's own key that is true or false; empty is the default. Raises UserError for anything else."""
    text = own.get(key, "").strip().lower()
    if text and text not in TRUE + FALSE:
        raise UserError(f"{key}={printable(own[key], 80)}: give true or false")
    return text in TRUE if text else default


def choice(own: Mapping[str, str], key: str, known: Sequence[str]) -> str:
    """A step's own key that is one of a few words; empty is the first. Raises UserError for anything else."""
    given = own.get(key, "").lower() or known[0]
    if given not in known:
        raise UserError(f"{key}={own[key]}: {suggestion(given, known)}give {', '.join(known)}")
    return given


def settings(own: Mapping[str, str], key: str) -> dict[str, str]:
    """What is set of a section: `gate.alpha=0.01` -> `{"alpha": "0.01"}` for the key `gate`."""
    return {name.removeprefix(f"{key}."): value for name, value in own.items() if name.startswith(f"{key}.")}


def one_process(step: str, instead: str) -> None:
    """Refuse torchrun for a step that needs no group; `instead`: what to do. Raises UserError."""
    if processes(os.environ)[1] != 1:
        raise UserError(f"{step} runs as one process: {instead}")


def named(config: Config, name: str) -> Config:
    """The configuration with a run name, unless it has one or `mlflow run` gave the run one."""
    if config.run_name is not None or "MLFLOW_RUN_ID" in os.environ:
        return config
    return config.model_copy(update={"run_name": name})


def split_overrides(text: str) -> list[str]:
    """Split a string of overrides at spaces outside of quotes and brackets; quotes stay for Hydra's grammar.

    Example:
        >>> split_overrides("a=[1, 2] b='x y' 'c=my run'")
        ['a=[1, 2]', "b='x y'", 'c=my run']

    Raises:
        UserError: quotes or brackets do not match.
    """
    words: list[str] = []
    word, quote, opened = "", "", []
    for before, char in zip(" " + text, text + " ", strict=True):
        if quote:
            quote = "" if char == quote and before != "\\" else quote
        elif char in "'\"" and (not word or before in "=[{(,: "):  # an apostrophe within a word is none
            quote = char
        elif char in _BRACKETS.values():
            opened.append(char)
        elif char in _BRACKETS:
            if not opened or opened.pop() != _BRACKETS[char]:
                raise UserError(f"overrides={text!r}: the brackets do not match at {word + char!r}")
        elif char.isspace() and not opened:
            if word:
                words.append(_unquoted(word))
            word = ""
            continue
        word += char
    if quote or opened:
        what = "quote" if quote else "bracket"
        raise UserError(f"overrides={text!r}: a {what} is not closed in {word.strip()!r}")
    return words


def _unquoted(word: str) -> str:
    """`'a=x y'`, quoted as a whole, without its quotes."""
    return word[1:-1] if len(word) > 1 and word[0] in "'\"" and word[-1] == word[0] else word


# ---------------------------------------------------------------------------------------------- help


def help_text(step: str, cfg: str | None = None, overrides: Sequence[str] = ()) -> str:
    """Usage and all keys by group, in 100 columns: default (or, with `cfg`, the composed value), what, type."""
    config = None
    if cfg or overrides:
        from pipeline.compose.compose import compose

        config = compose(cfg, overrides)
    lines = [
        f"usage: python -m steps.{step} [cfg=<name or file>] [key=value …] [--debug] [--help]",
        f"       mlflow run . -e {step} [-P cfg=<name or file>] [-P key=value …] [-P overrides='a=1 b=[1,2]']",
        "",
        "cfg names a file of conf/experiment, or any YAML file. A key may also be written --key value.",
        "Single items of lists: model.teachers.0.checkpoint=<file>.",
        "Variables: TEACHER_PAIR=t1,t2 STUDENT METHOD SEED are overrides; DRY_RUN=1 shows what would be done.",
        "",
        *_groups_help(),
    ]
    if config is not None:
        lines += [
            "",
            f"Values with {f'cfg={cfg}' if cfg else 'these overrides'}; * differs from the default, which follows it.",
        ]
    lines += ["", *_section_help(Config, config, "")]
    for name, field in Config.model_fields.items():
        section = section_of(field)
        if section is not None:
            doc = " ".join((section.__doc__ or "").split())
            lines += ["", *textwrap.wrap(f"{name}: {doc}", WIDTH)]
            lines += _section_help(section, getattr(config, name) if config is not None else None, f"{name}.")
    return "\n".join(lines) + "\n"


def _groups_help() -> list[str]:
    lines = ["Groups (group=option):"]
    for group, options in groups().items():
        name = "cfg" if group == "experiment" else group
        lines += textwrap.wrap(" ".join(options), WIDTH, initial_indent=f"  {name:<16}", subsequent_indent=" " * 18)
    return lines


def _section_help(section: type[BaseModel], values: BaseModel | None, prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = section_of(field)
        value = getattr(values, name) if values is not None else None
        if inner is None:
            yield from _key_help(prefix + name, field, field.default if values is None else value)
        elif is_list_of_sections(field):
            yield from textwrap.wrap(f"{prefix}{name}: {field.description}", WIDTH, initial_indent="  ")
            given = list(value) if value else [None]
            for i, item in enumerate(given):
                yield from _section_help(inner, item, f"{prefix}{name}.{i}.")
        elif prefix:  # sections of the top level have a heading of their own
            yield from _section_help(inner, value if values is not None else field.default, f"{prefix}{name}.")


def _key_help(name: str, field: Any, value: Any) -> list[str]:
    """Key and value in the left columns, words in the right one."""
    differs = value != field.default
    left = f"{'*' if differs else ' '} {name} = {written(value)}" + (f"  [{written(field.default)}]" if differs else "")
    words = field.description + ("" if is_text(field) else f" ({expects(field)})")
    column = 48
    if len(left) < column - 1:
        return textwrap.wrap(words, WIDTH, initial_indent=f"{left:<{column}}", subsequent_indent=" " * column)
    head = textwrap.wrap(left, WIDTH, subsequent_indent=" " * 6, break_on_hyphens=False)
    return head + textwrap.wrap(words, WIDTH, initial_indent=" " * column, subsequent_indent=" " * column)
