"""Where containers come from. A fleet knows nothing of slots, leases or pools.

:class:`Fleet` is what the pool needs; :mod:`.local` starts servers on this machine, :mod:`.static` uses standing ones. A
Nomad job is to be a third.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, Protocol

import attr


@attr.s(slots=True, auto_attribs=True, frozen=True)
class Member:
    """A container that can be talked to.

    :ivar index: the fleet ends those with the highest first.
    """

    id: str
    index: int
    address: str
    token: str | None = attr.ib(repr=False)


class Fleet(Protocol):
    """A number of containers that can be changed. Thread-safe; only :meth:`scale` and :meth:`stop` may take long."""

    def start(self, on_change: Callable[[], None]) -> None:
        """Begin; ``on_change`` is called, from any thread, when :meth:`members` or :meth:`failure` has changed."""

    def members(self) -> Sequence[Member]:
        """The containers that are there now, lowest index first."""

    def scale(self, wanted: int) -> None:
        """See that there are ``wanted`` containers; returns before new ones are ready. Replaces those that died.

        :raises SlotPoolError: if that was refused.
        """

    def replace(self, member: Member) -> None:
        """End a container that does not answer; the next :meth:`scale` makes another."""

    def failure(self) -> Exception | None:
        """Why containers could not be started lately; None if they could."""

    def describe(self) -> str:
        """The containers' states, in words, for messages."""

    def stop(self, purge: bool) -> None:
        """End what belongs to this fleet. Repeatable."""
