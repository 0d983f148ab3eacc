"""Blocking work on several containers at once, for a caller who waits for all of it."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import Callable


def run(acts: Sequence[Callable[[], None]], most: int, give_up: Callable[[], None] = lambda: None) -> None:
    """Call them all, up to ``most`` at once, in threads for that, and return when all have ended. Where there can be no more
    threads, as while the interpreter goes down, when an executor takes no work either, they are called in this one.

    :param give_up: called if this is interrupted, and is to end those that run; no more are begun.
    :raises BaseException: what one of them has raised; others have not been begun then.
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

    def help_out() -> None:
        try:
            work()
        except BaseException as e:
            failures.append(e)

    helpers: list[threading.Thread] = []
    try:
        for _ in range(min(most, len(acts))):
            helpers.append(threading.Thread(target=help_out, name="slotpool-abreast", daemon=True))
            try:
                helpers[-1].start()
            except RuntimeError:
                helpers.pop()
                work()
                break
        for helper in helpers:
            helper.join()
        if failures:
            raise failures[0]
    except BaseException:
        pending.clear()
        give_up()
        raise
    finally:
        for helper in helpers:
            if helper.ident is not None:
                helper.join()
