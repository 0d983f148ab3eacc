"""``slotpool bench``: what this machine gives, next to what a process, or a plain file, costs on it without any pool."""

from __future__ import annotations

import functools
import os
import platform
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Callable

import attr

from . import __version__
from .errors import SlotPoolError
from .pool import SlotPool
from .slot import Slot

_BLOCK = 50  # calls of one kind before the other kind's turn, so that both meet the machine in the same moods
_PACE = 0.010  # seconds between calls, about as an agent's calls come
_REST = 0.1  # seconds, by when a server has made in advance what it makes
_AT_ONCE = 10
_LARGE = 5  # times that a large file is written, and read


@attr.s(auto_attribs=True, frozen=True)
class Figure:
    """One line of the report. ``ratio`` is to the baseline above it, of the same kind."""

    name: str
    value: float
    unit: str
    ratio: float | None = None
    note: str = ""


def run(pool: SlotPool, rounds: int) -> list[Figure]:
    """Measure with a started pool of at least ten slots; ``rounds`` blocks of each kind."""
    figures: list[Figure] = []
    with pool.slot() as slot:
        for pace, name in ((_PACE, "10 ms apart"), (0.0, "back to back")):
            figures += _against_baseline(slot, pace, name, rounds)
        figures += _files(slot, rounds)
        if pool.config.backend == "local":  # else they may be larger than its servers' memory, which others share
            figures += _large_files(slot)
    figures += _leases(pool, rounds)
    figures += _at_once(pool, rounds)
    if pool.config.backend == "local":  # else its servers are not this process's, and who waits makes it grow
        figures += _hand_overs(pool, rounds)
        figures.append(_memory(pool))
    return figures


def _once(act: Callable[[], object]) -> float:
    """Milliseconds that it takes."""
    begun = time.perf_counter()
    act()
    return (time.perf_counter() - begun) * 1000


def _timed(act: Callable[[], object], pace: float, count: int = _BLOCK) -> list[float]:
    times = []
    for _ in range(count):
        times.append(_once(act))
        if pace:
            time.sleep(pace)
    return times


def _run_true() -> None:
    subprocess.run(["bash", "-c", "true"], check=True)


def _against_baseline(slot: Slot, pace: float, name: str, rounds: int) -> list[Figure]:
    bare: list[float] = []
    ours: list[float] = []
    for _ in range(rounds):
        bare += _timed(_run_true, pace)
        ours += _timed(lambda: slot.bash("true"), pace)
    base = statistics.median(bare)
    p99 = statistics.quantiles(ours, n=100)[98]
    return [
        Figure(f"subprocess.run bash -c true, {name}: p50", base, "ms", note="the baseline"),
        Figure(f's.bash("true"), {name}: p50', statistics.median(ours), "ms", statistics.median(ours) / base),
        Figure(f's.bash("true"), {name}: p99', p99, "ms", p99 / base, f"{p99 / statistics.median(ours):.1f} times the p50"),
    ]


def _files(slot: Slot, rounds: int) -> list[Figure]:
    figures = []
    for size, name in ((1024, "1 KiB"), (1024 * 1024, "1 MiB")):
        content = os.urandom(size)
        for act, verb in ((lambda: slot.write_file("f", content), "write"), (lambda: slot.read_bytes("f"), "read")):  # noqa: B023
            times = [t for _ in range(rounds) for t in _timed(act, 0.0)]
            p50 = statistics.median(times)
            figures.append(Figure(f"{verb} {name}: p50", p50, "ms", note=f"{size / 1048576 / p50 * 1000:.0f} MiB/s"))
    return figures


def _large_files(slot: Slot) -> list[Figure]:
    """Beside the same as a plain file, in turn: memory that a machine has not touched yet is slow, for whoever comes first."""
    content = os.urandom(1 << 20) * 100
    figures = []
    with tempfile.TemporaryDirectory() as directory:
        plain = Path(directory, "large")
        for verb, bare, ours in (
            ("write", lambda: plain.write_bytes(content), lambda: slot.write_file("large", content)),
            ("read", plain.read_bytes, lambda: slot.read_bytes("large")),
        ):
            try:
                bare()
            except OSError as e:
                raise SlotPoolError(f"{directory}: expected room for 100 MiB, got {e}; TMPDIR says where to write") from e
            times = [(_once(bare), _once(ours)) for _ in range(_LARGE)]
            base, took = (statistics.median(of_one) for of_one in zip(*times))
            figures += [
                Figure(f"{verb} a plain file of 100 MiB: p50", base, "ms", note="the baseline"),
                Figure(f"{verb} 100 MiB: p50", took, "ms", took / base, f"{100 / took * 1000:.0f} MiB/s"),
            ]
    return figures


