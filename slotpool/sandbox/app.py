"""The HTTP front of a host: a WSGI application that checks, routes and answers. The routes are in :mod:`.protocol`."""

from __future__ import annotations

import functools
import hmac
import json
import logging
import threading
import urllib.parse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, TypeVar

from . import protocol, transfer
from .front import KEPT
from .host import Host
from .protocol import RequestFailed
from .run import Answer

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

    from .metrics import Exposition

log = logging.getLogger(__name__)

T = TypeVar("T")

_REASONS = {
    200: "OK",
    202: "Accepted",
    204: "No Content",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    410: "Gone",
    413: "Content Too Large",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    500: "Internal Server Error",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
}
MAX_TIMEOUT = 86_400.0  # seconds
MAX_TTL = 3_600.0
MAX_BATCH = 1_000  # calls, and leases


class Response:
    """A WSGI response body; ``afterwards`` is called when it has been sent."""

    def __init__(
        self, status: int, body: Iterable[bytes], size: int, content_type: str, afterwards: Callable[[], None] | None = None
    ) -> None:
        self.status = f"{status} {_REASONS[status]}"
        self.headers = [("Content-Length", str(size)), ("Content-Type", content_type)] if status != 204 else []
        self._body = body
        self._afterwards = afterwards

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._body)

    def close(self) -> None:
        if self._afterwards is not None:
            self._afterwards()


def _json(status: int, value: object, afterwards: Callable[[], None] | None = None) -> Response:
    # Lone surrogates can come in with a path that is not UTF-8; JSON carries them escaped.
    body = json.dumps(value).encode()
    return Response(status, (body,), len(body), "application/json", afterwards)


