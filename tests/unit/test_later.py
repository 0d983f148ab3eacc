"""What is done when it is in nobody's way."""

from __future__ import annotations

import threading

from slotpool.sandbox.later import Later


def test_what_waits_is_bounded_and_nothing_is_forgotten() -> None:
    later = Later("test-later", 0.0)
    begun, go_on = threading.Event(), threading.Event()

    def hold_up() -> None:
        begun.set()
        go_on.wait()

    later.take(hold_up)
    begun.wait()
    done: list[int] = []
    for i in range(1000):
        later.take(lambda i=i: done.append(i))  # type: ignore[misc]
    assert 500 < len(done) < 1000  # by this thread, as the other one does not keep up
    go_on.set()
    later.stop()
    assert sorted(done) == list(range(1000))
