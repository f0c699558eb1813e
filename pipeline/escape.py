"""Other people's words inside our files: a name is text in a spreadsheet and in Markdown, never a formula or a picture.

Needs the standard library only. In HTML it is `html.escape`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?%?|[+-]?(inf|nan)", re.IGNORECASE)


def cell(value: Any) -> Any:
    """A value for a CSV: a text that a spreadsheet would take for a formula gets a quotation mark in front.

    Numbers, also those written as text, stay what they are.

    Example:
        >>> [cell(v) for v in ("=1+1", "-1.5", -1.5, "cat", "@x", "+44 20")]
        ["'=1+1", '-1.5', -1.5, 'cat', "'@x", "'+44 20"]
    """
    if isinstance(value, str) and value[:1] in _STARTS and value and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


_STARTS = "=+-@\t\r\n＝＋－＠"
"""With the wide forms, which some spreadsheets read alike."""


def cells(row: Iterable[Any]) -> list[Any]:
    """A row for `csv.writer`."""
    return [cell(value) for value in row]


def cells_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for `csv.DictWriter`; its keys are the header, which is ours."""
    return {key: cell(value) for key, value in row.items()}


def table(frame: "pandas.DataFrame") -> "pandas.DataFrame":
    """A table for `to_csv`: its cells, its index and the names of its columns."""
    safe = frame.copy()
    for place in range(frame.shape[1]):
        column = frame.iloc[:, place]
        if column.dtype.kind not in "biufcMm":
            safe.isetitem(place, column.map(cell))
    safe.index = frame.index.map(cell).rename(frame.index.name)
    safe.columns = frame.columns.map(cell).rename(frame.columns.name)
    return safe


_KEPT = r"\[[-+\d., ]*\](?![\[(:])"  # an interval or a list of numbers leads nowhere
_MARKUP = re.compile(rf"({_KEPT})|(&|<|\[|\]|\||`|\\|\*|@(?=[\w-]+\.\w)|:(?=//)|(?<=\bwww)\.)", re.IGNORECASE)


def markdown(text: str) -> str:
    """A name as text in a line or a table of Markdown: no HTML, link, picture, code, nor a second line.

    Entities, not backslashes: every dialect reads them alike.

    Example:
        >>> markdown("![x](http://a.b/c.png)")
        '!&#91;x&#93;(http&#58;//a.b/c.png)'
    """
    one_line = re.sub(r"\s+", " ", text)
    return _MARKUP.sub(lambda found: found[1] or f"&#{ord(found[2])};", one_line)


def row(cells: Iterable[str]) -> str:
    """A line of a Markdown table; the cells are Markdown."""
    return "| " + " | ".join(cells) + " |"


def code(text: str) -> str:
    """A name in a code span of Markdown, with its backticks."""
    return "`" + re.sub(r"\s+", " ", text.replace("`", "'")).replace("|", "\\|") + "`"
