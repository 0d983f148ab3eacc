"""What is done when it is in nobody's way."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import pytest

from slotpool.sandbox.later import Later, log


@contextlib.contextmanager
def held_up(later: Later) -> Iterator[None]:
    """Its thread does nothing meanwhile, and all that was left to it in the end."""
    begun, go_on = threading.Event(), threading.Event()

    def hold_up() -> None:
        begun.set()
        go_on.wait()

    later.take(hold_up)
    begun.wait()
    try:
        yield
    finally:
        go_on.set()
        later.stop()


def test_each_is_done_in_its_turn_and_by_a_thread_for_it() -> None:
    later = Later("test-later", 0.001)
    done: list[tuple[int, str]] = []
    last = threading.Event()
    for i in range(20):
        later.take(lambda i=i: done.append((i, threading.current_thread().name)))  # type: ignore[misc]
    later.take(last.set)
    assert last.wait(10)
    assert done == [(i, "test-later") for i in range(20)]
    again = threading.Event()
    later.take(again.set)  # the timer has run out meanwhile
    assert again.wait(10)
    later.stop()


def test_what_has_its_moment_later_is_done_before_it_stops_and_what_comes_after_that_at_once() -> None:
    later = Later("test-later", 3600.0)
    timer = later._timer
    done: list[int] = []
    later.take(lambda: done.append(1))
    assert done == []
    for _ in range(2):
        later.stop()
    assert done == [1]
    later.take(lambda: done.append(2))
    assert done == [1, 2]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(timer)


def test_what_is_in_a_hurry_waits_for_nothing_that_is_not_due() -> None:
    later = Later("test-later", 3600.0)
    done: list[int] = []
    first, second = threading.Event(), threading.Event()
    later.take(lambda: done.append(1))
    later.hurry(first.set)  # while the timer is set for the other
    assert first.wait(10)
    later.hurry(second.set)  # and when it has run out and was set again
    assert second.wait(10)
    assert done == []
    later.stop()
    assert done == [1]
    later.hurry(lambda: done.append(2))
    assert done == [1]


def test_what_is_due_is_done_in_its_turn_however_much_is_in_a_hurry() -> None:
    later = Later("test-later", 0.0)
    done: list[int] = []
    with held_up(later):
        for i in range(10):
            (later.hurry if i % 2 else later.take)(lambda i=i: done.append(i))  # type: ignore[misc]
        for _ in range(1000):
            later.hurry(lambda: None)  # more than are kept
    assert done == list(range(10))


def test_what_fails_is_logged_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(log, "exception", logged.append)
    later = Later("test-later", 0.0)
    done = threading.Event()
    later.take(lambda: [][0])
    later.take(done.set)
    assert done.wait(10)
    later.stop()
    assert len(logged) == 1


def test_what_waits_is_bounded_and_nothing_is_forgotten() -> None:
    later = Later("test-later", 0.0)
    done: list[int] = []
    with held_up(later):
        for i in range(1000):
            later.take(lambda i=i: done.append(i))  # type: ignore[misc]
        assert 500 < len(done) < 1000  # by this thread, as the other one does not keep up
    assert sorted(done) == list(range(1000))
