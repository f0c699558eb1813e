"""The command line of a step, as people type it and as `mlflow run` passes it."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipeline.config import Config
from pipeline.config.numbers import processes
from pipeline.config.words import suggestion
from pipeline.errors import UserError
from pipeline.paths import is_plain, printable

TRUE = ("true", "1", "yes", "on")
FALSE = ("false", "0", "no", "off")
_BRACKETS = {"]": "[", "}": "{", ")": "("}


@dataclass(frozen=True)
class Command:
    """A parsed command line.

    Attributes:
        overrides: in the order given, for `compose`.
        help: what `--help` was given to explain: "" for the step, "all", or a group of keys; None without `--help`.
        own: the step's own keys, which are not in the schema.
    """

    cfg: str | None = None
    overrides: tuple[str, ...] = ()
    help: str | None = None
    debug: bool = False
    own: Mapping[str, str] = field(default_factory=dict)


SEVERAL = "python -m steps.table … seeds=0,1,2; python -m steps.sweep … sweep=<file>"
"""How several runs are asked for."""


def parse(argv: Sequence[str], own: Collection[str] = ()) -> Command:
    """Parse `cfg=x a.b=1`, `--cfg x --a.b 1`, `--a.b=1`, `overrides="a=1 b=[1,2]"`, `--debug`, `--help [topic]`.

    Empty values of `cfg`, `overrides` and keys without a dot are parameters that `mlflow run` passes unset: ignored.

    Args:
        own: the step's own keys, and prefixes of keys that end with a dot.

    Example:
        >>> command = parse(["--rungs", "ladder", "cfg=quickstart", "method.tau=2"], ["rungs"])
        >>> command.cfg, command.overrides, command.own
        ('quickstart', ('method.tau=2',), {'rungs': 'ladder'})

    Raises:
        UserError: an argument is neither a flag nor key=value.
    """
    cfg: str | None = None
    texts: list[str] = []
    topic: str | None = None
    for argument in argv:
        if not is_plain(argument):
            key = argument.removeprefix("--").partition("=")[0]
            raise UserError(
                f"{printable(argument)}: this value of {printable(key)} holds control characters, or is not valid "
                "UTF-8; give a plain text (rename a file with such a name)"
            )
    for key, value in _pairs(list(argv)):
        if not key or key.startswith("-"):
            raise UserError(f"{f'{key}={value}'!r} has no key: write key=value, such as method.kd_alpha=0.5")
        if key == "help":
            topic = value.strip()
        elif key == "cfg":
            cfg = value.strip() or cfg
        elif key == "overrides":
            texts += split_overrides(value)
        elif key.startswith("~") and not value:
            texts.append(key)
        elif value.strip() or "." in key:
            texts.append(f"{key}={value}")
    taken, overrides = _take(texts, own)
    # needed before composing, for tracebacks of its errors
    debug = [o.partition("=")[2] for o in overrides if o.lstrip("+").startswith("debug=")]
    return Command(cfg, tuple(overrides), topic, bool(debug) and debug[-1].strip().lower() in TRUE, taken)


def _take(texts: Sequence[str], own: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """Separate the step's own keys from the overrides of the configuration."""
    taken: dict[str, str] = {}
    rest: list[str] = []
    prefixes = tuple(key for key in own if key.endswith("."))
    for text in texts:
        key, _, value = text.partition("=")
        is_section = key in Config.model_fields and value.startswith("{")  # model={…} cannot be a model's name
        if (key in own or key.startswith(prefixes)) and not is_section:
            taken[key] = value.strip().strip("'\"")
        else:
            rest.append(text)
    return taken, rest


def _pairs(argv: list[str]) -> Iterator[tuple[str, str]]:
    """Key and value of each argument, whichever way it is written."""
    while argv:
        argument = argv.pop(0)
        if argument in ("-m", "--multirun"):
            raise UserError(f"{argument} is Hydra's: several runs are a table, a ladder or a sweep; {SEVERAL}")
        if argument in ("--help", "-h"):
            is_topic = bool(argv) and "=" not in argv[0] and not argv[0].startswith(("-", "~"))
            yield "help", argv.pop(0) if is_topic else ""
        elif argument == "--debug" and (not argv or argv[0].lower() not in TRUE + FALSE):
            yield "debug", "true"
        elif argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            if not equals:
                if not argv or (argv[0].startswith("--") and argv[0] != "--"):
                    raise UserError(f"{argument} has no value: write {argument} <value> or {key}=<value>")
                value = argv.pop(0)
            yield key.strip(), value
        elif "=" in argument or argument.startswith("~"):
            key, _, value = argument.partition("=")
            yield key.strip(), value
        elif argument.strip():
            raise UserError(f"{argument!r} is not key=value; did you mean cfg={argument}? --help all lists all keys")


def flag(own: Mapping[str, str], key: str, default: bool = False) -> bool:
    """A step's own key that is true or false; empty is the default. Raises UserError for anything else."""
    text = own.get(key, "").strip().lower()
    if text and text not in TRUE + FALSE:
        raise UserError(f"{key}={printable(own[key], 80)}: give true or false")
    return text in TRUE if text else default


def listed(text: str) -> list[str]:
    """`a,b` or `[a, b]`: the words, each once."""
    return list(dict.fromkeys(filter(None, (part.strip() for part in text.strip("[] ").split(",")))))


def choice(own: Mapping[str, str], key: str, known: Sequence[str]) -> str:
    """A step's own key that is one of a few words; empty is the first. Raises UserError for anything else."""
    given = own.get(key, "").lower() or known[0]
    if given not in known:
        raise UserError(f"{key}={own[key]}: {suggestion(given, known)}give {', '.join(known)}")
    return given


def settings(own: Mapping[str, str], key: str) -> dict[str, str]:
    """The keys given for a section: `gate.alpha=0.01` -> `{"alpha": "0.01"}` for the key `gate`."""
    return {name.removeprefix(f"{key}."): value for name, value in own.items() if name.startswith(f"{key}.")}


def one_process(step: str, instead: str) -> None:
    """Refuse torchrun for a step that needs no group; `instead`: what to do. Raises UserError."""
    if processes(os.environ)[1] != 1:
        raise UserError(f"{step} runs as one process: {instead}")


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
        elif char in "'\"" and (not word or before in "=[{(,: "):  # an apostrophe within a word is not a quote
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
