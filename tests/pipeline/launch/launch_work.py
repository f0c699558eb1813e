"""What test_launch.py's workers do: they write down what they see, and wait for a signal or for the file `done`."""

import json
import os
import signal
import time
from pathlib import Path
from types import FrameType

from pipeline.launch.entry import PREEMPTION

SEEN = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTHONPATH", "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")


def hold(index: int, folder: str, deaf: bool = False) -> int:
    """Wait; `deaf`: SIGTERM changes nothing."""
    arrived: list[signal.Signals] = []

    def note(number: int, frame: FrameType | None) -> None:
        arrived.append(signal.Signals(number))

    signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else note)
    signal.signal(PREEMPTION, note)
    place = Path(folder)
    name = f"{index}.{os.environ.get('RANK', '0')}"
    _write(place / f"{name}.json", {"pid": os.getpid(), "index": index, **{k: os.environ.get(k) for k in SEEN}})
    while not arrived and not (place / "done").exists():
        time.sleep(0.02)
    _write(place / f"{name}.end", {"pid": os.getpid(), "signal": arrived[0].name if arrived else ""})
    return 128 + arrived[0] if arrived else 0


def _write(path: Path, content: object) -> None:
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content))
    part.replace(path)
