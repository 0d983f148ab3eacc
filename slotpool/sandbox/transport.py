"""HTTP to one sandbox server: keep-alive connections by TCP or Unix socket, and what is known about a request that failed."""

from __future__ import annotations

import json
import socket
import urllib.parse
from typing import Any, Dict, Mapping, Optional, Tuple

import urllib3
from urllib3.connection import HTTPConnection

CONNECT_TIMEOUT = 5.0  # seconds


class NotSent(Exception):
    """The server could not be reached: the request has had no effect."""


class Broken(Exception):
    """The connection broke, or no answer came in time, after the request may have been sent."""


class _UnixConnection(HTTPConnection):
    """An HTTP connection whose host is a socket's path, percent-encoded."""

    def _new_conn(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        timeout = self.timeout if isinstance(self.timeout, (int, float)) else CONNECT_TIMEOUT
        sock.settimeout(timeout)
        try:
            sock.connect(urllib.parse.unquote(self.host))
        except OSError as e:
            sock.close()
            raise urllib3.exceptions.NewConnectionError(self, f"can't connect: {e}") from e
        return sock

    def connect(self) -> None:
        self.sock = self._new_conn()


class _UnixPool(urllib3.HTTPConnectionPool):
    ConnectionCls = _UnixConnection

    def __init__(self, path: str, **settings: Any) -> None:
        super().__init__(urllib.parse.quote(path, safe=""), **settings)


class Transport:
    """Requests to one server. Thread-safe; keeps up to ``connections`` open.

    Nothing is ever sent twice: repeating is for the caller, who knows what may be repeated.
    """

    def __init__(self, address: str, token: Optional[str], connections: int) -> None:
        self.address = address
        parts = urllib.parse.urlsplit(address)
        settings: Dict[str, Any] = {"maxsize": connections, "retries": False}
        if parts.scheme == "unix":
            self._pool: urllib3.HTTPConnectionPool = _UnixPool(parts.path, **settings)
        elif parts.scheme == "https":
            self._pool = urllib3.HTTPSConnectionPool(parts.hostname or "", parts.port, **settings)
        else:
            self._pool = urllib3.HTTPConnectionPool(parts.hostname or "", parts.port, **settings)
        self._headers = {"Host": "sandbox", "Accept-Encoding": "identity"}
        if parts.scheme != "unix":
            del self._headers["Host"]
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"

    def request(
        self, method: str, path: str, body: Optional[bytes], read_timeout: float, headers: Optional[Mapping[str, str]] = None
    ) -> Tuple[int, bytes, str]:
        """Status, content and content type of the answer.

        :param read_timeout: seconds that the server may be silent.
        :raises NotSent, Broken: if there was none.
        """
        try:
            answer = self._pool.urlopen(
                method,
                path,
                body=body,
                headers={**self._headers, **headers} if headers else self._headers,
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT, read=read_timeout),
                redirect=False,
                assert_same_host=False,
            )
        except (urllib3.exceptions.NewConnectionError, urllib3.exceptions.ConnectTimeoutError) as e:
            raise NotSent(str(e)) from e
        except (urllib3.exceptions.HTTPError, OSError) as e:
            raise Broken(f"{type(e).__name__}: {e}") from e
        return answer.status, answer.data, answer.headers.get("Content-Type", "")

    def post(self, path: str, body: object, read_timeout: float, headers: Optional[Mapping[str, str]] = None) -> Tuple[int, Any]:
        """POST JSON; status and the JSON of the answer, None if it is not JSON."""
        return self.json("POST", path, json.dumps(body).encode(), read_timeout, headers)

    def json(
        self, method: str, path: str, body: Optional[bytes], read_timeout: float, headers: Optional[Mapping[str, str]] = None
    ) -> Tuple[int, Any]:
        status, content, _ = self.request(method, path, body, read_timeout, headers)
        try:
            return status, json.loads(content)
        except ValueError:
            return status, None

    def close(self) -> None:
        """Close idle connections; those in use are closed when their request ends."""
        self._pool.close()
