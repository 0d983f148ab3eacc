"""The protocol between a pool and a sandbox server: every route, message and status code.

JSON over HTTP/1.1, but for the content of files, which is raw. Every request but ``GET /health`` carries
``Authorization: Bearer TOKEN``, if the server has a token. A request about a slot carries the token of its lease in
``Slotpool-Lease``; a lease that is not, or no longer, that slot's is refused and nothing changes. Every accepted one renews
the lease.

``GET /health``
    200 ``{"status": "ok"}``; with the bearer token also ``version name boot_id isolation network landlock limits slots counts
    waiting executing executions leases_granted requests_open`` (``limits``: by what each kind is kept; ``counts``: slots by
    state; ``waiting``: leases that requests wait for; ``executing``: executions under way; ``executions``, ``leases_granted``:
    those that ended, were granted, since it began).
``GET /metrics``
    200, the server's metrics for Prometheus, as text; 501 if the server lacks ``prometheus_client``.
``GET /v1/slots``
    200 ``{"slots": [{"slot", "state", "owner", "why"}]}``.
``POST /v1/leases`` ``{"owner": str, "ttl": seconds, "take": int, "release": [lease token], "wait": seconds}``
    Give leases back, then take up to ``take``, waiting up to ``wait`` for the first of them to be free.
    200 ``{"boot_id", "leases": [{"slot", "token", "workspace", "network"}], "leased": int}``, the last one the number of slots
    that are leased now, by anybody. Tokens to release that aren't held are ignored.
    Repeating a request whose answer was lost takes further leases; the lost ones expire.
``POST /v1/leases/renew`` ``{"tokens": [lease token]}``
    200 ``{"boot_id", "lost": [lease token], "usable": int, "leased": int}``: those that are not held any more; how many of the
    server's slots are not quarantined, and how many are leased.
``POST /v1/cordon`` ``{"owner": str, "ttl": seconds, "release": [lease token]}``
    Give leases back, and if no other is held, grant none for that time, so that the server can be ended without anybody's
    loss. 200 ``{"cordoned": bool}``. With a ``ttl`` of 0 leases are granted again, unless another owner has asked for the same.
``POST /v1/slots/SLOT/execute`` ``{"execution_id", "tool", "args": {}, "timeout": seconds, "wait": seconds}``
    Run a tool, once for each ``execution_id`` in a lease however often it is asked for: a repetition joins it or gets the
    kept result. 200 a result (see :class:`Result`); 202 ``{"running": true}`` after ``wait`` seconds: ask again;
    410 if it ran, but so many have run since that its result is no longer kept.
``POST /v1/batch`` ``{"calls": [{"slot", "lease", "execution_id", "tool", "args", "timeout"}], "wait": seconds}``
    The same for many slots, side by side. 200 ``{"results": [result or {"error": ...} or {"running": true}]}``, in order.
``POST /v1/slots/SLOT/cancel`` ``{"execution_id"}``
    Kill a running execution and all it started; 200 ``{"cancelled": bool}``. Its result is still delivered to who waits for it.
``POST /v1/slots/SLOT/reset`` ``{"network": bool or null}``
    Empty the workspace and kill every process; the lease stays. 200 ``{"network": bool}``. ``network`` changes it.
``GET /v1/slots/SLOT/file?path=PATH``
    200, the content as ``application/octet-stream``.
``PUT /v1/slots/SLOT/file?path=PATH``, the content as body
    204. The file is replaced as a whole or not at all. Safe to repeat.

Errors are ``{"error": {"code", "message", ...}}`` with one of the statuses in :data:`STATUS`.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from typing import Any, TypedDict

from .. import errors

LEASE_HEADER = "Slotpool-Lease"
MAX_JSON = 16 * 1024 * 1024  # bytes of a JSON request
MAX_WAIT = 30.0  # seconds that one request may be held
_parse = json.JSONDecoder().raw_decode  # of what has no spaces around it, at half the cost of json.loads()

STATUS: dict[str, int] = {
    "invalid_request": 400,
    "unauthorized": 401,
    "not_found": 404,
    "method_not_allowed": 405,
    "lease_lost": 409,
    "result_gone": 410,
    "too_large": 413,
    "file_error": 422,
    "internal": 500,
    "not_installed": 501,
    "slot_broken": 502,
    "closing": 503,
    "overloaded": 429,
}


class Result(TypedDict):
    """What an execution gives."""

    execution_id: str
    stdout: str  # UTF-8; a byte that is not is a surrogate escape (PEP 383)
    stderr: str
    exit_code: int  # 128 + the signal's number if it was killed by one, as shells count
    signal: int | None
    timed_out: bool
    cancelled: bool
    stdout_truncated: bool
    stderr_truncated: bool
    error: str  # why a file tool failed; empty else
    duration: float  # seconds, as the server measured it
    isolation: str
    network: bool
    restarted: bool  # the slot's processes had to be replaced, as they could not be ended singly


class ErrorBody(TypedDict, total=False):
    code: str
    message: str
    field: str
    expected: str
    got: str
    errno: int
    path: str
    may_have_run: bool


class RequestFailed(Exception):
    """What the server raises to answer with an error. ``body`` is the JSON."""

    def __init__(self, code: str, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status = STATUS[code]
        self.body: ErrorBody = {"code": code, "message": message, **more}  # type: ignore[typeddict-item]


def parse(message: bytes) -> Any:
    """What a message says in JSON.

    :raises ValueError, RecursionError: it is none.
    """
    text = message.decode()  # of bytes json.loads() would guess the encoding
    try:
        value, end = _parse(text)
    except ValueError:  # or there is a space before it
        end = -1
    return value if end == len(text) else json.loads(text)


def invalid(field: str, expected: str, got: object) -> RequestFailed:
    return RequestFailed(
        "invalid_request",
        f"{field}: expected {expected}, got {errors.shown(got)}",
        field=field,
        expected=expected,
        got=errors.shown(got),
    )


def lease_lost(slot: str, may_have_run: bool = False) -> RequestFailed:
    return RequestFailed("lease_lost", f"{slot} is not, or no longer, held by this lease", may_have_run=may_have_run)


def processes_lost() -> RequestFailed:
    """The failure of a call during which the slot's processes were lost."""
    return RequestFailed("slot_broken", "the slot's processes were lost during the call", may_have_run=True)


