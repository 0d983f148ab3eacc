"""How Nomad is reached: address, token, namespace, TLS; and the ``requests`` session made of that."""

from __future__ import annotations

import os
import socket
import urllib.parse
from collections.abc import Mapping, MutableSet
from typing import Any, Callable

import attr
import requests
import urllib3
from requests.adapters import HTTPAdapter

from ...errors import ConfigError

DEFAULT_ADDRESS = "http://127.0.0.1:4646"
_CONNECTIONS = 16


@attr.s(slots=True, auto_attribs=True, frozen=True, kw_only=True)
class Connection:
    """The settings that all of Nomad's tools share, with their names there.

    https://developer.hashicorp.com/nomad/commands#environment-variables
    """

    address: str = DEFAULT_ADDRESS  # NOMAD_ADDR; http, https, or unix:///path
    token: str | None = attr.ib(default=None, repr=False)  # NOMAD_TOKEN
    namespace: str | None = None  # NOMAD_NAMESPACE
    region: str | None = None  # NOMAD_REGION
    cacert: str | None = None  # NOMAD_CACERT, a file
    capath: str | None = None  # NOMAD_CAPATH, a directory as `openssl rehash` makes it
    client_cert: str | None = None  # NOMAD_CLIENT_CERT
    client_key: str | None = None  # NOMAD_CLIENT_KEY
    tls_server_name: str | None = None  # NOMAD_TLS_SERVER_NAME
    skip_verify: bool = False  # NOMAD_SKIP_VERIFY
    http_auth: str | None = attr.ib(default=None, repr=False)  # NOMAD_HTTP_AUTH, `user:password`

    @classmethod
    def of(cls, given: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> Connection:
        """What is given, the rest from the environment.

        :raises ConfigError: a file is not there, or a certificate has no key.
        """
        variables = {
            "address": "NOMAD_ADDR",
            **{name: f"NOMAD_{name.upper()}" for name in attr.fields_dict(cls) if name not in ("address", "skip_verify")},
        }
        values: dict[str, Any] = {name: environ[variable] for name, variable in variables.items() if environ.get(variable)}
        values.update({name: value for name, value in given.items() if value is not None})
        if "skip_verify" not in values and environ.get("NOMAD_SKIP_VERIFY"):
            values["skip_verify"] = environ["NOMAD_SKIP_VERIFY"].lower() in ("1", "t", "true")  # as Go parses it
        connection = cls(**values)
        if connection.token is not None and not all("!" <= c <= "~" for c in connection.token):
            raise ConfigError("nomad_token", "printable ASCII characters without spaces", "something else (not shown)")
        for name in ("cacert", "capath", "client_cert", "client_key"):
            path = getattr(connection, name)
            if path is not None and not os.access(path, os.R_OK):
                raise ConfigError(f"nomad_{name}", "a file or directory that can be read", repr(path))
        if (connection.client_cert is None) != (connection.client_key is None):
            raise ConfigError("nomad_client_cert", "both nomad_client_cert and nomad_client_key", "one of them")
        return connection

    @property
    def url(self) -> str:
        """What paths are put behind."""
        if self.address.startswith("unix://"):
            return "http://" + urllib.parse.quote(self.address[len("unix://") :], safe="")
        return self.address.rstrip("/")

    @property
    def verify(self) -> bool | str:
        """For each request, as in a session the environment's ``REQUESTS_CA_BUNDLE`` would come before it."""
        return not self.skip_verify and (self.cacert or self.capath or True)

    def session(self, sockets: MutableSet[socket.socket]) -> requests.Session:
        """A session for any number of threads. Nothing is repeated in it.

        :param sockets: its connections' sockets are added there.
        """
        session = requests.Session()
        if self.address.startswith("unix://"):
            session.trust_env = False  # no proxy leads to it
            session.mount("http://", _UnixAdapter(self.address[len("unix://") :], sockets))
        else:
            session.mount(self.address.rstrip("/"), _NamedAdapter(self.tls_server_name, sockets))
        if self.token is not None:
            session.headers["X-Nomad-Token"] = self.token
        user, _, password = (self.http_auth or "").partition(":")
        session.auth = (user, password) if self.http_auth else _no_netrc
        if self.client_cert is not None and self.client_key is not None:
            session.cert = (self.client_cert, self.client_key)
        return session


def _no_netrc(request: requests.PreparedRequest) -> requests.PreparedRequest:
    """Without an ``auth`` of its own a session would send the password that ``~/.netrc`` has for this host."""
    return request


def _noting(kind: Any, sockets: MutableSet[socket.socket]) -> Any:
    """The connection class ``kind``, whose sockets are added to ``sockets``."""

    class Noting(kind):  # type: ignore[misc]
        def connect(self) -> None:
            super().connect()
            sockets.add(self.sock)

    return Noting


class _NamedAdapter(HTTPAdapter):
    """Expects a certificate for another name than the address's host, if one is given."""

    def __init__(self, server_name: str | None, sockets: MutableSet[socket.socket]) -> None:
        self._server_name = server_name
        self._sockets = sockets
        super().__init__(pool_maxsize=_CONNECTIONS)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        if self._server_name:
            kwargs.update(server_hostname=self._server_name, assert_hostname=self._server_name)
        super().init_poolmanager(*args, **kwargs)
        self._note(self.poolmanager)

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
        manager = super().proxy_manager_for(*args, **kwargs)
        self._note(manager)
        return manager

    def _note(self, manager: Any) -> None:
        pools: dict[str, Any] = {"http": urllib3.HTTPConnectionPool, "https": urllib3.HTTPSConnectionPool}
        manager.pool_classes_by_scheme = {
            scheme: type(pool.__name__, (pool,), {"ConnectionCls": _noting(pool.ConnectionCls, self._sockets)})
            for scheme, pool in pools.items()
        }


class _UnixConnection(urllib3.connection.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout if isinstance(self.timeout, (int, float)) else None)
        try:
            self.sock.connect(self._path)
        except OSError as e:
            self.close()
            raise urllib3.exceptions.NewConnectionError(self, f"{self._path}: {e}") from e


class _UnixPool(urllib3.HTTPConnectionPool):
    def __init__(self, path: str, sockets: MutableSet[socket.socket]) -> None:
        super().__init__("localhost", maxsize=_CONNECTIONS)
        self._path = path
        self._kind = _noting(_UnixConnection, sockets)

    def _new_conn(self) -> Any:
        return self._kind(self._path)


class _UnixAdapter(HTTPAdapter):
    """HTTP over a Unix socket, as a task has Nomad's API in its secrets directory."""

    def __init__(self, path: str, sockets: MutableSet[socket.socket]) -> None:
        self._pool = _UnixPool(path, sockets)
        super().__init__()

    def get_connection_with_tls_context(self, *args: Any, **kwargs: Any) -> Any:
        return self._pool

    get_connection: Callable[..., Any] = get_connection_with_tls_context  # requests before 2.32

    def close(self) -> None:
        self._pool.close()
        super().close()
