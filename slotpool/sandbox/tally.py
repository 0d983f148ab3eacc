"""What a server counts. Plain numbers, as it must cost next to nothing; :mod:`.metrics` gives them to Prometheus."""

from __future__ import annotations

import bisect
import threading

from .protocol import Result

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0)  # seconds


class Histogram:
    """How many took up to each of :data:`BOUNDS`, and the sum, in seconds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)  # the last one for what took longer
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """As Prometheus has them: for each bound how many were within it."""
        total, found = 0, []
        for bound, count in zip((*BOUNDS, "+Inf"), self.counts):
            total += count
            found.append((str(bound), float(total)))
        return found


class Tally:
    """Since the server began. Thread-safe."""

    def __init__(self) -> None:
        self.lock = threading.Lock()  # guards all fields; held for a moment only
        self.leases_granted = 0
        self.leases_ended = {"released": 0, "expired": 0}
        self.began = 0
        self.ended: dict[tuple[str, str], int] = {}  # by tool and outcome, of which there are a few
        self.durations = Histogram()
        self.cleanings = Histogram()
        self.cleaning_failures = 0
        self.requests = 0
        self.requests_open = 0

    @property
    def executing(self) -> int:
        """Executions under way. The lock is held."""
        return self.began - self.executions

    @property
    def executions(self) -> int:
        """Executions that have ended. The lock is held."""
        return sum(self.ended.values())

    def leases(self, granted: int = 0, released: int = 0, expired: int = 0) -> None:
        with self.lock:
            self.leases_granted += granted
            self.leases_ended["released"] += released
            self.leases_ended["expired"] += expired

    def execution_began(self) -> None:
        with self.lock:
            self.began += 1

    def execution_ended(self, tool: str, result: Result | None) -> None:
        """
        :param tool: one of those that there are, not what a client has made up.
        :param result: None if there is none.
        """
        outcome = "lost" if result is None else _outcome(result)
        with self.lock:
            self.ended[tool, outcome] = self.ended.get((tool, outcome), 0) + 1
            if result is not None:
                self.durations.add(result["duration"])

    def cleaned(self, seconds: float, failed: bool) -> None:
        with self.lock:
            self.cleanings.add(seconds)
            self.cleaning_failures += failed

    def request(self, change: int) -> None:
        """One has come, 1, or has been answered, -1."""
        with self.lock:
            self.requests += change > 0
            self.requests_open += change


def _outcome(result: Result) -> str:
    if result["timed_out"]:
        return "timed_out"
    if result["cancelled"]:
        return "cancelled"
    return "failed" if result["exit_code"] or result["error"] else "succeeded"
