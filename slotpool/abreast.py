"""Blocking work on several containers at once, for a caller who waits for all of it."""

from __future__ import annotations

import collections
import functools
import threading
from collections.abc import Sequence
from typing import Callable


def run(acts: Sequence[Callable[[], None]], most: int, give_up: Callable[[], None] = lambda: None) -> None:
    """Call them all, up to ``most`` at once, in threads for that, and return when all have ended. Where there can be no more
    threads, as while the interpreter goes down, when an executor takes no work either, they are called in this one.

    :param give_up: called if this is interrupted, or one of them raises, and is to end those that run; no more are begun.
    :raises BaseException: what one of them has raised.
    """
    pending = collections.deque(acts)
    failures: list[BaseException] = []

    def work() -> None:
        while pending and not failures:
            try:
                act = pending.popleft()
            except IndexError:  # another thread was quicker
                return
            act()

    def help_out(ended: threading.Event) -> None:
        try:
            work()
        except BaseException as e:
            failures.append(e)
        finally:
            ended.set()

    helpers: list[tuple[threading.Thread, threading.Event]] = []
    try:
        for _ in range(min(most, len(acts))):
            ended = threading.Event()
            helper = threading.Thread(target=functools.partial(help_out, ended), name="slotpool-abreast", daemon=True)
            helpers.append((helper, ended))
            try:
                helper.start()
            except RuntimeError:
                helpers.pop()
                work()
                break
        _wait_for(helpers)
        if failures:
            raise failures[0]
    except BaseException:
        pending.clear()
        give_up()
        raise
    finally:
        _wait_for(helpers)


def _wait_for(helpers: Sequence[tuple[threading.Thread, threading.Event]]) -> None:
    """Not by joining them: before Python 3.13 a join that was interrupted takes its thread for one that has ended."""
    for helper, ended in helpers:
        if helper.ident is not None:  # it was started
            ended.wait()
