"""What a pool looks like at one moment, as plain data, for whatever shows it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import attr

from .slot import SlotState
from .stats import Counters

if TYPE_CHECKING:
    from .container import Container
    from .pool import SlotPool


@attr.s(slots=True, auto_attribs=True, frozen=True, kw_only=True)
class ContainerView:
    """One container, as its pool knows it.

    :ivar id: a Nomad allocation's id, or one made up.
    :ivar address: its server's address.
    :ivar isolation: how its slots are kept apart; empty if its server does not tell.
    :ivar slots: slots that it has, quarantined ones too.
    :ivar acquired: of them, those that callers of this pool hold, executing ones too.
    :ivar executing: of the acquired ones, those in which something runs.
    :ivar ready: those that this pool has leased, and keeps for whoever comes next.
    :ivar leased_by_others: those that other pools have leased, as far as this one has heard.
    :ivar quarantined: those that could not be made clean, and are leased no more.
    :ivar closing: it is about to be ended, and nothing is leased from it.
    :ivar silent: seconds since it last answered the health check, or came.
    """

    id: str
    address: str
    isolation: str
    slots: int
    acquired: int
    executing: int
    ready: int
    leased_by_others: int
    quarantined: int
    closing: bool
    silent: float

    @property
    def free(self) -> int:
        """Slots that nobody has leased: clean, or being cleaned."""
        return max(0, self.slots - self.quarantined - self.acquired - self.ready - self.leased_by_others)


@attr.s(slots=True, auto_attribs=True, frozen=True, kw_only=True)
class PoolView:
    """A pool.

    :ivar backend: ``local``, ``static`` or ``nomad``.
    :ivar state: ``new``, ``started`` or ``stopped``.
    :ivar taken_at: seconds, on the clock of :func:`time.monotonic`.
    :ivar containers: lowest first; none if it isn't started.
    :ivar waiting: callers that wait for a slot.
    :ivar lost: slots that callers still hold, though their lease is lost. Their containers may be gone.
    :ivar counters: the counters of :meth:`SlotPool.get_stats`, not rounded; a copy.
    """

    backend: str
    state: str
    taken_at: float
    containers: Sequence[ContainerView]
    waiting: int
    lost: int
    counters: Counters

    def total(self, field: str) -> int:
        """The sum of a number over all containers, say ``acquired``."""
        return sum(getattr(container, field) for container in self.containers)


def look(pool: SlotPool) -> PoolView:
    """What ``pool`` looks like now, all of one moment. Costs no request and waits for none. From any thread.

    :param pool: new, started or stopped.
    """
    supply = pool._supply
    acquired: Counter[Container] = Counter()
    executing: Counter[Container] = Counter()
    lost = 0
    with supply.lock:
        now = time.monotonic()
        for tenure in supply.held:
            state = tenure.state
            if state is SlotState.ERROR:
                lost += 1
            else:
                acquired[tenure.container] += 1
                executing[tenure.container] += state is SlotState.EXECUTING
        ready = Counter(tenure.container for tenure in supply.ready.queue if not tenure.lost)
        started = pool._state == "started" and supply.open
        return PoolView(
            backend=pool.config.backend,
            state=pool._state,
            taken_at=now,
            containers=[
                ContainerView(
                    id=container.id,
                    address=container.address,
                    isolation=str(container.info.get("isolation", "")),
                    slots=container.size,
                    acquired=acquired[container],
                    executing=executing[container],
                    ready=ready[container],
                    leased_by_others=container.leased_by_others,
                    quarantined=container.size - container.capacity,
                    closing=container.cordoned,
                    silent=now - container.answered_at,
                )
                for container in (supply.in_order() if started else ())
            ],
            waiting=len(supply.waiters),
            lost=lost,
            counters=attr.evolve(supply.counters),
        )
