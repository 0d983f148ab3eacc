"""Many leases in one process, and what its processes have meanwhile: memory, threads, descriptors, connections, groups.

    python tests/faults/long_run.py [LEASES [ISOLATION]]

Of so many leases one is used: it has a command, a file and a background process, and its slot is cleaned behind it. The others
are given back as they were, and handed on. Now and then a command times out, or kills its slot's zygote.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
from pathlib import Path
from typing import Callable

import attr

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (1, 2)]

from slotpool import Slot, SlotPool
from slotpool.errors import SlotError
from slotpool.sandbox.killing import children

USED = 20  # one of so many leases
RARE = 100  # one of so many that are used
THREADS, SLOTS = 8, 4


@attr.s(auto_attribs=True, frozen=True)
class Sample:
    """What one process has."""

    kilobytes: int  # its proportional share of memory
    threads: int
    descriptors: int
    sockets: int
    groups: int  # control groups in those that it has open: of the server, those of its sandboxes

    @classmethod
    def of(cls, pid: int) -> Sample:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().split()
        descriptors = [_target(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
        return cls(
            int(rollup[rollup.index("Pss:") + 1]),
            len(os.listdir(f"/proc/{pid}/task")),
            len(descriptors),
            sum(target.startswith("socket:") for target in descriptors),
            sum(_directories_in(target) for target in descriptors if os.path.basename(target).startswith("slotpool-")),
        )


def _target(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:  # it was this listing's own, say
        return ""


def _directories_in(path: str) -> int:
    return sum(entry.is_dir() for entry in os.scandir(path)) if os.path.isdir(path) else 0


def use(slot: Slot, number: int) -> None:
    """One lease with everything in it."""
    assert slot.bash(f"ls -A; echo {number} >file; sleep 1000 & echo {number}").stdout == f"{number}\n"
    assert slot.read_file("file") == f"{number}\n"
    if number % RARE == 0:
        assert slot.bash("sleep 1000", timeout=0.05).timed_out
    if number % RARE == 1:
        try:
            slot.bash("kill -9 -1", timeout=5)  # everything of the slot that it can reach, the zygote too
        except SlotError:
            pass


def run(leases: int, used: int, isolation: str, pieces: int, each: Callable[[int, dict[str, Sample]], None]) -> None:
    """Take so many leases, of which one of ``used`` is used.

    :param each: told after each of so many ``pieces`` how many there were, and what the client, its server and the server's
        nursery have then.
    """
    with SlotPool(slots_per_container=SLOTS, max_containers=1, isolation=isolation, acquire_timeout=60) as pool:
        numbers = itertools.count(1)

        def work(until: int) -> None:
            while (number := next(numbers)) <= until:
                with pool.slot() as slot:
                    if number % used == 0:
                        use(slot, number // used)

        with pool.slot() as slot:
            slot.bash("true").check()
        (server,) = children(os.getpid())
        nursery = children(server)[0]
        done = 0
        for piece in range(1, pieces + 1):
            until = leases * piece // pieces
            numbers = itertools.count(done + 1)
            threads = [threading.Thread(target=work, args=(until,)) for _ in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            done = until
            with pool.slot() as slot:  # what was given back last is being cleaned meanwhile
                slot.bash("true").check()
            deadline = time.monotonic() + 10
            while pool.available_slots < SLOTS or pool.get_stats()["slots_ready"] < SLOTS:
                assert time.monotonic() < deadline, pool.get_stats()
                time.sleep(0.01)
            looked_at = {"client": os.getpid(), "server": server}
            if os.geteuid() == 0:  # nobody else may look at a nursery
                looked_at["nursery"] = nursery
            each(done, {name: Sample.of(pid) for name, pid in looked_at.items()})
        stats = pool.get_stats()
        assert stats["acquired_slots"] == 0
        assert stats["containers_lost"] == 0


def main() -> None:
    leases = int(sys.argv[1]) if len(sys.argv) > 1 else 200_000
    isolation = sys.argv[2] if len(sys.argv) > 2 else "auto"
    begun = time.monotonic()

    def each(done: int, samples: dict[str, Sample]) -> None:
        told = "; ".join(
            f"{name} {one.kilobytes} kB, {one.threads} threads, {one.descriptors} descriptors, {one.sockets} sockets, "
            f"{one.groups} groups"
            for name, one in samples.items()
        )
        print(f"{done} leases, {time.monotonic() - begun:.0f} s: {told}", flush=True)

    run(leases, USED, isolation, 20, each)


if __name__ == "__main__":
    main()
