"""Other people's text inside our files: a name is text in a spreadsheet and in Markdown, never a formula or a picture.

Needs the standard library only. For HTML, use `html.escape`.
"""

import re
from typing import Any

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?%?|[+-]?(inf|nan)", re.IGNORECASE)


def cell(value: Any) -> Any:
    """A value for a CSV: a text that a spreadsheet would take for a formula is prefixed with a quotation mark.

    Numbers, including those written as text, are unchanged.

    Example:
        >>> [cell(v) for v in ("=1+1", "-1.5", -1.5, "cat", "@x", "+44 20")]
        ["'=1+1", '-1.5', -1.5, 'cat', "'@x", "'+44 20"]
    """
    if isinstance(value, str) and value[:1] in _STARTS and value and not _NUMBER.fullmatch(value):
        return f"'{value}"
    return value


_STARTS = "=+-@\t\r\n＝＋－＠"
"""Includes the full-width forms, which some spreadsheets treat alike."""


_KEPT = r"\[[-+\d., ]*\](?![\[(:])"  # an interval or a list of numbers is harmless
_MARKUP = re.compile(rf"({_KEPT})|(&|<|\[|\]|\||`|\\|\*|@(?=[\w-]+\.\w)|:(?=//)|(?<=\bwww)\.)", re.IGNORECASE)


def markdown(text: str) -> str:
    """A name as text in a line or a table of Markdown: no HTML, link, picture, code or second line.

    It uses entities, not backslashes: every dialect reads them alike.

    Example:
        >>> markdown("![x](http://a.b/c.png)")
        '!&#91;x&#93;(http&#58;//a.b/c.png)'
    """
    one_line = re.sub(r"\s+", " ", text)
    return _MARKUP.sub(lambda found: found[1] or f"&#{ord(found[2])};", one_line)


def code(text: str) -> str:
    """A name in a code span of Markdown, with its backticks."""
    return "`" + re.sub(r"\s+", " ", text.replace("`", "'")).replace("|", "\\|") + "`"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "→": r"$\to$",
    "†": r"$\dagger$",
}


def latex(text: str) -> str:
    r"""A name as text in a line or a table of LaTeX: no command, comment, formula or second line.

    Example:
        >>> latex("a_b 50 %")
        'a\\_b 50 \\%'
    """
    return re.sub(
        r"[\\~^±→†]|[&%$#_{}]", lambda found: _LATEX.get(found[0], f"\\{found[0]}"), re.sub(r"\s+", " ", text)
    )
