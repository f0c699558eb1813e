"""The record of a run on disk: an append-only file of JSON lines, written by training and read by delivery."""

from pipeline.journal.entries import (
    FILE,
    Carrier,
    Entry,
    check_end,
    damage,
    decode_number,
    generations,
    now_ms,
    read_entries,
    read_header,
    writer_alive,
)
from pipeline.journal.folder import SLOTS, take
from pipeline.journal.recorder import CheckpointRecorder, NullJournal
from pipeline.journal.writer import Journal

__all__ = [
    "FILE",
    "SLOTS",
    "Carrier",
    "CheckpointRecorder",
    "Entry",
    "Journal",
    "NullJournal",
    "check_end",
    "damage",
    "decode_number",
    "generations",
    "now_ms",
    "read_entries",
    "read_header",
    "take",
    "writer_alive",
]