class App:
    """The WSGI application. Thread-safe.

    :param token: what every request must carry, or None to ask for nothing.
    :param most_held: how many requests may be held at once, waiting for something; others are answered at once.
    """

    def __init__(self, host: Host, token: str | None, most_held: int) -> None:
        self._host = host
        self._lock = threading.Lock()  # guards _may_be_held
        self._may_be_held = most_held
        self._exposition: Exposition | None = None  # made for the first who asks; one that is made twice does no harm
        self._token = token.encode() if token is not None else None
        self._fixed: dict[str, dict[str, Callable[[WSGIEnvironment], Response]]] = {
            "/health": {"GET": self._health},
            "/metrics": {"GET": self._metrics},
            "/v1/slots": {"GET": self._slots},
            "/v1/leases": {"POST": self._lease},
            "/v1/leases/renew": {"POST": self._renew},
            "/v1/cordon": {"POST": self._cordon},
            "/v1/batch": {"POST": self._batch},
        }
        self._of_slot: dict[str, dict[str, Callable[[WSGIEnvironment, str, str], Response]]] = {
            "execute": {"POST": self._execute},
            "cancel": {"POST": self._cancel},
            "reset": {"POST": self._reset},
            "file": {"GET": self._read_file, "PUT": self._write_file},
        }

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        tally = self._host.tally
        tally.request(1)
        try:
            response = self._route(environ)
        except RequestFailed as e:
            response = _json(e.status, {"error": e.body})
        except Exception:
            log.exception("%s %s failed; this is a defect of slotpool", environ["REQUEST_METHOD"], environ["PATH_INFO"])
            failed = RequestFailed("internal", "the server failed; its log says how")
            response = _json(failed.status, {"error": failed.body})
        finally:
            tally.request(-1)
        start_response(response.status, response.headers)
        return response

    def _route(self, environ: WSGIEnvironment) -> Response:
        kept: dict[str, Any] = environ.get(KEPT, {})
        act = kept.get("act")
        if act is None:
            act = kept["act"] = self._find(environ)
        response: Response = act(environ)
        return response

    def _find(self, environ: WSGIEnvironment) -> Callable[[WSGIEnvironment], Response]:
        """What a request asks for, by its head alone.

        :raises RequestFailed: it may not ask, or there is no such thing.
        """
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        public = path == "/health" and method == "GET" and "HTTP_AUTHORIZATION" not in environ
        known = self._is_authorized(environ)
        if not known:  # else strangers could keep as many threads and connections as there may be
            environ["slotpool.keep"] = False
        if not public and not known:
            raise RequestFailed("unauthorized", "expected the header Authorization: Bearer TOKEN with this server's token")
        if path in self._fixed:
            return _of_method(self._fixed[path], method)
        parts = path.split("/")
        if len(parts) == 5 and parts[:3] == ["", "v1", "slots"] and parts[4] in self._of_slot:
            lease = environ.get("HTTP_SLOTPOOL_LEASE", "")
            return functools.partial(_of_method(self._of_slot[parts[4]], method), slot=parts[3], lease=lease)
        raise RequestFailed("not_found", f"there is no {path}")

    def _is_authorized(self, environ: WSGIEnvironment) -> bool:
        if self._token is None:
            return True
        kind, _, given = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        return kind == "Bearer" and hmac.compare_digest(given.strip().encode("latin-1"), self._token)

    def _health(self, environ: WSGIEnvironment) -> Response:
        details = self._host.health() if "HTTP_AUTHORIZATION" in environ or self._token is None else {}
        return _json(200, {"status": "ok", **details})

    def _metrics(self, environ: WSGIEnvironment) -> Response:
        if self._exposition is None:
            try:
                from .metrics import Exposition  # takes a while, and need not be installed
            except ImportError as e:
                why = f"the server lacks prometheus_client, which `pip install 'slotpool[metrics]'` installs: {e}"
                raise RequestFailed("not_installed", why) from e
            self._exposition = Exposition(self._host)
        text = self._exposition.text()
        return Response(200, (text,), len(text), self._exposition.content_type)

    def _slots(self, environ: WSGIEnvironment) -> Response:
        return _json(200, {"slots": self._host.describe_slots()})

    def _held(self, body: dict[str, Any], act: Callable[[float], T]) -> T:
        """Call ``act`` with the seconds for which this request may be held: as many as it asks for, if there is room."""
        wait = _number(body, "wait", 0.0, protocol.MAX_WAIT)
        with self._lock:
            room = self._may_be_held > 0
            self._may_be_held -= room
        try:
            return act(wait if room else 0.0)
        finally:
            with self._lock:
                self._may_be_held += room

    def _lease(self, environ: WSGIEnvironment) -> Response:
        body = _object(environ, "owner", "ttl", "take", "release", "wait")
        owner, ttl, take = _string(body, "owner"), _number(body, "ttl", 0.1, MAX_TTL), _count(body, "take")
        release = _strings(body, "release")
        answer = self._held(body, lambda wait: self._host.lease(owner, ttl, take, release, wait))
        return _json(200, answer, self._host.restock if answer["leases"] else None)

    def _renew(self, environ: WSGIEnvironment) -> Response:
        body = _object(environ, "tokens")
        return _json(200, self._host.renew(_strings(body, "tokens")))

    def _cordon(self, environ: WSGIEnvironment) -> Response:
        body = _object(environ, "owner", "ttl", "release")
        owner, ttl = _string(body, "owner"), _number(body, "ttl", 0.0, MAX_TTL)
        return _json(200, {"cordoned": self._host.cordon(owner, ttl, _strings(body, "release"))})

    def _execute(self, environ: WSGIEnvironment, slot: str, lease: str) -> Response:
        body = _object(environ, "execution_id", "tool", "args", "timeout", "wait")
        call = _call(body, slot, lease)
        (answer,), afterwards = self._held(body, lambda wait: self._host.execute([call], wait))
        status = answer.status if isinstance(answer, RequestFailed) else 202 if answer is None else 200
        return _json(status, _answered(answer), afterwards)

    def _batch(self, environ: WSGIEnvironment) -> Response:
        body = _object(environ, "calls", "wait")
        calls = body.get("calls")
        if not isinstance(calls, list) or len(calls) > MAX_BATCH or not all(isinstance(call, dict) for call in calls):
            raise protocol.invalid("calls", f"a list of at most {MAX_BATCH} objects", _kind(calls))
        parsed = [_call(call, _string(call, "slot"), _string(call, "lease")) for call in calls]
        answers, afterwards = self._held(body, lambda wait: self._host.execute(parsed, wait))
        return _json(200, {"results": [_answered(answer) for answer in answers]}, afterwards)

    def _cancel(self, environ: WSGIEnvironment, slot: str, lease: str) -> Response:
        body = _object(environ, "execution_id")
        return _json(200, {"cancelled": self._host.cancel(slot, lease, _string(body, "execution_id"))})

    def _reset(self, environ: WSGIEnvironment, slot: str, lease: str) -> Response:
        network = _object(environ, "network").get("network")
        if not isinstance(network, (bool, type(None))):
            raise protocol.invalid("network", "a boolean or null", network)
        return _json(200, {"network": self._host.reset(slot, lease, network)}, self._host.restock)

    def _read_file(self, environ: WSGIEnvironment, slot: str, lease: str) -> Response:
        reading = transfer.read(self._host, slot, lease, _path(environ))
        return Response(200, reading, reading.size, "application/octet-stream", reading.close)

    def _write_file(self, environ: WSGIEnvironment, slot: str, lease: str) -> Response:
        size = _length(environ, self._host.config.max_file, "content")
        transfer.write(self._host, slot, lease, _path(environ), size, environ["wsgi.input"].read1)
        return Response(204, (), 0, "")


