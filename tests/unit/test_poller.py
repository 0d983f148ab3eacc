"""What is woken by what, where one that is woken changes that."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from slotpool.sandbox.poller import Poller


@pytest.fixture
def pipes() -> Iterator[tuple[int, int]]:
    """Read ends of two, in both of which something is to be read."""
    ends = [os.pipe() for _ in range(2)]
    for _, write in ends:
        os.write(write, b"x")
    yield ends[0][0], ends[1][0]
    for fd in (fd for both in ends for fd in both):
        os.close(fd)


def test_each_that_is_ready_is_woken(pipes: tuple[int, int]) -> None:
    poller = Poller()
    woken: list[int] = []
    for fd in pipes:
        poller.watch(fd, lambda fd=fd: woken.append(fd))  # type: ignore[misc]
    for wake in poller.ready(0):
        wake()
    assert sorted(woken) == sorted(pipes)
    poller.unwatch(pipes[0])
    assert len(list(poller.ready(0))) == 1


@pytest.mark.parametrize("anew", [False, True])
def test_one_that_another_has_ended_is_not_woken_nor_is_who_has_its_number_now(pipes: tuple[int, int], anew: bool) -> None:
    poller = Poller()
    woken: list[str] = []

    def end_the_other(other: int) -> None:
        woken.append("first")
        poller.unwatch(other)
        if anew:
            poller.watch(other, lambda: woken.append("another's"))

    for fd, other in (pipes, pipes[::-1]):
        poller.watch(fd, lambda other=other: end_the_other(other))  # type: ignore[misc]
    for wake in poller.ready(0):
        wake()
    assert woken == ["first"]
