"""Count how often a test set was looked at: the pairs of challenger and champion compared on it, in order.

Two tags of the registered model for each test set: `asib.looks.<digest>` lists the pairs; a dry run, which has no turn,
adds its own tag, `asib.look.<digest>.<pair>`, which the next promotion moves into the list. A pair that is compared
again gives the same numbers and counts once.
"""

from __future__ import annotations

from typing import Any

from mlflow.tracking import MlflowClient

from pipeline.tracking import server
from pipeline.tracking.faults import permitted
from pipeline.tracking.model_tags import LOOK, LOOKS, TAG_LENGTH, garbled, is_look, read_looks, unique

DIGEST_LENGTH = 16


def count_look(client: MlflowClient, name: str, digest: str, data: str, pair: str, turn: bool) -> dict[str, Any]:
    """Count a look at the test set before it happens.

    Args:
        digest: of the test images; `data`: of the whole data set, which versions are tagged with.
        pair: challenger and champion, such as 7-3.
        turn: whether this promotion has its turn in the model's queue.

    Returns:
        `number`: which look this is, from 1. `counted`: whether later looks see it; False without write permission.
        `said`: one sentence for each invalid tag.
    """
    short = digest[:DIGEST_LENGTH]
    known, single, said = _known(client, name, short, data)
    pairs = unique([*known, *single])
    counted = True
    if turn:
        pairs = unique([*pairs, pair])
        client.set_registered_model_tag(name, LOOKS + short, _fitting(pairs))
        for one in single:
            client.delete_registered_model_tag(name, f"{LOOK}{short}.{one}")
    elif pair not in pairs:
        counted = permitted(client.set_registered_model_tag, name, f"{LOOK}{short}.{pair}", "dry run")
        known, single, _ = _known(client, name, short, data)  # of two simultaneous looks, at least one sees the other
        pairs = unique([*known, *single, pair])
    number = pairs.index(pair) + 1 if pair in known or turn else len(pairs)
    return {"number": number, "counted": counted, "said": said}


def _known(client: MlflowClient, name: str, short: str, data: str) -> tuple[list[str], list[str], list[str]]:
    """The pairs in the list, those with their own tag, and a sentence for each broken tag.

    A missing or broken list is rebuilt from the tags of the versions that were judged on this data.
    """
    tags = client.get_registered_model(name).tags
    text = tags.get(LOOKS + short, "")
    known, whole = read_looks(text)
    said = [] if whole else [garbled(LOOKS + short, text, "the versions' own tags count instead")]
    if not known or not whole:
        known = unique([*known, *_judged(client, name, data)])
    single = sorted(tag.removeprefix(f"{LOOK}{short}.") for tag in tags if tag.startswith(f"{LOOK}{short}."))
    return known, [pair for pair in single if is_look(pair)], said


def _judged(client: MlflowClient, name: str, data: str) -> list[str]:
    """Pairs named by versions' tags, the oldest decision first."""
    found = []
    for version in server.all_pages(lambda token: client.search_model_versions(f"name = '{name}'", page_token=token)):
        tags = version.tags
        pair = f"{version.version}-{tags.get('asib.against', '').removeprefix('version ')}"
        if tags.get("asib.data_digest") == data and "asib.verdict" in tags and is_look(pair):
            found.append((tags.get("asib.decided_at", ""), pair))
    return [pair for _, pair in sorted(found)]


def _fitting(pairs: list[str]) -> str:
    """The list as a tag; its oldest pairs are dropped if a tag cannot hold them all."""
    text = " ".join(pairs)
    return text if len(text) <= TAG_LENGTH else text[-TAG_LENGTH - 1 :].partition(" ")[2]
