"""Which folders a delivery may touch: a journal and the files beside it may be someone else's."""

from __future__ import annotations

from pathlib import Path

from pipeline import journal
from pipeline.errors import UserError
from pipeline.tracking.state import STATE_FILE

OURS = (journal.FILE, STATE_FILE, "delivery.lock", "delivery.takeover", "delivery.log", "delivery")
"""What a delivery reads and writes in a run's folder."""


def check_own_files(folder: Path) -> None:
    """Raise UserError for a folder in which one of these is a link: writing to it would write elsewhere."""
    for name in OURS:
        if (folder / name).is_symlink():
            raise UserError(f"{folder / name} is a symbolic link: what is delivered is a run's own folder; copy it")


def belongs(folder: Path, parent: Path, live: bool) -> bool:
    """Whether the nested run that `parent`'s journal names may be delivered with it.

    Either it lies inside the parent's folder, or its own journal names the parent's journal (or the run that this one
    represents) as its parent, as a sweep's trials do, and has the same user. So a journal cannot name a stranger's run.

    Args:
        live: our own trainer writes the parent's journal. It may continue a trial of another user's worker, and a
            ladder may reuse a run that this user made in the same output folder.
    """
    try:
        check_own_files(folder)
        real, above = folder.resolve(), parent.resolve()
        if above in real.parents:
            return True
        same_user = (folder / journal.FILE).stat().st_uid == (parent / journal.FILE).stat().st_uid
        if live and same_user and above.parent in real.parents:
            return True
        own, named_by = journal.read_header(folder), journal.read_header(parent)
        if own is None or named_by is None:
            return False
        link, carried = own.data.get("parent"), named_by.data.get("carrier")
        known = {named_by.data["journal"], carried["journal"] if isinstance(carried, dict) else None} - {None}
        return isinstance(link, dict) and link.get("journal") in known and (live or same_user)
    except (UserError, OSError, RuntimeError, ValueError, KeyError, TypeError):
        return False
