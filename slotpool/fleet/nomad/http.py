"""Requests to Nomad's HTTP API: which are repeated, and the one place that turns a status into an exception."""

from __future__ import annotations

import contextlib
import socket
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import requests

from ...errors import NomadDenied, NomadError, NomadUnreachable
from .connection import Connection

_CONNECT_TIMEOUT = 5.0  # seconds
_READ_TIMEOUT = 30.0
_PAUSES = (0.1, 0.3, 1.0, 2.0)  # seconds before each repetition
_INDEX = "X-Nomad-Index"
# What a server answers that has not done anything, as it has nobody to pass the request to.
_NO_LEADER = ("No cluster leader", "No path to region", "rpc error: failed to get conn", "Not ready to serve consistent reads")


class NomadHTTP:
    """Thread-safe.

    Reads are repeated for a few seconds when no server could be reached or there is no leader. Writes are repeated only when
    they certainly have had no effect: the connection was refused, or the answer says that there is no leader.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._session = connection.session(self._sockets)
        self._closed = threading.Event()

    def close(self) -> None:
        """Repetitions end; the connections are closed."""
        self._closed.set()
        self._session.close()

    def interrupt(self) -> None:
        """Shut the connections of requests that are under way, so that these fail; what blocks for a minute ends now."""
        for sock in list(self._sockets):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def get_text(self, path: str, needs: str, params: Mapping[str, str]) -> str:
        """What is at ``path``; empty if nothing is.

        :raises NomadError:
        """
        response = self._ask("GET", path, needs, dict(params), None, _READ_TIMEOUT, _PAUSES)
        return "" if response.status_code == 404 else response.text

    def get(
        self, path: str, needs: str, params: Mapping[str, str] | None = None, *, index: int = 0, wait: float = 0.0
    ) -> tuple[Any, int]:
        """What is at ``path``, or None if nothing is; and its index.

        :param needs: the ACL capability, for the error's text.
        :param index: with ``wait``, a blocking query: answered when that index has been passed, or after ``wait`` seconds.
        :raises NomadError:
        """
        query = dict(params or {})
        if wait:
            query.update(index=str(index), wait=f"{wait:g}s")
        # Nomad adds up to a sixteenth, so that those who wait don't all come back at once.
        pauses = () if wait else _PAUSES  # who follows something asks again anyway
        response = self._ask("GET", path, needs, query, None, _READ_TIMEOUT + wait * 17 / 16, pauses)
        if response.status_code == 404:
            return None, int(response.headers.get(_INDEX, 0))
        return self._json(response), int(response.headers.get(_INDEX, 0))

    def write(
        self,
        method: str,
        path: str,
        needs: str,
        body: object = None,
        params: Mapping[str, str] | None = None,
        *,
        missing_ok: bool = False,
    ) -> Any:
        """Change something; the answer.

        :param missing_ok: None if there is nothing at ``path``, instead of an error.
        :raises NomadError: ``status`` is None if it isn't known whether it was done.
        """
        response = self._ask(method, path, needs, dict(params or {}), body, _READ_TIMEOUT, _PAUSES)
        if response.status_code == 404:
            if missing_ok:
                return None
            raise self._error(method, path, needs, response)
        return self._json(response) if response.content else None

    def _json(self, response: requests.Response) -> Any:
        try:
            return response.json()
        except ValueError as e:
            text = response.text[:200]
            raise NomadError(f"{self.connection.address} answered with something else than JSON: {text!r}", None) from e

    def _ask(
        self,
        method: str,
        path: str,
        needs: str,
        params: dict[str, str],
        body: object,
        timeout: float,
        pauses: Sequence[float],
    ) -> requests.Response:
        for name in ("namespace", "region"):
            value = getattr(self.connection, name)
            if value is not None:
                params.setdefault(name, value)
        for pause in (*pauses, None):
            failure: NomadError
            try:
                response = self._session.request(
                    method,
                    self.connection.url + path,
                    params=params,
                    json=body,
                    timeout=(_CONNECT_TIMEOUT, timeout),
                    verify=self.connection.verify,
                    allow_redirects=False,  # the token is for this address
                )
            except requests.ConnectionError as e:
                failure = self._unreachable(e)
                again = method == "GET" or _was_not_sent(e)
                if isinstance(e, requests.exceptions.SSLError):
                    raise failure from e
            except requests.RequestException as e:
                failure, again = (
                    self._unreachable(e),
                    method == "GET" and isinstance(e, requests.exceptions.ChunkedEncodingError),
                )
            else:
                if response.status_code < 300 or response.status_code == 404:
                    return response
                failure = self._error(method, path, needs, response)
                again = response.status_code in (500, 429) and any(words in response.text for words in _NO_LEADER)
            if not again or pause is None or self._closed.wait(pause):
                raise failure
        raise AssertionError

    def _unreachable(self, e: Exception) -> NomadUnreachable:
        address = self.connection.address
        hint = "is an agent running there? `nomad agent -dev` starts one; NOMAD_ADDR or nomad_address says where it is"
        if isinstance(e, requests.exceptions.SSLError):
            hint = "check NOMAD_CACERT, NOMAD_CLIENT_CERT, NOMAD_CLIENT_KEY and NOMAD_TLS_SERVER_NAME"
        return NomadUnreachable(f"Nomad at {address} can't be reached: {_reason(e)}; {hint}")

    def _error(self, method: str, path: str, needs: str, response: requests.Response) -> NomadError:
        text = response.text.strip()[:1000] or response.reason
        status = response.status_code
        if response.is_redirect:
            text = (
                f"a redirect to {response.headers['Location'][:200]}, which is not followed; set NOMAD_ADDR to where it leads"
            )
        if status in (401, 403):
            who = "the token given" if self.connection.token else "no token was given, so the anonymous policy counts:"
            return NomadDenied(
                f"Nomad refused {method} {path}: {text}. It needs {needs}; check NOMAD_TOKEN ({who}) and its policy", status
            )
        if "nonexistent namespace" in text or ("namespace" in text.lower() and "not exist" in text):
            text += "; `nomad namespace list` shows those that there are, NOMAD_NAMESPACE or nomad_namespace chooses one"
        return NomadError(f"Nomad answered {method} {path} with {status}: {text}", status)


def _was_not_sent(e: requests.ConnectionError) -> bool:
    """Whether there was no connection to send it over."""
    reason = getattr(e.args[0], "reason", None) if e.args else None
    return isinstance(e, requests.ConnectTimeout) or type(reason).__name__ in ("NewConnectionError", "NameResolutionError")


def _reason(e: Exception) -> str:
    """The innermost of the exceptions that requests and urllib3 have wrapped it in."""
    inner: BaseException = e
    while True:
        below = inner.__cause__ or inner.__context__ or getattr(inner, "reason", None)
        if not isinstance(below, BaseException) or below is inner:
            return str(inner) or type(inner).__name__
        inner = below
