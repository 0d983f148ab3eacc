"""The network between one client and one server, as bad as it is told to be."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Iterator

from proxy import Proxy, Severed

_PACKET = 256  # bytes


class Link:
    """A proxy. Each field may be set at any time, from any thread.

    :param cut: counts the cuts, by place.
    """

    def __init__(self, target: str, rng: random.Random, cut: Counter[str]) -> None:
        self._random = rng
        self._cut = cut
        self.cuts = 0.0  # probability of a cut at each request and each answer
        self.latency = 0.0  # seconds at most
        self.rate = 0.0  # bytes a second; 0: no limit
        self.passing = {"request": threading.Event(), "answer": threading.Event()}  # else all is held up in that direction
        self.clear()
        self.proxy = Proxy(target, lambda: self._pass)

    def clear(self) -> None:
        self.cuts = self.latency = self.rate = 0.0
        for event in self.passing.values():
            event.set()

    def close(self) -> None:
        self.clear()
        self.proxy.close()

    def _pass(self, direction: str, data: bytes) -> Iterator[bytes]:
        self.passing[direction].wait()
        if self.latency:
            time.sleep(self._random.uniform(0.0, self.latency))
        severed = self._random.random() < self.cuts
        place = self._random.choice(["before", "in", "after"]) if severed else ""
        size = {"before": 0, "in": self._random.randrange(len(data))}.get(place, len(data))
        packet = _PACKET if self.rate else len(data)
        for at in range(0, size, packet):
            piece = data[at : min(at + packet, size)]
            if self.rate:
                time.sleep(len(piece) / self.rate)
            yield piece
        if severed:
            self._cut[f"{place} {'an answer' if direction == 'answer' else 'a request'}"] += 1
            raise Severed
