"""Run a sandbox server: a host behind its WSGI application, until it is told to stop."""

from __future__ import annotations

import logging
import os
import resource
import select
import signal
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, Callable, NoReturn

import attr

from ..errors import StartFailed
from . import linux
from .app import App
from .front import Front
from .host import Host
from .nursery_process import NurseryProcess
from .tenancies import HostConfig

if TYPE_CHECKING:
    import ssl

log = logging.getLogger(__name__)

_BACKLOG = 1024  # connections that wait to be accepted
_MOST_CONNECTIONS = 2000
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@attr.s(slots=True, auto_attribs=True, frozen=True)
class ServeConfig:
    """Where a server listens, whom it lets in, and when it ends."""

    host: HostConfig = attr.ib(factory=HostConfig)
    listen: str | None = "127.0.0.1"  # address; None for a Unix socket, whose path is then Host.socket_path
    port: int = 8080  # 0 for any free one
    token: str | None = None
    parent: int | None = None  # a process to end with
    tls_cert: str | None = (
        None  # file of the server's certificate and those of who signed it (PEM); connections are encrypted then
    )
    tls_key: str | None = None  # file of its key, if that is not in the same one


def serve(config: ServeConfig, on_ready: Callable[[str], None], nursery: NurseryProcess | None = None) -> None:
    """Serve until SIGTERM, SIGINT, or the end of ``config.parent``; in the main thread.

    :param on_ready: called with the address once it listens.
    :param nursery: one that was just started, and ends with this; by default, one is.
    :raises StartFailed: nothing is left of the attempt.
    """
    if config.token is None and config.listen is not None and config.listen not in _LOOPBACK:
        raise StartFailed(
            f"refusing to listen on {config.listen} without a token, as everybody who reaches it could run commands; "
            "give one in SLOTPOOL_TOKEN, or listen on 127.0.0.1"
        )
    tls = _tls(config) if config.tls_cert is not None else None
    os.umask(0o022)  # slots' users must be able to pass through the directories made here
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a sandbox takes up to six, a call five, a waiting shell as many
    linux.set_child_subreaper()  # what a nursery leaves, if it is killed, comes here to be killed too
    _on_signals(_leave)
    try:
        host = Host(config.host, nursery or NurseryProcess())
    except OSError as e:  # a full disk, say
        raise StartFailed(f"the server could not start: {e}") from e
    try:
        with _Signalled() as signalled:
            front, address = _listen(config, host, tls)
            try:
                on_ready(address)
                signalled.wait()
                host.close()  # requests that wait are answered while the server still runs
            finally:
                front.close()
    finally:
        _on_signals(signal.SIG_IGN)
        host.close()


def _on_signals(handler: Any) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, handler)


def _leave(signum: int, frame: object) -> NoReturn:
    raise SystemExit(0)


class _Signalled:
    """SIGTERM or SIGINT, waited for by descriptor. A handler of Python's needs the main thread, which a signal does not wake
    from a system call if another thread is given it, or if it comes just before.
    """

    def __enter__(self) -> _Signalled:
        self._came, self._comes = socket.socketpair()
        self._comes.setblocking(False)
        signal.set_wakeup_fd(self._comes.fileno(), warn_on_full_buffer=False)
        _on_signals(lambda *_: None)
        return self

    def wait(self) -> None:
        self._came.recv(1)

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        self._came.close()
        self._comes.close()


def _listen(config: ServeConfig, host: Host, tls: ssl.SSLContext | None) -> tuple[Front, str]:
    """What accepts connections in a thread of its own, and where."""
    # A pool renews and gives back beside its callers' requests; so do others.
    app = App(host, config.token, most_held=2 * config.host.slots + 8)
    if config.listen is None:
        listener = _unix_listener(host.socket_path)
        address = f"unix://{host.socket_path}"
    else:
        family = socket.AF_INET6 if ":" in config.listen else socket.AF_INET
        try:
            listener = socket.create_server((config.listen, config.port), family=family, backlog=_BACKLOG)
        except OSError as e:
            raise StartFailed(f"can't listen on {_bracketed(config.listen)}:{config.port}: {e}") from e
        address = f"{'http' if tls is None else 'https'}://{_bracketed(config.listen)}:{listener.getsockname()[1]}"
    if config.token is None:
        log.warning(
            "serving without a token: every process on this machine that reaches %s can run commands in the slots", address
        )
    log.info("serving %d slots, isolation %s, on %s", config.host.slots, host.isolation.mode, address)
    threading.Thread(target=_watch_nursery, args=(host,), name="slotpool-nursery", daemon=True).start()
    if config.parent is not None:
        threading.Thread(target=_watch_parent, args=(config.parent,), name="slotpool-parent", daemon=True).start()
    front = Front(app, listener, _MOST_CONNECTIONS, tls)
    threading.Thread(target=_accept, args=(front,), name="slotpool-accept", daemon=True).start()
    return front, address


def _tls(config: ServeConfig) -> ssl.SSLContext:
    import ssl  # takes a while, and most servers need none

    assert config.tls_cert is not None
    try:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(config.tls_cert, config.tls_key, password="")  # else it would be asked for at the terminal
    except (OSError, ValueError) as e:
        files = config.tls_cert if config.tls_key is None else f"{config.tls_cert} and {config.tls_key}"
        raise StartFailed(f"expected a certificate and its key, not encrypted, as PEM in {files}: {e}") from e
    return context


def _accept(front: Front) -> None:
    try:
        front.run()
    except Exception:
        log.critical("no connection can be accepted any more; ending", exc_info=True)
        _stop()


def _unix_listener(path: str) -> socket.socket:
    """One that only this user may connect to."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    os.fchmod(listener.fileno(), 0o600)  # before it is bound: there is no moment when others could
    listener.bind(path)
    listener.listen(_BACKLOG)
    return listener


def _bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _watch_nursery(host: Host) -> None:
    if not host.wait_for_nursery():
        log.critical("the process that makes sandboxes has died; ending")
        _stop()


def _watch_parent(pid: int) -> None:
    """End with process ``pid``, however it ends, and also when it closes our standard input, which it holds open."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), select.POLLIN)
    try:
        parent = os.pidfd_open(pid)
    except ProcessLookupError:
        _stop()
        return
    poll.register(parent, select.POLLIN)
    poll.poll()
    _stop()


def _stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
