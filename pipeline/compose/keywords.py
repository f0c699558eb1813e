"""The command line of a step, as Python writes it: words, dictionaries and keywords."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

from pipeline.config.words import written
from pipeline.errors import UserError

Given: TypeAlias = str | Mapping[str, Any]
"""Words of the command line, or keys with their values."""


def words(given: Iterable[Given], keys: Mapping[str, Any]) -> list[str]:
    """The command line of words, dictionaries and keywords, in this order.

    >>> words(("cfg=quickstart", {"method.tau": 2}), {"method": {"kd_alpha": 0.8}, "seeds": [0, 1]})
    ['cfg=quickstart', 'method.tau=2', 'method.kd_alpha=0.8', 'seeds=[0,1]']
    """
    found: list[str] = []
    for each in (*given, keys):
        if isinstance(each, str):
            found.append(each)
        elif isinstance(each, Mapping):
            found += _pairs(each)
        else:
            raise UserError(f"{each!r}: give words such as 'seed=1', dictionaries or keywords")
    return found


def _pairs(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _pairs(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={_text(value)}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):  # within a list
        return "{" + ",".join(f"{key}: {_text(item)}" for key, item in value.items()) + "}"
    value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's and torch's
    if isinstance(value, list | tuple | range):
        return "[" + ",".join(map(_text, value)) + "]"
    return written(value)
