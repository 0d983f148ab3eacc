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
from typing import Any, Callable, NoReturn

import attr

from ..errors import StartFailed
from .app import App
from .front import Front
from .host import Host
from .tenancies import HostConfig

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


def serve(config: ServeConfig, on_ready: Callable[[str], None]) -> None:
    """Serve until SIGTERM, SIGINT, or the end of ``config.parent``; in the main thread.

    :param on_ready: called with the address once it listens.
    :raises StartFailed: nothing is left of the attempt.
    """
    if config.token is None and config.listen is not None and config.listen not in _LOOPBACK:
        raise StartFailed(
            f"refusing to listen on {config.listen} without a token, as everybody who reaches it could run commands; "
            "give one in SLOTPOOL_TOKEN, or listen on 127.0.0.1"
        )
    os.umask(0o022)  # slots' users must be able to pass through the directories made here
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a call takes five descriptors, a waiting shell as many
    _on_signals(_leave)
    signal.signal(signal.SIGUSR1, _leave)
    host = Host(config.host)
    try:
        # Requests that wait are answered while the server still runs; only then is it left.
        _on_signals(lambda *_: threading.Thread(target=_end, args=(host,), name="slotpool-end").start())
        _listen(config, host, on_ready)
    finally:
        _on_signals(signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        host.close()


def _on_signals(handler: Any) -> None:
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, handler)


def _end(host: Host) -> None:
    host.close()
    os.kill(os.getpid(), signal.SIGUSR1)


def _leave(signum: int, frame: object) -> NoReturn:
    raise SystemExit(0)


def _listen(config: ServeConfig, host: Host, on_ready: Callable[[str], None]) -> None:
    # A pool renews and gives back beside its callers' requests; so do others.
    app = App(host, config.token, most_held=2 * config.host.slots + 8)
    if config.listen is None:
        listener = _unix_listener(host.socket_path)
        address = f"unix://{host.socket_path}"
    else:
        family = socket.AF_INET6 if ":" in config.listen else socket.AF_INET
        listener = socket.create_server((config.listen, config.port), family=family, backlog=_BACKLOG)
        address = f"http://{_bracketed(config.listen)}:{listener.getsockname()[1]}"
    if config.token is None:
        log.warning(
            "serving without a token: every process on this machine that reaches %s can run commands in the slots", address
        )
    log.info("serving %d slots, isolation %s, on %s", config.host.slots, host.isolation.mode, address)
    threading.Thread(target=_watch_nursery, args=(host,), name="slotpool-nursery", daemon=True).start()
    if config.parent is not None:
        threading.Thread(target=_watch_parent, args=(config.parent,), name="slotpool-parent", daemon=True).start()
    on_ready(address)
    front = Front(app, listener, _MOST_CONNECTIONS)
    try:
        front.run()
    finally:
        front.close()


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
