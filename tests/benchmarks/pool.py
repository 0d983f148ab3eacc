"""What a lease costs the pool itself: many containers without real slots, behind the real protocol.

    python tests/benchmarks/pool.py [CONTAINERS [SLOTS]]

Each container is the server's own HTTP front, application and lease table, with nothing behind them; all are in one process
beside the pool's.
"""

from __future__ import annotations

import os
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from slotpool import SlotPool
from slotpool.sandbox.app import App
from slotpool.sandbox.front import Front
from slotpool.sandbox.leases import LeaseTable
from slotpool.sandbox.tally import Tally

ROUNDS = 2000


class HollowHost:
    """Leases without slots. Cleaning takes no time."""

    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._lock = threading.Lock()  # guards the table
        self._table = LeaseTable([f"slot_{i}" for i in range(slots)])
        for i in range(slots):
            self._table.ready(f"slot_{i}")
        self.boot_id = secrets.token_hex(8)
        self.tally = Tally()

    def lease(self, owner: str, ttl: float, take: int, release: Sequence[str], wait: float) -> dict[str, Any]:
        with self._lock:
            for slot in self._table.release(release):
                self._table.ready(slot)
            leases = self._table.take(owner, take, ttl, time.monotonic())
            told = [{"slot": one.slot, "token": one.token, "workspace": "/w", "network": True} for one in leases]
            return {"boot_id": self.boot_id, "leases": told, "leased": self._table.leased()}

    def renew(self, tokens: Sequence[str]) -> dict[str, Any]:
        renewals.append(len(tokens))
        with self._lock:
            lost = self._table.renew(tokens, time.monotonic())
            return {"boot_id": self.boot_id, "lost": lost, "usable": self._slots, "leased": self._table.leased()}

    def restock(self) -> None:
        """There is nothing to make in advance."""

    def health(self) -> dict[str, Any]:
        return {"name": "", "boot_id": self.boot_id, "isolation": "none", "slots": self._slots}


renewals: list[int] = []


def serve(directory: str, containers: int, slots: int) -> None:
    for i in range(containers):
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(f"{directory}/{i}")
        listener.listen(100)
        app = App(HollowHost(slots), None, 1000)  # type: ignore[arg-type]
        threading.Thread(target=Front(app, listener, 1000).run, daemon=True).start()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(len(renewals), flush=True)


def measure(containers: int, slots: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, "serve", directory, str(containers), str(slots)]
        server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdout.readline()
        addresses = [f"unix://{directory}/{i}" for i in range(containers)]
        try:
            with SlotPool(servers=addresses, acquire_timeout=60, health_check_interval=2.0) as pool:
                while pool.total_slots < containers * slots:
                    time.sleep(0.05)
                print(f"{containers} containers, {pool.total_slots} slots:")
                one_thread(pool, "none held")
                held = [pool.acquire() for _ in range(containers * slots * 3 // 4)]
                one_thread(pool, f"{len(held)} held")
                many_threads(pool, 200)
                server.stdin.write("\n")
                server.stdin.flush()
                before = int(server.stdout.readline())
                time.sleep(10.0)
                server.stdin.write("\n")
                server.stdin.flush()
                asked = int(server.stdout.readline()) - before
                each = asked / containers / 5
                print(f"  renewals: {each:.2f} a container and period; {threading.active_count()} threads")
                for slot in held:
                    slot.release()
        finally:
            server.kill()
            server.wait()


def one_thread(pool: SlotPool, what: str) -> None:
    acquired, released = [], []
    cpu = time.process_time()
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        slot = pool.acquire()
        got = time.perf_counter()
        slot._tenure.used = True  # as if something had been run, so that it goes back to its server
        there = time.perf_counter()
        slot.release()
        released.append(time.perf_counter() - there)
        acquired.append(got - begun)
        time.sleep(0.001)
    cpu = (time.process_time() - cpu) / ROUNDS * 1000
    a, r = statistics.median(acquired) * 1000, statistics.median(released) * 1000
    print(f"  {what}: acquire p50 {a:.3f} ms, release p50 {r:.3f} ms; {cpu:.3f} ms of CPU for both, with their requests")


def many_threads(pool: SlotPool, count: int) -> None:
    times: list[float] = []

    def work(_: int) -> None:
        for _ in range(10):
            begun = time.perf_counter()
            slot = pool.acquire()
            times.append(time.perf_counter() - begun)
            slot._tenure.used = True
            time.sleep(0.2)
            slot.release()

    with ThreadPoolExecutor(count) as callers:
        list(callers.map(work, range(count)))
    print(f"  {count} threads, each a lease of 0.2 s at a time: acquire p50 {statistics.median(times) * 1000:.3f} ms")


if __name__ == "__main__":
    words = sys.argv[1:]
    if words[:1] == ["serve"]:
        serve(words[1], int(words[2]), int(words[3]))
    else:
        os.environ.pop("NOMAD_ADDR", None)
        measure(int(words[0]) if words else 200, int(words[1]) if words[1:] else 50)
