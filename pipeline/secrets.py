"""Recognise secrets by their name or shape, and mask them in text. Needs the standard library only.

A masked value reads `***`. False alarms are cheap (a masked line still says which key it was), a miss is not.
"""

import itertools
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from functools import lru_cache
from typing import Any

MASK = "***"
SHORTEST = 6
"""Shorter values of environment variables are not real secrets, and would match everywhere."""

_WORDS = {
    *("password", "passwd", "passphrase", "passcode", "pwd", "pass", "token", "secret", "credential", "pat", "jwt"),
    *("apikey", "accesskey", "secretkey", "privatekey", "authkey", "bearer", "authorization", "cookie"),
}
_KEYS = {
    *("api", "access", "secret", "private", "account", "auth", "client", "encryption", "master", "service", "shared"),
    *("signing", "ssh", "storage", "deploy", "license", "sas", "subscription", "webhook"),
}
_SECRET = {"ASIB_NOTIFY_URL"}
_HARMLESS = re.compile(
    r"(OLD)?PWD|AWS_(DEFAULT_)?(REGION|OUTPUT|PROFILE)|AWS_(CONFIG|SHARED_CREDENTIALS|WEB_IDENTITY_TOKEN)_FILE"
    r"|AWS_ENDPOINT_URL(_\w+)?|\w*_(PASSWORD|TOKEN|SECRET|CREDENTIALS?|KEY)_(FILE|PATH|DIR)|GPG_KEY"
)


@lru_cache(maxsize=4096)  # called for the whole environment on every line of a record
def looks_secret(name: str) -> bool:
    """Whether a value of this name (an environment variable, a key of a file) is likely to be a secret.

    Example:
        >>> [looks_secret(n) for n in ("MLFLOW_TRACKING_TOKEN", "db.password", "apiKey", "kd_key", "PWD", "tokens")]
        [True, True, True, False, False, True]
    """
    if _HARMLESS.fullmatch(name):
        return False
    if name.startswith("AWS_") or name in _SECRET:
        return True
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    words = [word.lower() for word in re.split(r"[^A-Za-z0-9]+", spaced) if word]
    singular = [word.removesuffix("s") if word not in ("pass", "sas") else word for word in words]
    if any(word in _WORDS or word.endswith(("password", "passwd", "secret", "token", "apikey")) for word in singular):
        return True
    keyed = any(b == "key" and a in _KEYS for a, b in itertools.pairwise(singular))
    return keyed or (name.isupper() and name.endswith("_KEY"))


def _values() -> list[str]:
    """Values of the environment's secret-looking variables, the longest first."""
    found = {value for name, value in os.environ.items() if len(value) >= SHORTEST and looks_secret(name)}
    return sorted(found, key=lambda value: (-len(value), value))


def mask(text: str) -> str:
    """`text` without the values of secret-looking environment variables, and without passwords in URLs."""
    return _without(text, _values())


def _without(text: str, found: Iterable[str]) -> str:
    for value in found:
        if value in text:
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(value)}(?![A-Za-z0-9])", MASK, text)
    return _IN_URL.sub(rf"\g<1>{MASK}@", text) if "://" in text else text


def mask_all(tree: Any, but: Collection[str] = ()) -> Any:
    """`mask` every text in nested lists and mappings, except keys and the values of the keys in `but`."""
    found = _values()

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return _without(value, found)
        if isinstance(value, Mapping):
            return {key: item if key in but else walk(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [walk(item) for item in value]
        return value

    return walk(tree)


class Formatter(logging.Formatter):
    """Log lines, tracebacks included, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return mask(super().format(record))


_IN_URL = re.compile(r"(\b[A-Za-z][A-Za-z0-9+.-]*://[^\s/@:'\"]*:)[^\s/@'\"]+@")
_SHAPES = re.compile(
    r"\b(?:gh[pousr]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|(?:AKIA|ASIA)[0-9A-Z]{16}"
    r"|hf_[A-Za-z0-9]{20,}|sk-[\w-]{20,}|AIza[\w-]{30,}|npm_[A-Za-z0-9]{30,}|pypi-[\w-]{30,}|dapi[0-9a-f]{30,}"
    r"|eyJ[\w-]{10,}\.[\w-]{10,}(?:\.[\w-]*)?)"
    r"|(?i:(?<=bearer )|(?<=basic ))[\w.~+/=-]{8,}"
)
_NAME = re.compile(r"""(?P<name>[A-Za-z_][\w.-]*)["']?\]?\s*(?::=|=>|[=:](?!=|//))\s*""")
_VALUE = re.compile(r""""(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|.+""")
_OPTION = re.compile(
    r"(--?(?P<name>[A-Za-z][\w-]*)\s+|\blogin\s+\S+\s+password\s+|^[-+ ]?\s*password\s+(?=\S+\s*$))(?P<value>[^\s-]\S*)"
)
_PLAIN = re.compile(
    r"(?i:none|null|true|false|str|int|float|bool|bytes|list|dict|any|optional|\d{1,5})(\s*([,|\[\]}):].*|=.*)|\s*)$"
    r"|\"\"|''|\$\{.*\}$|[&<>|)\]},;*]"
)
"""Values that hold no secret: None, a type, a reference, nothing."""
_BEGIN, _END = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"), re.compile(r"-----END [A-Z ]*PRIVATE KEY")


def mask_lines(text: str) -> str:
    """Mask everything that looks like a secret in a text of many lines, such as a diff.

    Masked: values assigned to secret-looking names (to the end of the line if they are not in quotation marks),
    well-known shapes of tokens, private keys, passwords in URLs, and values of secret-looking environment variables.
    The number of lines is unchanged.
    """
    lines, private = [], False
    for line in mask(text).split("\n"):
        if private or _BEGIN.search(line):
            private = not _END.search(line)
            lines.append((line[:1] if line[:1] in ("+", " ") else "") + MASK)
            continue
        line = _OPTION.sub(_option, _SHAPES.sub(MASK, line))
        lines.append(_assigned(line))
    return "\n".join(lines)


def _option(found: re.Match[str]) -> str:
    return found[1] + MASK if found["name"] is None or looks_secret(found["name"]) else found[0]


def _assigned(line: str) -> str:
    """The line with every value of a secret-looking name masked."""
    at = 0
    while (named := _NAME.search(line, at)) is not None:
        value = _VALUE.match(line, named.end())
        if value is None:
            break
        if not looks_secret(named["name"]) or _PLAIN.match(value[0]):
            at = named.end()
            continue
        quote = value[0][0] if value[0][0] in "\"'" else ""
        line = line[: value.start()] + quote + MASK + quote + line[value.end() :]
        at = value.start() + len(MASK) + 2 * len(quote)
    return line
