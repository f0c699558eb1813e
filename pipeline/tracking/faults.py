"""What an error of MLflow's client means: the one place that judges the tracking server's answers.

A 400 or 404 that is not in MLflow's own format is a proxy's page, and says nothing about the request.
Importing this module is cheap; MLflow is imported by the functions that need it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import Enum
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from pipeline.errors import UserError
from pipeline.tracking._compat import is_error_code, says_version

T = TypeVar("T")
P = ParamSpec("P")


class Fault(Enum):
    """Ways in which a call can fail."""

    NOT_THERE = "not there"
    NOT_ALLOWED = "not allowed"
    """Permission denied to a known user. Users other than the administrator get this for missing objects, too."""
    REFUSED = "refused"
    """The same call will never succeed."""
    AWAY = "gone for now"
    """No answer, an overloaded server, a locked file, a proxy's page, a changed password: it may succeed later."""


class Refusal(Exception):
    """An answer not in MLflow's format, repeated while its server was up."""


MISSING = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
WRONG = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE", "ENDPOINT_NOT_FOUND")
LOCAL = (UserError, FileNotFoundError, PermissionError, ValueError, TypeError, LookupError, AttributeError, Refusal)
"""Errors on this side; anything else unknown (an object store's own exceptions) is worth a retry."""
NO_ANSWER = json.JSONDecodeError
"""A page with status 200 instead of an answer."""
PASSING = (401, 403, 408, 425, 429)
"""The 4xx that may be temporary."""
FORBIDDEN = "Permission denied"
"""The whole body of MLflow's 403: under basic authentication it is not JSON."""
_TAKEN = re.compile(r"\((\w+\.)*(IntegrityError|UniqueViolation)\)")
"""A database's refusal of a row that is there already, as MLflow passes it on."""
_PAGE = re.compile(
    r"API request to endpoint \S+ failed with error code (\d+) != \d+\. Response body: '(.*)'", re.DOTALL
)


def classify(error: BaseException) -> Fault:
    """What the error of a call of MLflow's client, or of keeping delivery's own state, means."""
    if isinstance(error, UserError) and isinstance(error.__cause__, OSError):
        return Fault.AWAY  # the disk is full; room may be made
    status, signed, code = _answer(error)
    if status == 403:
        return Fault.NOT_ALLOWED if signed else Fault.AWAY
    if status is not None and not signed:
        return Fault.AWAY
    if code in MISSING:
        return Fault.NOT_THERE
    if code == "PERMISSION_DENIED":
        return Fault.NOT_ALLOWED
    if code in WRONG:
        return Fault.REFUSED
    if status is not None:  # for an artifact, with MLflow's own text
        return Fault.REFUSED if 400 <= status < 500 and status not in PASSING else Fault.AWAY
    return Fault.REFUSED if not code and isinstance(error, LOCAL) and not isinstance(error, NO_ANSWER) else Fault.AWAY


def lasting(error: BaseException) -> bool:
    """Whether the same call would get the same answer: not there, or refused. A permission may be granted later."""
    return classify(error) in (Fault.NOT_THERE, Fault.REFUSED)


def unknown(error: BaseException) -> bool:
    """Whether an object requested by its id is missing, as far as this user can see; so is one with a malformed id."""
    return classify(error) in (Fault.NOT_THERE, Fault.NOT_ALLOWED) or _answer(error)[2] == "INVALID_PARAMETER_VALUE"


def look(call: Callable[[], T]) -> T | None:
    """The result of a look-up; None if the object does not exist or this user may not see it."""
    try:
        return call()
    except Exception as error:
        if not unknown(error):
            raise
        return None


def permitted(call: Callable[..., object], *arguments: Any) -> bool:
    """Make a call; False if this user may not."""
    try:
        call(*arguments)
    except Exception as error:
        if classify(error) is not Fault.NOT_ALLOWED:
            raise
        return False
    return True


def outraced(call: Callable[P, T]) -> Callable[P, T]:
    """The same call, repeated once if another process has inserted the same row meanwhile.

    MLflow looks for some rows and then inserts them, without a lock. The process that comes second is refused, and
    finds the row when it asks again.
    """

    @wraps(call)
    def repeated(*arguments: P.args, **options: P.kwargs) -> T:
        try:
            return call(*arguments, **options)
        except Exception as error:
            if _TAKEN.search(str(error)) is None:
                raise
            return call(*arguments, **options)

    return repeated


def ask(call: Callable[[], T], uri: str) -> T:
    """Make a call; a 4xx that is not MLflow's own is final only if its server is up and the answer repeats.

    So a proxy's upper limit, or an older server without that call, refuses for good, while a proxy whose server is
    down for a while does not.

    Raises:
        Refusal: such a final answer.
        Exception: the client's.
    """
    for again in (False, True):
        try:
            return call()
        except Exception as error:
            status, signed, _ = _answer(error)
            doubtful = (
                isinstance(error, NO_ANSWER)
                if status is None
                else not signed and status < 500 and status not in PASSING
            )
            if not doubtful or not identifies_itself(uri):
                raise
            if again:
                raise Refusal(str(error).split("\n", 1)[0]) from error
    raise AssertionError


def identifies_itself(uri: str) -> bool:
    """Whether an MLflow server answers at this address with its version."""
    if not uri.startswith("http"):
        return True
    return re.fullmatch(r"\d+\.\d+\.\S{1,40}", (says_version(uri) or "").strip()) is not None


def _answer(error: BaseException) -> tuple[int | None, bool, str]:
    """Status of an HTTP answer, whether it is MLflow's own, and MLflow's error code.

    The status is None for errors that carry no status: MLflow's own JSON, its client's or its database's own errors.
    """
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(error, RestException):
        return None, True, error.error_code if _signed(error.json) else ""
    if isinstance(error, MlflowException):
        page = _PAGE.match(str(error))
        if page is None:
            return None, True, str(error.error_code)
        return int(page[1]), page[1] == "403" and page[2].strip() == FORBIDDEN, ""
    response = getattr(error, "response", None)  # of requests.HTTPError: artifacts travel outside MLflow's REST calls
    status = getattr(response, "status_code", None)
    if status is None:
        return None, False, ""
    text = str(getattr(response, "text", ""))
    try:
        content: Any = json.loads(text)
    except ValueError:
        return status, text.strip() == FORBIDDEN, ""
    return status, _signed(content), str(content["error_code"]) if _signed(content) else ""


def _signed(content: Any) -> bool:
    """Whether JSON comes from MLflow: a proxy's has no error code, or a different one."""
    code = content.get("error_code") if isinstance(content, dict) else None
    return isinstance(code, str) and is_error_code(code)
