"""Other people's words inside our files: a name is text in a spreadsheet and in Markdown, never a formula or a picture.

Needs the standard library only. In HTML it is `html.escape`.
"""

import re
from typing import Any

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


def code(text: str) -> str:
    """A name in a code span of Markdown, with its backticks."""
    return "`" + re.sub(r"\s+", " ", text.replace("`", "'")).replace("|", "\\|") + "`"
