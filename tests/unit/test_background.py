"""The pool's executors where there can be no more threads."""

from __future__ import annotations

import threading

import pytest

from slotpool.background import Background


def test_what_an_executor_keeps_though_it_found_no_thread_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()
    done: list[str] = []
    start = threading.Thread.start

    def fail_once(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", start)
        raise RuntimeError("can't start new thread")

    def first() -> None:
        begun.set()
        assert go_on.wait(30)
        done.append("first")

    def then(name: str, told: threading.Event) -> None:
        done.append(name)
        told.set()

    background = Background(2, "test")
    background.submit(first)
    assert begun.wait(30)
    monkeypatch.setattr(threading.Thread, "start", fail_once)
    second, third = threading.Event(), threading.Event()
    background.submit(then, "second", second)
    assert second.wait(30)
    go_on.set()
    background.submit(then, "third", third)  # after what was kept
    assert third.wait(30)
    background.close()
    assert sorted(done) == ["first", "second", "third"]
