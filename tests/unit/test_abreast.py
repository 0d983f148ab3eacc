"""Work on several containers at once, and what ends it."""

from __future__ import annotations

import threading

import pytest

from slotpool import abreast


def test_all_run_at_once_and_have_ended_then() -> None:
    together, done = threading.Barrier(3), []

    def act() -> None:
        together.wait(30)
        done.append(True)

    abreast.run([act] * 3, 3)
    assert done == [True] * 3
    abreast.run([], 3)


def test_what_one_raises_is_raised_once_the_others_have_ended() -> None:
    begun, given_up = threading.Event(), threading.Event()
    ended: list[bool] = []

    def fail() -> None:
        assert begun.wait(30)
        raise KeyError("one")

    def go_on() -> None:
        begun.set()
        ended.append(True)

    with pytest.raises(KeyError, match="one"):
        abreast.run([go_on, fail], 2, given_up.set)
    assert given_up.is_set()
    assert ended == [True]


def test_an_interrupt_ends_it_only_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, ended = threading.Event(), threading.Event(), []
    wait = threading.Event.wait

    def act() -> None:
        begun.set()
        assert wait(go_on, 30)
        ended.append(True)

    def interrupted(event: threading.Event, timeout: float | None = None) -> bool:
        if threading.current_thread() is threading.main_thread() and begun.is_set():
            monkeypatch.setattr(threading.Event, "wait", wait)
            raise KeyboardInterrupt
        return wait(event, timeout)

    monkeypatch.setattr(threading.Event, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        abreast.run([act], 1, go_on.set)
    assert ended == [True]


def test_where_there_are_no_threads_the_callers_own_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    threads = []
    monkeypatch.setattr(threading.Thread, "start", fail)
    abreast.run([lambda: threads.append(threading.current_thread())] * 3, 2)
    assert threads == [threading.current_thread()] * 3
