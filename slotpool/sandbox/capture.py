"""Bounded output under a deadline: drive calls until their processes end, keeping head and tail of what they print."""

from __future__ import annotations

import fcntl
import logging
import math
import os
import select
import struct
import termios
import time
from collections import deque
from collections.abc import Sequence
from typing import Callable

import attr

from .call import Call

log = logging.getLogger(__name__)

KILL_LIMIT = 2.0  # seconds that the zygote has to kill a call, a little more than it gives itself
_READ_SIZE = 1 << 16
_MOST_READ = 1 << 20  # at once, when there is ever more
_NOTHING = b"\0" * 4  # the kernel's integer 0


class Output:
    """What one stream printed: everything up to ``limit`` bytes, beyond that its first and last halves."""

    def __init__(self, limit: int) -> None:
        self._head_limit = limit // 2
        self._tail_limit = limit - self._head_limit
        self._head = bytearray()
        self._tail: deque[bytes] = deque()  # chunks; the first may begin before the tail does
        self._tail_size = 0
        self._total = 0
        self._limit = limit

    def add(self, chunk: bytes) -> None:
        self._total += len(chunk)
        room = self._head_limit - len(self._head)
        if room > 0:
            self._head += chunk[:room]
            chunk = chunk[room:]
        if chunk and self._tail_limit:
            self._tail.append(chunk)
            self._tail_size += len(chunk)
            while self._tail_size - len(self._tail[0]) >= self._tail_limit:
                self._tail_size -= len(self._tail.popleft())

    def _tail_bytes(self) -> bytes:
        return b"".join(self._tail)[-self._tail_limit :] if self._tail else b""

    @property
    def truncated(self) -> bool:
        return self._total > self._limit

    def kept(self) -> bytes:
        """What was kept."""
        return bytes(self._head) + self._tail_bytes()

    def ends_with(self, suffix: bytes) -> bool:
        return self.kept().endswith(suffix)

    def text(self) -> str:
        """What was kept, as UTF-8, other bytes as surrogate escapes; a line in between says how much was left out."""
        if not self._total:
            return ""
        if not self.truncated:
            return self.kept().decode("utf-8", "surrogateescape")
        head = bytes(self._head[: _whole_characters(self._head)])
        tail = self._tail_bytes()
        start = 0
        while start < min(3, len(tail)) and tail[start] & 0xC0 == 0x80:
            start += 1  # the rest of a character whose beginning was left out
        omitted = self._total - len(head) - len(tail) + start
        parts = head, f"\n[... {omitted} bytes left out ...]\n".encode(), tail[start:]
        return b"".join(parts).decode("utf-8", "surrogateescape")


