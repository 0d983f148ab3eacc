"""Where containers come from. A fleet knows nothing of slots, leases or pools.

:class:`Fleet` is what the pool needs; :mod:`.local` starts servers on this machine, :mod:`.static` uses standing ones,
:mod:`.nomad` has them run by a cluster.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Callable, Protocol

import attr


@attr.s(slots=True, auto_attribs=True, frozen=True)
class Member:
    """A container that can be talked to.

    :ivar index: the fleet ends those with the highest first.
    :ivar delay: seconds before which it need not be asked for the first time.
    :ivar name: what the server there tells of itself, see ``GET /health``; empty if that is not known.
    :ivar cacert: file of the certificates by which an ``https`` server's is checked, instead of the system's.
    """

    id: str
    index: int
    address: str
    token: str | None = attr.ib(repr=False)
    name: str = ""
    delay: float = attr.ib(default=0.0, eq=False)
    cacert: str | None = None


class Fleet(Protocol):
    """A number of containers that can be changed. Thread-safe; :meth:`members`, :meth:`size`, :meth:`failure` and
    :meth:`describe` do not take long.
    """

    def start(self, wanted: int, on_change: Callable[[], None]) -> None:
        """Begin, with ``wanted`` containers at least; ``on_change`` is called, from any thread, when :meth:`members` or
        :meth:`failure` has changed.

        :raises SlotPoolError: if that was refused.
        """

    def members(self) -> Sequence[Member]:
        """The containers that are there now, lowest index first."""

    def size(self) -> int:
        """The number of containers that there are to be, as far as is known; somebody else may have changed it."""

    def grow(self, wanted: int) -> None:
        """See that there are ``wanted`` containers at least; returns before new ones are ready. Replaces those that died.

        :raises SlotPoolError: if that was refused.
        """

    def shrink(self, wanted: int, closed: Collection[str], before: float) -> bool:
        """End the containers with an index of ``wanted`` and more, if all of those are ``closed`` to new leases, by their ids.

        :param before: the time on the monotonic clock after which it must not be begun.
        :return: False if there is one that isn't, or somebody else has changed the number meanwhile: then nothing was done.
        :raises SlotPoolError: if that was refused.
        """

    def replace(self, member: Member) -> None:
        """End a container that does not answer; there will be another.

        :raises SlotPoolError: if that was refused.
        """

    def failure(self) -> Exception | None:
        """Why containers could not be started lately; None if they could."""

    def describe(self) -> str:
        """The containers' states, in words, for messages."""

    def stop(self, purge: bool) -> None:
        """End what belongs to this fleet. Repeatable."""
