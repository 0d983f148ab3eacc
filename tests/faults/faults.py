"""Faults at random: each kind does something to a server, a client, or the network between them, and undoes it in its time."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import os
import random
import resource
import select
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Callable

from history import History
from machines import Client, Server, set_clock
from weather import Link

from slotpool.sandbox.killing import children

LEEWAY = 8 << 20  # bytes of memory that a server may still take when it is short of it
DESCRIPTORS = 3  # that it may still open when it is short of them
_AGAIN = 0.01  # seconds until what could not be undone is tried again

Undo = Callable[[], None]


class Faults:
    """Used by one thread."""

    def __init__(
        self, rng: random.Random, servers: list[Server], clients: list[Client], clock: Path, ttl: float, history: History
    ) -> None:
        self._random = rng
        self._servers = servers
        self._clients = clients  # a client that is killed is taken out
        self._clock = clock
        self._ttl = ttl
        self._history = history
        self.tally: Counter[str] = Counter()
        self._undoes: list[tuple[float, int, Undo]] = []
        self._serial = itertools.count()

    def one(self) -> None:
        """Do something."""
        (what,) = self._random.choices([*KINDS], [*KINDS.values()])
        # What it was meant for is not there just now; or only root may do that to a nursery.
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, IndexError, PermissionError):
            whom = getattr(self, what)()
            self.tally[what] += 1
            self._history.write("fault", what=what, whom=whom)

    def undo(self, everything: bool = False) -> None:
        """What is due, or all."""
        while self._undoes and (everything or self._undoes[0][0] <= time.monotonic()):
            heapq.heappop(self._undoes)[2]()

    def next_undo(self) -> float:
        """When one is due, on the monotonic clock."""
        return self._undoes[0][0] if self._undoes else math.inf

    def _later(self, after: float, undo: Undo) -> None:
        heapq.heappush(self._undoes, (time.monotonic() + after, next(self._serial), undo))

    def _server(self) -> Server:
        return self._random.choice([server for server in self._servers if server.up])

    def _short_or_long(self) -> float:
        """Seconds: unnoticed, or longer than a lease lives."""
        short, long = self._random.uniform(0.05, 0.5), self._random.uniform(1.2, 1.8) * self._ttl
        return self._random.choice([short, long])

    # Processes

    def kill_server(self) -> str:
        return self._end(_pid, "it was killed")

    def kill_nursery(self) -> str:
        return self._end(_nursery, "its nursery was killed")

    def _end(self, find: Callable[[Server], int], why: str) -> str:
        server = self._server()
        with _held(find(server)) as process:
            server.why = why
            process.send(signal.SIGKILL)
        return server.name

    def kill_zygote(self) -> str:
        server = self._server()
        with _held(self._zygote(server)) as process:
            process.send(signal.SIGKILL)
        return server.name

    def kill_client(self) -> str:
        client = self._random.choice(self._clients)
        self._clients.remove(client)
        client.process.kill()
        client.wait()
        return client.name

    def pause_server(self) -> str:
        server = self._server()
        self._pause(_pid(server), self._short_or_long())
        return server.name

    def pause_nursery(self) -> str:
        server = self._server()
        self._pause(_nursery(server), self._random.uniform(0.05, 1.0))
        return server.name

    def pause_zygote(self) -> str:
        server = self._server()
        self._pause(self._zygote(server), self._short_or_long())
        return server.name

    def pause_client(self) -> str:
        client = self._random.choice(self._clients)
        self._pause(client.process.pid, self._short_or_long())
        return client.name

    def _pause(self, pid: int, seconds: float) -> None:
        process = _Process(pid)
        process.send(signal.SIGSTOP)

        def go_on() -> None:
            with contextlib.suppress(ProcessLookupError), contextlib.closing(process):
                process.send(signal.SIGCONT)

        self._later(seconds, go_on)

    def _zygote(self, server: Server) -> int:
        """One that is in a slot already, as what has another user than the server; or any, where users are all the same."""
        found = [pid for pid in children(_nursery(server)) if os.geteuid() != 0 or os.stat(f"/proc/{pid}").st_uid != 0]
        return self._random.choice(found)

    # The network

    def cut_connections(self) -> str:
        client, link = self._link()
        link.proxy.cut_all()
        return client.name

    def cut_often(self) -> str:
        return self._weather("cuts", self._random.uniform(0.02, 0.3))

    def delay(self) -> str:
        return self._weather("latency", self._random.uniform(0.01, 0.2))

    def throttle(self) -> str:
        return self._weather("rate", self._random.uniform(2_000, 50_000))

    def _weather(self, name: str, bad: float) -> str:
        client, link = self._link()
        setattr(link, name, bad)
        self._later(self._random.uniform(0.2, 2.0), lambda: setattr(link, name, 0.0))
        return client.name

    def hold_up(self) -> str:
        """What is on its way comes late: a request perhaps when its lease has ended, and another has the slot."""
        client, link = self._link()
        seconds = self._short_or_long()
        for direction in self._random.choice([("request",), ("answer",), ("request", "answer")]):
            link.passing[direction].clear()
            self._later(seconds, link.passing[direction].set)
        return client.name

    def _link(self) -> tuple[Client, Link]:
        client = self._random.choice(self._clients)
        return client, self._random.choice(client.links)

    # What is short, or wrong

    def step_clock(self) -> str:
        set_clock(self._clock, self._random.choice([-1.0, 1.0]) * self._random.choice([2, 100, 86_400]))
        return "everybody"

    def fill_disk(self) -> str:
        server = self._random.choice([server for server in self._servers if os.path.ismount(server.state)])
        filler = Path(server.state) / "filler"
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        self._later(self._random.uniform(0.2, 2.0), lambda: filler.unlink(missing_ok=True))
        return server.name

    def take_descriptors(self) -> str:
        server = self._server()
        pid = _pid(server)
        self._limit(pid, resource.RLIMIT_NOFILE, len(os.listdir(f"/proc/{pid}/fd")) + DESCRIPTORS)
        return server.name

    def take_nursery_descriptors(self) -> str:
        server = self._server()
        pid = _nursery(server)
        self._limit(pid, resource.RLIMIT_NOFILE, len(os.listdir(f"/proc/{pid}/fd")) + DESCRIPTORS)
        return server.name

    def take_memory(self) -> str:
        server = self._server()
        pid = _pid(server)
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        self._limit(pid, resource.RLIMIT_AS, pages * resource.getpagesize() + LEEWAY)
        return server.name

    def _limit(self, pid: int, what: int, soft: int) -> None:
        before, hard = resource.prlimit(pid, what)
        if before != hard:  # it is short of that already
            raise ProcessLookupError
        process = _Process(pid)

        def relax() -> None:
            try:
                with contextlib.suppress(ProcessLookupError):
                    process.send(0)
                    resource.prlimit(pid, what, (before, hard))
            except PermissionError:  # without CAP_SYS_RESOURCE, while a nursery has a slot's user ids to kill all of them
                self._later(_AGAIN, relax)
            else:
                process.close()

        self._later(self._random.uniform(0.1, 1.5), relax)
        resource.prlimit(pid, what, (soft, hard))


# How often each is done, one to the other.
KINDS = {
    "kill_server": 2,
    "kill_nursery": 1,
    "kill_zygote": 4,
    "kill_client": 2,
    "pause_server": 3,
    "pause_nursery": 2,
    "pause_zygote": 3,
    "pause_client": 5,
    "cut_connections": 4,
    "cut_often": 5,
    "delay": 3,
    "throttle": 2,
    "hold_up": 6,
    "step_clock": 4,
    "fill_disk": 2,
    "take_descriptors": 2,
    "take_nursery_descriptors": 1,
    "take_memory": 2,
}


class _Process:
    """One that is not reused for another under the same number."""

    def __init__(self, pid: int) -> None:
        self._fd = os.pidfd_open(pid)

    def send(self, signum: int) -> None:
        """:raises ProcessLookupError: it has ended."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if poll.poll(0):
            raise ProcessLookupError
        if signum:
            signal.pidfd_send_signal(self._fd, signum)

    def close(self) -> None:
        os.close(self._fd)


@contextlib.contextmanager
def _held(pid: int) -> Iterator[_Process]:
    with contextlib.closing(_Process(pid)) as process:
        yield process


def _pid(server: Server) -> int:
    if server.process is None or not server.up:
        raise ProcessLookupError
    return server.process.pid


def _nursery(server: Server) -> int:
    """Its first child; what else a server starts is not for long."""
    return sorted(children(_pid(server)))[0]
