"""How long a pool on a standing Nomad agent takes, beside Nomad's own share: ``python nomad.py ADDRESS [SETTING=JSON ...]``.

From the pool's start to its first command's end, and from an ``acquire`` that has to wait to its slot in a new container; and
for both the time that Nomad and the driver take until the task has started, by its events.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
import urllib.request
from typing import Any

from slotpool import SlotPool

_ROUNDS = 5
_LATE = 1.5  # seconds until Nomad has told of a task's start


def started(address: str, allocation: str) -> float:
    """When the task had started, in seconds since 1970."""
    time.sleep(_LATE)
    with urllib.request.urlopen(f"{address}/v1/allocation/{allocation}") as answer:
        told = json.load(answer)
    events = [event for task in told["TaskStates"].values() for event in task["Events"]]
    return float(next(event["Time"] for event in events if event["Type"] == "Started")) / 1e9


def one_round(address: str, number: int, settings: dict[str, Any]) -> tuple[float, float, float, float]:
    small = {"cpu": 50, "memory": 128, "slots_per_container": 2, "max_containers": 2, "job_id": f"slotpool-bench-{number}"}
    begun = time.time()
    with SlotPool(nomad_address=address, **{**small, **settings}) as pool:
        with pool.slot() as s:
            s.bash("true")
            first = time.time() - begun
            first_own = started(address, s.alloc_id) - begun
        held = [pool.acquire() for _ in range(2)]
        asked = time.time()
        held.append(pool.acquire(timeout=120))
        more = time.time() - asked
        more_own = started(address, held[-1].alloc_id) - asked
        pool.stop(purge_job=True)
    return first, first_own, more, more_own


def main() -> None:
    address, *rest = sys.argv[1:]
    settings = {name: json.loads(value) for name, _, value in (word.partition("=") for word in rest)}
    rows = [one_round(address, number, settings) for number in range(_ROUNDS)]
    first, first_own, more, more_own = (statistics.median(column) for column in zip(*rows))
    print(f"start to first command: {first:.2f} s, of which Nomad takes {first_own:.2f}: {first - first_own:.2f} s over that")
    print(f"waiting acquire to slot: {more:.2f} s, of which Nomad takes {more_own:.2f}: {more - more_own:.2f} s over that")


if __name__ == "__main__":
    main()
