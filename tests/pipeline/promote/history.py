"""A version's history, as people read it."""

from collections.abc import Mapping
from itertools import count, takewhile


def history(tags: Mapping[str, str]) -> list[str]:
    """Its lines, the latest last: the pages first, as docs/promotion.md says."""
    pages = takewhile(tags.__contains__, (f"asib.history.{n}" for n in count(1)))
    return [line for tag in (*pages, "asib.history") for line in tags.get(tag, "").splitlines()]