def _hand_overs(pool: SlotPool, rounds: int) -> list[Figure]:
    slots = [pool.acquire() for _ in range(pool.total_slots)]
    bare: list[float] = []
    paced: list[float] = []
    rested: list[float] = []
    for _ in range(rounds):
        bare += _timed(_run_true, _PACE, _BLOCK // 3)
        paced += _hand_over(pool, slots, _PACE, _BLOCK // 3)
        rested += _hand_over(pool, slots, _REST, _BLOCK // 10)
    for slot in slots:
        slot.release()
    base = statistics.median(bare)
    figures = [Figure("subprocess.run bash -c true, beside these: p50", base, "ms", note="the baseline")]
    for times, name in ((paced, "hand-over of a used slot: p50"), (rested, "  with a rest before each: p50")):
        p50 = statistics.median(times)
        note = "release to the return of a waiting acquire, cleaning included"
        figures.append(Figure(name, p50, "ms", p50 / base, note))
    return figures


def _hand_over(pool: SlotPool, slots: list[Slot], pace: float, count: int) -> list[float]:
    """Milliseconds from a release to the return of a thread that waits in ``acquire``.

    :param slots: all that there are.
    """
    times: list[float] = []

    def wait() -> None:
        slots.append(pool.acquire())
        times.append(time.perf_counter())

    for _ in range(count):
        slots[0].bash("true")  # so that there is something to clean
        waiter = threading.Thread(target=wait)
        waiter.start()
        while not pool.get_stats()["requests_waiting"]:
            time.sleep(0.001)
        time.sleep(pace)
        begun = time.perf_counter()
        slots.pop(0).release()
        waiter.join()
        times[-1] = (times[-1] - begun) * 1000
    return times


def _leases(pool: SlotPool, rounds: int) -> list[Figure]:
    acquiring, releasing = [], []
    for _ in range(rounds * _BLOCK):
        begun = time.perf_counter()
        slot = pool.acquire()
        acquired = time.perf_counter()
        slot.bash("true")  # so that there is something to clean
        used = time.perf_counter()
        slot.release()
        released = time.perf_counter()
        acquiring.append((acquired - begun) * 1000)
        releasing.append((released - used) * 1000)
        time.sleep(_PACE)
    both = statistics.median(a + r for a, r in zip(acquiring, releasing))
    return [
        Figure("acquire + release of a used slot: p50", both, "ms", note="as the caller sees it; cleaning goes on behind"),
        Figure("  of that, acquire: p50", statistics.median(acquiring), "ms"),
    ]


def _at_once(pool: SlotPool, rounds: int) -> list[Figure]:
    slots = [pool.acquire() for _ in range(_AT_ONCE)]

    def batch() -> None:
        for result in pool.execute_batch([(slot, "bash", {"command": "true"}) for slot in slots]):
            result.check()

    bare, ours, batched = [], [], []
    try:
        for _ in range(rounds):
            bare.append(_rate([_run_true] * _AT_ONCE))
            ours.append(_rate([functools.partial(slot.bash, "true") for slot in slots]))
            batched.append(_rate([batch]) * _AT_ONCE)
    finally:
        for slot in slots:
            slot.release()
    base = statistics.median(bare)
    figures = [Figure(f"subprocess.run bash -c true, {_AT_ONCE} threads at once", base, "/s", note="the baseline")]
    for rates, name in ((ours, f"{_AT_ONCE} slots at once"), (batched, f"execute_batch of {_AT_ONCE}")):
        rate = statistics.median(rates)
        figures.append(Figure(f"commands a second, {name}", rate, "/s", rate / base, f"most in a round: {max(rates):.0f}"))
    return figures


def _rate(acts: Sequence[Callable[[], object]]) -> float:
    """How many of them a second, each in a thread of its own and ``_BLOCK`` times."""
    start = threading.Barrier(len(acts) + 1)

    def work(act: Callable[[], object]) -> None:
        start.wait()
        for _ in range(_BLOCK):
            act()

    with ThreadPoolExecutor(len(acts)) as threads:
        working = [threads.submit(work, act) for act in acts]
        start.wait()
        begun = time.perf_counter()
        for one in working:
            one.result()
        return len(acts) * _BLOCK / (time.perf_counter() - begun)


def _memory(pool: SlotPool) -> Figure:
    """The proportional set size of what slots are made of: their sandboxes, zygotes and waiting shells."""
    for slot in [pool.acquire() for _ in range(_AT_ONCE)]:  # the last ones are being cleaned
        slot.release()
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        parents[int(stat.parent.name)] = int(fields[1])

    def depth(pid: int) -> int:
        """Steps up to this process: its servers are at 1, their nurseries at 2, what slots are made of is deeper."""
        steps = 0
        while pid not in (0, os.getpid()):
            pid = parents.get(pid, 0)
            steps += 1
        return steps if pid else 0

    total = 0
    for pid in [pid for pid in parents if depth(pid) > 2]:
        try:
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except PermissionError:
            return Figure("memory of a slot (PSS)", float("nan"), "MB", note="only root may read it")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since
        total += sum(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
    return Figure("memory of a slot (PSS)", total / 1024 / max(1, pool.total_slots), "MB")


def report(pool: SlotPool, figures: list[Figure]) -> dict[str, Any]:
    """All of it, ready for JSON."""
    return {
        "slotpool": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": os.cpu_count(),
        "isolation": pool.get_stats()["isolation"],
        "figures": [{**attr.asdict(f), "value": f.value if f.value == f.value else None} for f in figures],
    }


def compared(told: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The report with what an earlier one says of each figure, as ``before``."""
    known = {figure["name"]: figure["value"] for figure in before["figures"]}
    return {**told, "figures": [{**figure, "before": known.get(figure["name"])} for figure in told["figures"]]}


def as_text(told: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"slotpool {told['slotpool']}, isolation {', '.join(told['isolation'])}; Python {told['python']}, "
        f"Linux {told['kernel']}, {told['cores']} cores",
        f"{'':52} {'':>10}      x baseline",
    ]
    for figure in told["figures"]:
        ratio = f"{figure['ratio']:.2f}" if figure["ratio"] is not None else ""
        before = f"  was {_shown(figure['before'])}" if figure.get("before") is not None else ""
        if before and figure["value"] is not None:
            before += "" if not figure["before"] else f", now {figure['value'] / figure['before']:.2f} times that"
        line = f"{figure['name']:52} {_shown(figure['value']):>10} {figure['unit']:4} {ratio:>10}{before}  {figure['note']}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    if value is None:
        return "?"
    return f"{value:.3f}" if value < 100 else f"{value:.0f}"
