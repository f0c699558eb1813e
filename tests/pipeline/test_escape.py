"""Other people's words in spreadsheets and in Markdown."""

import html

import pytest

from pipeline import escape

FORMULAS = ["=cmd|' /C calc'!A0", "+1+1", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "＝1", "-", "=1"]
PLAIN = ["cat", "a=b", "", "-1.5", "+3", "1e-3", "-inf", "nan", "+.5", "-12.5%"]


@pytest.mark.parametrize("text", FORMULAS)
def test_formulas_become_text(text: str) -> None:
    assert escape.cell(text) == "'" + text


@pytest.mark.parametrize("value", [*PLAIN, -1.5, 3, None, True])
def test_numbers_and_other_texts_stay(value: object) -> None:
    assert escape.cell(value) is value


MARKUP = ["![x](http://a.b/c.png)", "[x](http://a.b)", "<img src=http://a.b/c.png>", "http://a.b/c", "a|b", "`x`"]
MARKUP += [
    "www.a.b",
    "[x][y]",
    "x\n[y]: http://a.b",
    "&lt;img&gt;",
    "**a**",
    "a\\![x](y)",
    "[1](http://a.b)",
    "me@a.bc",
]


@pytest.mark.parametrize("text", MARKUP)
def test_markdown_shows_a_name_and_does_nothing_else(text: str) -> None:
    """Rendered by an independent Markdown library: no element, and the words."""
    from markdown_it import MarkdownIt

    rendered = MarkdownIt("gfm-like", {"linkify": False}).render(f"rung {escape.markdown(text)}, n=3")
    assert rendered == f"<p>rung {html.escape(' '.join(text.split()))}, n=3</p>\n"
    assert "://" not in escape.markdown(text)
    assert "www." not in escape.markdown(text)


def test_numbers_in_brackets_stay_readable() -> None:
    assert escape.markdown("+0.80 [-0.10, 1.65]") == "+0.80 [-0.10, 1.65]"


def test_a_code_span_cannot_be_left() -> None:
    assert escape.code("a`b|c\nd") == "`a'b\\|c d`"
