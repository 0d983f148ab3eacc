"""One run: clients, servers and faults for a while, then peace, and what the history shows."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attr
import history
from checker import violations
from conftest import ROOT, describe_slots, wait_until
from faults import Faults
from history import History
from machines import TOKEN, Client, Server, start_client, stepped_clock
from witness import Witness
from worker import PATIENCE

from slotpool.sandbox.client import SandboxClient

SLOTS = 3  # of each server
CLIENTS, THREADS = 3, 3
TTL = 1.5  # seconds
DISK = "8m"
_CLEAN = 30.0  # seconds in which slots must be clean, and processes gone, once nobody has any more


@attr.s(auto_attribs=True)
class Report:
    wrong: list[str]
    faults: Counter[str]
    cuts: Counter[str]
    events: Counter[str]
    said: str  # by servers and clients, if anything is wrong

    def figures(self) -> str:
        def told(counts: Counter[str]) -> str:
            return ", ".join(f"{what} {n}" for what, n in sorted(counts.items()))

        return "\n".join(
            [
                f"{self.events['hold']} leases, {self.events['call']} calls, {self.events['effect']} effects seen in slots",
                f"{sum(self.faults.values())} faults: {told(self.faults)}",
                f"cuts in rough weather: {told(self.cuts)}",
                f"{len(self.wrong)} violations",
            ]
        )


class Run:
    def __init__(self, seed: int, modes: list[str]) -> None:
        self.seed = seed
        self.mark = f"slotpool-faults-{os.getpid()}-{seed}"
        self.directory = Path(tempfile.mkdtemp(prefix="faults-"))
        self.history = History(self.directory / "harness.history")
        self.witness = Witness(self.history)
        self.clock, self.environment = stepped_clock(self.directory)
        self.servers: list[Server] = []
        self.clients: list[Client] = []
        self.logs: list[Path] = []
        self.cuts: Counter[str] = Counter()  # by place
        self._born = 0
        for i, mode in enumerate(modes):
            state = tempfile.mkdtemp(prefix=f"faults-server{i}-")
            if ROOT and i == 0:
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK},mode=0711", "faults", state], check=True)
            self.servers.append(Server(f"server{i}", mode, SLOTS, state, self.environment, self.history, seed))
            self.logs.append(self.servers[-1].log)

    def start(self) -> None:
        for server in self.servers:
            server.wait_up()
        for _ in range(CLIENTS):
            self.new_client()

    def new_client(self) -> None:
        self._born += 1
        rng = random.Random(f"{self.seed} {self._born}")
        links = [server.link(rng, self.cuts) for server in self.servers]
        orders: dict[str, Any] = {
            "client": f"c{self._born}",
            "seed": self.seed,
            "servers": [link.proxy.address for link in links],
            "token": TOKEN,
            "threads": THREADS,
            "ttl": TTL,
            "prefetch": self._born % 3,
            "network": any(server.mode == "bwrap" for server in self.servers),
            "witness": self.witness.port,
            "mark": self.mark,
            "directory": str(self.directory),
        }
        self.clients.append(start_client(orders, links, self.environment))
        self.logs.append(self.clients[-1].log)

    def disturb(self, seconds: float, rate: float) -> Faults:
        """Faults for so many seconds, so many a second on average; then all is well again."""
        rng = random.Random(self.seed)
        faults = Faults(rng, self.servers, self.clients, self.clock, TTL, self.history)
        following = time.monotonic() + rng.expovariate(rate)
        end = time.monotonic() + seconds
        try:
            while (now := time.monotonic()) < end:
                faults.undo()
                if following <= now:
                    faults.one()
                    following += rng.expovariate(rate)
                while len(self.clients) < CLIENTS:
                    self.new_client()
                time.sleep(max(0.0, min(following, faults.next_undo(), end) - time.monotonic()))
        finally:
            faults.undo(everything=True)
            for client in self.clients:
                for link in client.links:
                    link.clear()
        return faults

    def settle(self) -> None:
        """Let the clients come to an end, and see that all slots are clean."""
        for server in self.servers:
            server.wait_up()
        for client in self.clients:
            client.ask_to_end()
            self.history.write("asked", client=client.name, threads=client.threads)
        for client in self.clients:
            with contextlib.suppress(subprocess.TimeoutExpired):
                client.process.wait(PATIENCE + 30)
        for server in self.servers:
            with contextlib.closing(server.direct()) as direct:
                wait_until(lambda: all(slot["state"] in ("free", "quarantined") for slot in describe_slots(direct)), _CLEAN)
                self.history.write("slots", server=server.name, wanted=SLOTS, slots=describe_slots(direct))
                self._use_all(server.name, direct)

    def _use_all(self, name: str, direct: SandboxClient) -> None:
        """Each free slot once more, all at once: what an earlier holder has left in one, or still does there, is seen."""
        granted = direct.lease(name, 30.0, SLOTS)
        for number, lease in enumerate(granted["leases"]):
            told = {"holder": f"end-{name}-{number}", "part": 0, "call": f"end-{name}-{number}.0.1"}
            self.history.write("grant", boot=granted["boot_id"], slot=lease["slot"], lease=lease["token"])
            self.history.write("hold", holder=told["holder"], lease=lease["token"])
            self.history.write("call", **told)
            command = {"command": f"ls -A >&2; echo {told['call']}"}
            result = direct.execute(lease["slot"], lease["token"], "bash", command, 10.0)
            # There may be no way from the slot to the witness.
            self.history.write("effect", what="begin", stamp=time.time(), files=result["stderr"].split(), **told)
            self.history.write("result", call=told["call"], out=result["stdout"].strip(), well=result["exit_code"] == 0)
        direct.lease(name, 30.0, 0, [lease["token"] for lease in granted["leases"]])

    def stop(self) -> None:
        for client in self.clients:
            client.process.kill()
            client.wait()
        for server in self.servers:
            server.stop()
        wait_until(lambda: not list(self._left()), _CLEAN)
        for left in self._left():
            self.history.write("left", process=left)
        for log in self.logs:
            for line in log.read_text(errors="replace").splitlines():
                if "defect of slotpool" in line:
                    self.history.write("raised", client=log.stem, error=line)
        assert self.witness.missed() == 0
        self.witness.close()
        self.history.close()

    def _left(self) -> Iterator[str]:
        marks = [self.mark.encode(), *(server.state.encode() for server in self.servers)]
        for directory in Path("/proc").glob("[0-9]*"):
            try:
                told = (directory / "cmdline").read_bytes() + (directory / "environ").read_bytes()
            except OSError:
                continue
            if any(mark in told for mark in marks):
                yield f"process {directory.name}: {told[:100]!r}"
        for server in self.servers:
            yield from (f"directory {path}" for path in Path(server.state).iterdir())

    def report(self, faults: Faults) -> Report:
        events = history.read(self.directory)
        wrong = violations(events)
        said = "".join(f"\n{log}\n{log.read_text(errors='replace')}" for log in self.logs)
        return Report(wrong, faults.tally, self.cuts, Counter(str(event["kind"]) for event in events), said if wrong else "")

    def clear(self) -> None:
        for log in self.logs:
            log.unlink()
        for server in self.servers:
            if os.path.ismount(server.state):
                subprocess.run(["umount", server.state], check=True)
            shutil.rmtree(server.state)
        shutil.rmtree(self.directory)


def run(seed: int, seconds: float, rate: float, modes: list[str]) -> Report:
    """Faults for so many seconds, ``rate`` a second on average, all chosen by the seed, on servers of these isolations."""
    one = Run(seed, modes)
    try:
        try:
            one.start()
            faults = one.disturb(seconds, rate)
            one.settle()
        finally:
            one.stop()
        return one.report(faults)
    finally:
        one.clear()
