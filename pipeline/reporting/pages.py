"""HTML pages that need no other file, and notes short enough for a tag of MLflow."""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas

NOTE_LENGTH = 7900
"""MLflow keeps 8000 characters of a tag."""
STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1300px;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-variant-numeric:tabular-nums}th,td{padding:.25em .7em;text-align:right;"
    "border-bottom:1px solid #ddd}th:first-child,td:first-child{text-align:left}thead th{background:#f4f4f4}"
    "div{overflow-x:auto}img{max-width:100%}.note{background:#fff4d6;padding:.4em .8em}"
)


def page(title: str, parts: Iterable[str]) -> str:
    """A page with its style; `title`: text, also the heading; `parts`: HTML."""
    words = html.escape(title)
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{words}</title><style>{STYLE}</style>'
    return "\n".join([head, f"<h1>{words}</h1>", *parts, "</html>\n"])


def table(frame: "pandas.DataFrame", corner: str | None = None) -> str:
    """A table that scrolls if it is too wide; `corner`: the name of the index, which is left out without one."""
    named = frame if corner is None else frame.rename_axis(index=None, columns=corner)
    return f"<div>{named.to_html(border=0, escape=True, index=corner is not None)}</div>"


def image(png: bytes, words: str) -> str:
    """A picture that is part of the page; `words`: what it shows."""
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(words)}" src="data:image/png;base64,{data}">'


def first_that_fits(notes: Sequence[str]) -> str:
    """The first note that fits into a tag, or else the beginning of the last one."""
    return next((note for note in notes if len(note) <= NOTE_LENGTH), notes[-1][:NOTE_LENGTH])
