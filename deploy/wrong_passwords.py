"""Wrong passwords are slowed down: MLflow's `authorization_function` (serve.sh names it), with a limit before it.

From one address a user's name may be tried `ASIB_WRONG_PASSWORDS` times at once and as often in a minute, and all names
together three times as often; what comes beyond is answered 429 with the seconds to wait, and no password is looked at.
Right passwords do not count. All workers share one small file, whose every place holds when the last wrong password of
that address and name will be paid for: a limit needs no clean-up, and who invents names and addresses fills nothing.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import time
from collections.abc import Sequence

from flask import Response, make_response, request
from werkzeug.datastructures import Authorization

SLOTS = 1 << 16
MINUTE_S = 60.0


class Limit:
    """What was tried in vain, kept in `file`.

    Args:
        tries: how often at once, and in a minute.
    """

    def __init__(self, file: str, tries: int) -> None:
        fd = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(fd, 8 * SLOTS)
        self._due = memoryview(mmap.mmap(fd, 8 * SLOTS)).cast("d")  # by the machine's clock since it was started
        os.close(fd)
        self._tries = tries

    def wait_s(self, address: str, name: str) -> float:
        """Seconds until that name may be tried again from there; 0 for now."""
        now = time.monotonic()
        over = (self._due[slot] - now - (tries - 1) * MINUTE_S / tries for slot, tries in self._of(address, name))
        return max(0.0, *over)

    def tried_in_vain(self, address: str, name: str) -> None:
        now = time.monotonic()
        for slot, tries in self._of(address, name):
            self._due[slot] = max(self._due[slot], now) + MINUTE_S / tries

    def _of(self, address: str, name: str) -> Sequence[tuple[int, int]]:
        return (_slot(address, name), self._tries), (_slot(address), 3 * self._tries)


def _slot(*words: str) -> int:
    return int.from_bytes(hashlib.sha256(repr(words).encode()).digest()[:2], "big")


_limit: Limit | None = None


def authenticate() -> Authorization | Response:
    """What MLflow asks of every request."""
    global _limit
    from mlflow.server.auth import authenticate_request_basic_auth

    if _limit is None:
        _limit = Limit(os.environ["ASIB_WRONG_PASSWORDS_FILE"], int(os.environ["ASIB_WRONG_PASSWORDS"]))
    # the last address is the one that our own proxy has seen; those before it are the client's words
    address = request.headers.get("X-Forwarded-For", "").rpartition(",")[2].strip() or request.remote_addr or ""
    name = (request.authorization.username if request.authorization else None) or ""
    if request.authorization and (wait := _limit.wait_s(address, name)):
        answer = make_response("Too many wrong passwords: wait a moment.", 429)
        answer.headers["Retry-After"] = str(math.ceil(wait))
        return answer
    found = authenticate_request_basic_auth()
    if request.authorization and isinstance(found, Response) and found.status_code == 401:
        _limit.tried_in_vain(address, name)
    return found