def _whole_characters(data: bytearray) -> int:
    """The length of ``data`` without a character at its end that was cut through."""
    for back in range(1, min(3, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        need = 2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else 4 if byte & 0xF8 == 0xF0 else 1
        return len(data) - back if need > back else len(data)
    return len(data)


@attr.s(slots=True, auto_attribs=True)
class Outcome:
    """How a call ended."""

    stdout: Output
    stderr: Output
    status: int | None = None  # as waitpid gives it; None if the zygote was lost before it could tell
    timed_out: bool = False
    cancelled: bool = False
    never_began: bool = False  # the waiting shell was killed, by what the slot ran before, ere it had read its command
    duration: float = 0.0  # seconds

    @property
    def lost(self) -> bool:
        return self.status is None


@attr.s(slots=True, auto_attribs=True, eq=False)
class Job:
    """A call with its limits, to be driven; ``on_end`` is called once, when ``outcome`` is complete."""

    call: Call
    deadline: float  # on the monotonic clock
    stdout_limit: int
    stderr_limit: int
    on_end: Callable[[], None]
    patience: float = math.inf  # seconds without a byte in or out after which it counts as past its deadline
    outcome: Outcome = attr.ib(init=False)
    read_size: int = attr.ib(default=_READ_SIZE, init=False)
    started: float = attr.ib(factory=time.monotonic, init=False)
    moved: float = attr.ib(factory=time.monotonic, init=False)  # when the last byte went in or out

    def __attrs_post_init__(self) -> None:
        self.outcome = Outcome(Output(self.stdout_limit), Output(self.stderr_limit))

    @property
    def due(self) -> float:
        """When it is to be ended, as things stand."""
        return min(self.deadline, self.moved + self.patience)

    def forgive(self, seconds: float) -> None:
        """That time was not the slot's."""
        self.deadline += seconds
        self.moved += seconds


class Driver:
    """Feed and read calls, side by side, until each has ended. Used by one thread at a time; in the end :meth:`close` it,
    or each of its calls.

    A call past its deadline is killed; if that can't be confirmed in ``KILL_LIMIT`` seconds, its outcome is ``lost``.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._poll = select.poll()
        self._handles: dict[int, tuple[Job, str]] = {}
        self._open = set(jobs)
        self._ended: list[Call] = []  # their descriptors are closed when there is time
        for job in jobs:
            call = job.call
            self._watch(job, "status", call.sock.fileno(), select.POLLIN)
            self._watch(job, "stdout", call.stdout, select.POLLIN)
            self._watch(job, "stderr", call.stderr, select.POLLIN)
            began = time.monotonic()
            for fd in call.feed_all():
                self._watch(job, "feed", fd, select.POLLOUT)
            if call.told >= 0:
                self._watch(job, "told", call.told, select.POLLIN)
            job.forgive(time.monotonic() - began)

    def _watch(self, job: Job, what: str, fd: int, events: int) -> None:
        self._handles[fd] = job, what
        self._poll.register(fd, events)

    def _unwatch(self, fd: int) -> None:
        if self._handles.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def run(self, until: float = float("inf")) -> bool:
        """Go on until all have ended, or until that time on the monotonic clock; whether all have ended."""
        try:
            while self.step(until):
                if self._ended and self._open:
                    self.close()
        except BaseException:  # this process is out of memory, say
            self._give_up()
            raise
        return not self._open

    def _give_up(self) -> None:
        """End what has not ended as lost, for those who wait for it."""
        self._handles.clear()
        while self._open:
            job = self._open.pop()
            job.outcome.status = None
            self._ended.append(job.call)
            try:
                job.on_end()
            except Exception:
                log.exception("who waits for an execution could not be told of its end")
        self.close()

    def step(self, until: float = float("inf")) -> bool:
        """Wait for something to happen, and see to it; False if there is nothing any more to wait for, until that time."""
        if not self._open:
            return False
        now = time.monotonic()
        first = min(job.due for job in self._open)
        if first > now >= until:
            return False
        for fd, event in self._poll.poll((min(first, until) - now) * 1000 + 1 if first > now else 0):
            if fd in self._handles:
                job, what = self._handles[fd]
                self._handle(job, what, fd, event)
        if now >= first:  # not before what has come, perhaps long ago: another's end may have taken its time
            for job in [job for job in self._open if now >= job.due]:
                self._expire(job, now)
        return True

    @property
    def ended(self) -> bool:
        return not self._open

    def _handle(self, job: Job, what: str, fd: int, event: int) -> None:
        if what == "status":
            job.outcome.status = job.call.read_status()
            self._finish(job)
        elif what == "told":
            job.outcome.status = job.call.read_told()
            if job.outcome.status is None:
                self._unwatch(fd)
            else:
                self._finish(job)
        elif what == "feed":
            job.moved = began = time.monotonic()
            if job.call.feed(fd):
                self._unwatch(fd)
            job.forgive(time.monotonic() - began)  # the content may have come slowly
        else:
            try:
                chunk = os.read(fd, job.read_size)
            except BlockingIOError:
                return
            if chunk:
                if len(chunk) == job.read_size < _MOST_READ:
                    job.read_size *= 2
                job.moved = time.monotonic()
                getattr(job.outcome, what).add(chunk)
            else:
                self._unwatch(fd)

    def _expire(self, job: Job, now: float) -> None:
        if job.outcome.timed_out:  # it was killed, and the zygote doesn't confirm it
            self._finish(job)
            return
        job.outcome.timed_out = True
        job.deadline, job.patience = now + KILL_LIMIT, math.inf
        job.call.kill()

    def _finish(self, job: Job) -> None:
        call = job.call
        for fd, output in ((call.stdout, job.outcome.stdout), (call.stderr, job.outcome.stderr)):
            if fd in self._handles:
                _drain(fd, output)
        if len(self._open) > 1:
            for fd in (call.sock.fileno(), call.stdout, call.stderr, *(feed.fd for feed in call.feeds)):
                self._unwatch(fd)
            self._unwatch(call.told)
        else:
            self._handles.clear()  # nothing is waited for any more
        status = job.outcome.status
        job.outcome.never_began = status is not None and status > 0 and call.script_unread()
        job.outcome.cancelled = call.end()
        job.outcome.duration = time.monotonic() - job.started
        self._ended.append(call)
        self._open.discard(job)
        job.on_end()

    def close(self) -> None:
        """Close the descriptors of the calls that have ended: once the answer is on its way, as nobody waits for that."""
        for call in self._ended:
            call.close()
        self._ended.clear()


def _drain(fd: int, output: Output) -> None:
    """Read what is in the pipe now; a background process may hold it open, and write to it, for ever."""
    told = fcntl.ioctl(fd, termios.FIONREAD, _NOTHING)
    left = 0 if told == _NOTHING else struct.unpack("i", told)[0]
    while left > 0:
        try:
            chunk = os.read(fd, min(left, _MOST_READ))
        except BlockingIOError:
            return
        if not chunk:
            return
        left -= len(chunk)
        output.add(chunk)
