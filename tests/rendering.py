"""What a page that is made of a text would load or lead to."""

from html.parser import HTMLParser

from markdown_it import MarkdownIt

EVIL = ["![x](http://evil/i.png)", "<img src=http://evil/i.png>", "[x](http://evil)", "x\n\n[a]: http://evil\n\n![a]"]
EVIL += ["<script>fetch('http://evil')</script>", "a|b`c", "x](http://evil) ![y](http://evil/i.png"]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.leads: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.leads += [str(value) for name, value in attrs if name in ("src", "href", "srcset", "action")]


def leads(markdown: str) -> list[str]:
    """Addresses in Markdown, raw HTML included."""
    page = _Page()
    page.feed(MarkdownIt("gfm-like", {"linkify": False, "html": True}).render(markdown))
    assert not page.tags & {"img", "script", "iframe", "style", "object", "embed", "form"}
    return page.leads


def elements(html: str) -> set[str]:
    page = _Page()
    page.feed(html)
    return page.tags
