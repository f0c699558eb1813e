"""A worker of `cluster=command`: reads its request from a file, shows that it lives, and hears of its end by files.

    python -m pipeline.launch.remote <launcher's folder>/jobs/<index>.json

With the launcher it has only a folder in common: it touches `processes/<index>.<rank>.json` as a sign of life, looks
for `stop/<index>`, which names a signal, and leaves `ended/<index>`. Under torchrun every process of a group does so.
"""

import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

from pipeline.launch.entry import call, record, see_one_device

BEATS, PAUSE_S = 10, 5.0
"""Signs of life within the time after which a silent worker counts as lost; the longest time between two."""


def main(file: Path) -> int:
    """Do the work that the file asks for; the exit code."""
    asked = json.loads(file.read_text())
    folder, index = Path(asked["folder"]), int(asked["index"])
    rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
    tasks = int(os.environ.get("WORLD_SIZE", "1"))
    os.chdir(asked["cwd"])
    see_one_device(None, tasks, local_rank)
    stop, ended = folder / "stop" / str(index), folder / "ended" / str(index)
    ended.unlink(missing_ok=True)  # a scheduler may run a job again
    me = record(folder, index, rank)
    if stop.exists():  # before it had begun
        _leave(ended, rank)
        return 0
    pause = min(PAUSE_S, asked["silent_s"] / BEATS)
    threading.Thread(target=_live, args=(me, stop, pause), name="sign of life", daemon=True).start()
    try:
        return call(asked["work"], index, asked["arguments"])
    finally:
        _leave(ended, rank)


def _leave(ended: Path, rank: int) -> None:
    if rank == 0:
        ended.parent.mkdir(exist_ok=True)
        ended.touch()


def _live(me: Path, stop: Path, seconds: float) -> None:
    """Show that this process lives, and pass on the signal in `stop`."""
    pause = threading.Event()
    while not pause.wait(seconds):
        with suppress(OSError):  # a full or slow disk: the next one counts
            me.touch()
        with suppress(OSError, ValueError):
            os.kill(os.getpid(), signal.Signals(int(stop.read_text())))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
