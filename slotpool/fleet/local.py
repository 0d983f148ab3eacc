"""Containers on this machine: a server process each, which ends with this process, however that ends."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Callable

from ..errors import IsolationUnavailable, StartFailed
from . import Member

log = logging.getLogger(__name__)

_BACKOFF = (0.0, 1.0, 5.0, 30.0)  # seconds before the next attempt, after so many servers in a row that failed to start
_END_LIMIT = 20.0  # seconds for a server to end all its sandboxes
_LINE = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL) (slotpool\.[\w.]+): (.*)")  # what a server logs
_KINDS = {kind.__name__: kind for kind in (IsolationUnavailable, StartFailed)}


class _Server:
    """One server process and the thread that follows what it says."""

    def __init__(self, index: int, settings: Mapping[str, Any], on_change: Callable[[_Server], None]) -> None:
        self.index = index
        self.id = f"local-{os.getpid()}-{index}-{secrets.token_hex(3)}"
        self.member: Member | None = None  # once it is ready
        self.failure: Exception | None = None  # once it has ended without having been ready
        self.ended = False
        self._token = secrets.token_urlsafe(24)
        self._on_change = on_change
        self._said: deque[str] = deque(maxlen=20)
        self._logs_to = log, logging.INFO  # where, and how, its last line was logged
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "slotpool.sandbox"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd="/",  # Python would import from the caller's directory first
            start_new_session=True,  # a Ctrl-C in the terminal is for the caller
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))},
        )
        # The token goes through this pipe, as the command line is everybody's to read. Its end tells the server to end.
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        try:
            debug = logging.getLogger("slotpool.sandbox").isEnabledFor(logging.DEBUG)
            more = {"token": self._token, "parent": os.getpid(), "log_level": "DEBUG" if debug else "INFO"}
            self._stdin.write(json.dumps({**settings, **more}).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:  # it has failed already, and says so
            pass
        self._follower = threading.Thread(target=self._follow, name=f"slotpool-{self.id}", daemon=True)
        try:
            self._follower.start()
        except BaseException:  # there can be no more threads
            self.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()
            raise

    def _follow(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as said:
            for line in said:
                self._hear(line.decode("utf-8", "replace").rstrip())
        code = self._process.wait()
        self.ask_to_end()  # closes the pipe
        self.ended = True
        if self.member is None and self.failure is None:
            last = "\n".join(self._said) or "nothing"
            self.failure = StartFailed(
                f"the server on this machine ended with exit code {code} before it was ready; it said:\n{last}"
            )
        self._on_change(self)

    def _hear(self, line: str) -> None:
        if line.startswith("{"):
            try:
                told = json.loads(line)
            except ValueError:
                told = {}
            if "ready" in told:
                self.member = Member(self.id, self.index, told["ready"], self._token)
                self._on_change(self)
                return
            if "failed" in told:
                self.failure = _KINDS.get(told["failed"], StartFailed)(told["message"])
                return
        self._said.append(line)
        if logged := _LINE.match(line):  # else it goes on, say with a traceback
            self._logs_to = logging.getLogger(logged[2]), int(getattr(logging, logged[1]))
        logger, level = self._logs_to
        logger.log(level, "%s: %s", self.id, logged[3] if logged else line)

    def ask_to_end(self) -> None:
        """Returns at once."""
        try:
            self._stdin.close()
        except BrokenPipeError:
            pass
        self._process.terminate()  # a process forked from this one may hold the pipe's other end

    def kill(self) -> None:
        """For one that does not answer. Its nursery notices, ends the sandboxes and removes the files."""
        self.ask_to_end()
        self._process.kill()

    def wait(self) -> None:
        """Wait until it has ended, as it was asked to."""
        try:
            self._process.wait(_END_LIMIT)
        except subprocess.TimeoutExpired:
            log.error("local server %s does not end; killing it", self.id)
            self._process.kill()
        self._follower.join(_END_LIMIT)


class LocalFleet:
    """Server processes of this process. Thread-safe.

    :param settings: what each server is given, see :mod:`slotpool.sandbox.__main__`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings = settings
        self._lock = threading.Lock()  # guards the fields below
        self._servers: dict[int, _Server] = {}  # by index
        self._ending: list[_Server] = []
        self._failures = 0  # servers in a row that ended before they were ready
        self._failure: Exception | None = None  # of the last of them
        self._not_before = 0.0
        self._stopped = False
        self._size = 0
        self._scaling = threading.Lock()  # lets one scaling run at a time, as starting a process takes a moment
        self._notify: Callable[[], None] = lambda: None

    def start(self, wanted: int, on_change: Callable[[], None]) -> None:
        self._notify = on_change
        try:
            self.grow(wanted)
        except (OSError, RuntimeError) as e:  # no more processes, descriptors or threads can be had
            raise StartFailed(f"a server could not be started on this machine: {e}") from e

    def members(self) -> Sequence[Member]:
        with self._lock:
            found = [server.member for _, server in sorted(self._servers.items())]
        return [member for member in found if member is not None]

    def failure(self) -> Exception | None:
        with self._lock:
            return self._failure

    def describe(self) -> str:
        with self._lock:
            ready = sum(server.member is not None for server in self._servers.values())
            return f"{ready} local server(s) ready, {len(self._servers) - ready} starting"

    def size(self) -> int:
        with self._lock:
            return self._size

    def grow(self, wanted: int) -> None:
        with self._scaling:
            with self._lock:
                if self._stopped:
                    return
                before, self._size = self._size, max(self._size, wanted)
                missing = [index for index in range(self._size) if index not in self._servers]
                if time.monotonic() < self._not_before:
                    missing = []
            try:
                for index in missing:
                    self._add(index)
            except BaseException:
                with self._lock:
                    self._size = before
                raise

    def shrink(self, wanted: int, closed: Collection[str], before: float) -> bool:
        with self._scaling:
            with self._lock:
                surplus = [server for index, server in self._servers.items() if index >= wanted]
                if self._stopped or any(server.member is not None and server.id not in closed for server in surplus):
                    return False
                self._size = min(self._size, wanted)
                for server in surplus:
                    del self._servers[server.index]
                self._ending += surplus
            for server in surplus:
                server.ask_to_end()
        return True

    def _add(self, index: int) -> None:
        server = _Server(index, self._settings, self._changed)
        with self._lock:
            stopped = self._stopped
            if not stopped and not server.ended:
                self._servers[index] = server
        if stopped:
            server.ask_to_end()
            server.wait()

    def _changed(self, server: _Server) -> None:
        with self._lock:
            if server.ended:
                if self._servers.get(server.index) is server:
                    del self._servers[server.index]
                    if not self._stopped:
                        log.warning("local server %s has ended", server.id)
                if server in self._ending:
                    self._ending.remove(server)
                elif server.failure is not None:
                    self._failure = server.failure
                    self._not_before = time.monotonic() + _BACKOFF[min(self._failures, len(_BACKOFF) - 1)]
                    self._failures += 1
            else:
                self._failure, self._failures = None, 0
        self._notify()

    def replace(self, member: Member) -> None:
        with self._lock:
            server = self._servers.get(member.index)
            if server is None or server.id != member.id:
                return
            del self._servers[member.index]
            self._ending.append(server)
        log.warning("killing local server %s", member.id)
        server.kill()

    def stop(self, purge: bool) -> None:
        with self._scaling, self._lock:
            self._stopped = True
            servers = [*self._servers.values(), *self._ending]
        for server in servers:  # as each ends it leaves the tables, so this can be done again after an interrupt
            server.ask_to_end()
        for server in servers:
            server.wait()