_SLOT_ERRORS: dict[str, type[errors.SlotError]] = {
    "unauthorized": errors.ContainerRefused,
    "not_found": errors.ContainerRefused,
    "method_not_allowed": errors.ContainerRefused,
    "lease_lost": errors.LeaseLost,
    "slot_broken": errors.SlotBroken,
    "result_gone": errors.SlotBroken,
    "internal": errors.SlotBroken,
    "not_installed": errors.ContainerRefused,
    "closing": errors.ContainerLost,
    "overloaded": errors.SlotBroken,
}
_MAY_HAVE_RUN = {"slot_broken", "result_gone", "internal"}  # unless the server says that it has not


def to_exception(status: int, body: object, sent_before: bool) -> errors.SlotPoolError:
    """The one place that turns a server's refusal into an exception.

    :param sent_before: an earlier try of the same request may have reached the server.
    """
    error: Mapping[str, Any] = {}
    if isinstance(body, dict) and isinstance(body.get("error"), dict):
        error = body["error"]
    code = error.get("code")
    message = str(error.get("message", f"HTTP status {status} without an explanation"))
    if code in ("invalid_request", "too_large") or status == 413:  # which the WSGI server gives in words of its own
        return errors.InvalidRequest(
            str(error.get("field", "request")), str(error.get("expected", message)), str(error.get("got", "something else"))
        )
    if code == "file_error":
        number = error.get("errno")
        return errors.FileError(number if isinstance(number, int) else errno.EIO, message, str(error.get("path", "")))
    kind = _SLOT_ERRORS.get(str(code), errors.ContainerRefused)
    # An answer that is not slotpool's says nothing about what happened behind it.
    maybe = bool(error.get("may_have_run", str(code) in _MAY_HAVE_RUN or str(code) not in _SLOT_ERRORS))
    return kind(message, may_have_run=sent_before or maybe)


class Lease(TypedDict):
    """A lease as the server grants it."""

    slot: str
    token: str
    workspace: str
    network: bool


class LeaseAnswer(TypedDict):
    boot_id: str
    leases: list[Lease]
    leased: int


class RenewAnswer(TypedDict):
    boot_id: str
    lost: list[str]
    usable: int
    leased: int


class CallRequest(TypedDict):
    """One call of a batch."""

    slot: str
    lease: str
    execution_id: str
    tool: str
    args: dict[str, Any]
    timeout: float
