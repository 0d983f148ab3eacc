"""What this machine's containers give, beside what ``slotpool bench`` shows of one.

python tests/benchmarks/local.py [ISOLATION]
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from slotpool import SlotPool, SlotPoolConfig
from slotpool.slot import Slot

ROOT = sys.path[0]
_REST = 0.5  # seconds in which a shell is started in each of the slots
_SETTLED = 20.0  # seconds in which all slots of the containers are made
_FIRST = """
import os
from slotpool import SlotPool
with SlotPool() as pool, pool.slot() as slot:
    slot.bash("true").check()
    os.write(1, b"x")
"""


def main() -> None:
    isolation = sys.argv[1] if len(sys.argv) > 1 else "auto"
    start()
    imports()
    with SlotPool(SlotPoolConfig(isolation=isolation, slots_per_container=50, max_containers=1)) as pool:
        own_work(pool, 1)
        own_work(pool, 200)
        batches(pool)
    many(isolation)


def _python(code: str) -> float:
    """Seconds until it has ended."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": ROOT})
    return time.perf_counter() - begun


def start() -> None:
    baseline, firsts, wholes = [], [], []
    for _ in range(12):
        baseline.append(_python("import requests"))
        begun = time.perf_counter()
        child = subprocess.Popen([sys.executable, "-c", _FIRST], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": ROOT})
        with child:
            assert child.stdout is not None
            child.stdout.read(1)
            firsts.append(time.perf_counter() - begun)
        wholes.append(time.perf_counter() - begun)
    base = statistics.median(baseline)
    for name, times in (("its first result", firsts), ("its end", wholes)):
        took = statistics.median(times)
        print(f"python to {name}: {took * 1000:.0f} ms, {took / base:.2f} times import requests ({base * 1000:.0f} ms)")


def imports() -> None:
    codes = ("from slotpool import SlotPool", "import attr, urllib3")
    times = [[_python(code) for code in codes] for _ in range(24)]  # in turn, as a machine has slow moments
    ours, base = map(statistics.median, zip(*times))
    print(f"import SlotPool: {ours * 1000:.0f} ms, {ours / base:.2f} times import attr, urllib3")


def own_work(pool: SlotPool, threads: int) -> None:
    """Of slots that nobody has used, which are handed on without a request."""
    times: list[float] = []

    def work() -> None:
        for _ in range(4000 // threads):
            begun = time.perf_counter()
            pool.acquire().release()
            times.append(time.perf_counter() - begun)

    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    print(f"acquire + release without a request, {threads} threads: p50 {statistics.median(times) * 1000:.3f} ms")


def batches(pool: SlotPool) -> None:
    slots = [pool.acquire() for _ in range(50)]
    for rest, how in ((_REST, "a rest before each"), (0.0, "one upon another")):
        rates = []
        for _ in range(30):
            time.sleep(rest)
            begun = time.perf_counter()
            for result in pool.execute_batch([(slot, "bash", {"command": "true"}) for slot in slots]):
                result.check()
            rates.append(50 / (time.perf_counter() - begun))
        mean = len(rates) / sum(1 / rate for rate in rates)
        print(f"execute_batch in 50 slots of one container, {how}: {mean:.0f} commands/s")
    for slot in slots:
        slot.release()


def many(isolation: str) -> None:
    config = SlotPoolConfig(isolation=isolation, slots_per_container=50, min_containers=20, max_containers=20)
    with SlotPool(config) as pool:
        time.sleep(_SETTLED)
        begun = time.perf_counter()
        slots: list[Slot] = [pool.acquire() for _ in range(1000)]
        leased = time.perf_counter()
        for result in pool.execute_batch([(slot, "bash", {"command": "true"}) for slot in slots]):
            result.check()
        ran = time.perf_counter()
        for slot in slots:
            slot.release()
        released = time.perf_counter()
        slots = [pool.acquire(timeout=120) for _ in slots]  # each only once it is clean
        again = time.perf_counter()
        for slot in slots:
            slot.release()
    print(
        f"1,000 slots in 20 containers, {isolation}: {released - begun:.2f} s: "
        f"lease {leased - begun:.2f}, a command in each {ran - leased:.2f}, release {released - ran:.2f}; "
        f"then {again - released:.2f} s until all are clean and leased again"
    )


if __name__ == "__main__":
    main()