def _of_method(methods: Mapping[str, Callable[..., Response]], method: str) -> Callable[..., Response]:
    if method not in methods:
        raise RequestFailed("method_not_allowed", f"expected {' or '.join(methods)}, got {method}")
    return methods[method]


def _answered(answer: Answer) -> Mapping[str, object]:
    if answer is None:
        return {"running": True}
    if isinstance(answer, RequestFailed):
        return {"error": answer.body}
    return answer


def _length(environ: WSGIEnvironment, limit: int, field: str) -> int:
    length = int(environ.get("CONTENT_LENGTH") or 0)
    if length > limit:
        got = f"{length} bytes"
        raise RequestFailed(
            "too_large", f"{field}: at most {limit} bytes, got {got}", field=field, expected=f"at most {limit} bytes", got=got
        )
    return length


def _body(environ: WSGIEnvironment, limit: int, field: str) -> bytes:
    length = _length(environ, limit, field)
    try:
        body: bytes = environ["wsgi.input"].read(length)
    except OSError as e:
        raise protocol.invalid(field, f"{length} bytes", f"fewer: {e}") from e
    return body


def _object(environ: WSGIEnvironment, *fields: str) -> dict[str, Any]:
    """The request's JSON object, with no fields but these."""
    text = _body(environ, protocol.MAX_JSON, "body")
    try:
        value = protocol.parse(text)
    except (ValueError, RecursionError) as e:
        raise protocol.invalid("body", "JSON", f"{len(text)} bytes: {e}") from e
    if not isinstance(value, dict):
        raise protocol.invalid("body", "a JSON object", _kind(value))
    for name in value:
        if name not in fields:
            raise protocol.invalid("body", "only the fields " + ", ".join(fields), name)
    return value


def _kind(value: object) -> str:
    """What to show of a value in which tokens may be."""
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, (str, list, dict)) else type(value).__name__


def _string(body: dict[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value or len(value) > 1000 or not value.isprintable():
        got = _kind(value) if name == "lease" else value
        raise protocol.invalid(name, "a printable string of 1 to 1000 characters", got)
    return value


def _strings(body: dict[str, Any], name: str) -> Sequence[str]:
    value = body.get(name, [])
    if not isinstance(value, list) or len(value) > 10 * MAX_BATCH or not all(isinstance(one, str) for one in value):
        raise protocol.invalid(name, "a list of strings", _kind(value))
    return value


def _number(body: dict[str, Any], name: str, low: float, high: float) -> float:
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:  # nor is NaN
        raise protocol.invalid(name, f"a number of seconds from {low:g} to {high:g}", value)
    return float(value)


def _count(body: dict[str, Any], name: str) -> int:
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_BATCH:
        raise protocol.invalid(name, f"an integer from 0 to {MAX_BATCH}", value)
    return value


def _call(body: dict[str, Any], slot: str, lease: str) -> protocol.CallRequest:
    return {
        "slot": slot,
        "lease": lease,
        "execution_id": _string(body, "execution_id"),
        "tool": body.get("tool"),  # type: ignore[typeddict-item]  # checked where the tools are known
        "args": body.get("args"),  # type: ignore[typeddict-item]
        "timeout": _number(body, "timeout", 0.001, MAX_TIMEOUT),
    }


def _path(environ: WSGIEnvironment) -> str:
    """The query's one field; percent-encoded bytes, as paths need not be UTF-8."""
    fields: list[tuple[str, str]] = urllib.parse.parse_qsl(
        environ.get("QUERY_STRING", ""), keep_blank_values=True, errors="surrogateescape"
    )
    if [name for name, _ in fields] != ["path"]:
        raise protocol.invalid("query", "path=PATH and nothing else", environ.get("QUERY_STRING", ""))
    return fields[0][1]
