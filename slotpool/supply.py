"""Leases between containers and callers: the line of waiters, the ready ones, and the requests that give back and take."""

from __future__ import annotations

import itertools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Callable

from .background import Background
from .config import SlotPoolConfig
from .container import Container
from .errors import AcquireTimeout, PoolClosed, SlotPoolError
from .sandbox.protocol import LeaseAnswer
from .stats import Counters
from .tenure import Tenure

log = logging.getLogger(__name__)

_EXCHANGES = 3  # requests that give back and take, under way at once to one container
_HOLD = 5.0  # seconds that such a request waits for a slot to become free, if a caller waits for it
_LEAST = 0.05  # seconds between two requests to a container that has nothing
_RETRY = 0.5  # seconds after a failure until the container is asked again
_SHORT_HOLD = 1.0  # and if none does, but slots have just been given back
_HOLDING = 4  # containers without a free slot at which such requests wait at once


class _Waiter:
    """A caller in line since ``asked``. Its queue gets a tenure, or None when the pool closes."""

    def __init__(self, asked: float) -> None:
        self.asked = asked
        self.queue: queue.SimpleQueue[Tenure | None] = queue.SimpleQueue()  # to put into a Queue wakes who waits three times


class Supply:
    """The pool's lock and all that it guards. Thread-safe; methods that begin with an underscore expect the lock to be held.

    :param owner: the name under which leases are taken.
    """

    def __init__(self, config: SlotPoolConfig, owner: str, background: Background) -> None:
        self._config = config
        self.owner = owner
        self._shared = config.backend != "local"
        self._background = background
        # Guards every field below, those of the containers, and the scaling in Upkeep. Nothing slow is done under it.
        self.lock = threading.Lock()
        self.open = True
        self.containers: dict[str, Container] = {}
        self.held: set[Tenure] = set()  # handed out to callers
        self.ready: queue.Queue[Tenure] = queue.Queue()  # held for the next to come
        self.waiters: deque[_Waiter] = deque()  # in order of arrival; nobody overtakes them, see take()
        self.counters = Counters()
        self._strays: set[Tenure] = set()
        self._asking = 0  # the sum of what the containers are asked for
        self._owing: set[Container] = set()  # those with an outbox
        # Made anew when they are needed after changed():
        self._order: list[Container] | None = None  # lowest first
        self._first = 0  # in that order; those before it have no room
        self._standing: tuple[int, int] | None = None  # see standing_demand()
        self.trouble: Exception | None = None  # the last failure to get leases or containers
        self.demand_changed: Callable[[], None] = lambda: None  # called with the lock held
        self.later: Callable[[float, Callable[[], None]], None]  # call something in so many seconds

    # For callers

    def take(self, timeout: float) -> Tenure:
        """A lease for the caller: a ready one if nobody waits, else in line.

        :raises AcquireTimeout, PoolClosed:
        """
        waiter = _Waiter(time.monotonic())
        with self.lock:
            if not self.open:
                raise PoolClosed("the pool has been stopped")
            self.counters.requests_num += 1
            tenure = None if self.waiters else self._pop_ready()
            if tenure is not None:
                self._hand_out(tenure)
            else:
                self.waiters.append(waiter)
                self.counters.requests_queued += 1
            self.refill()
        return tenure if tenure is not None else self._wait(waiter, timeout)

    def _wait(self, waiter: _Waiter, timeout: float) -> Tenure:
        """Without the lock."""
        tenure: Tenure | None = None
        try:
            try:
                tenure = waiter.queue.get(timeout=min(timeout, threading.TIMEOUT_MAX))
            except queue.Empty:
                tenure = self._leave_line(waiter)
                if tenure is None:
                    raise AcquireTimeout(f"no slot became free within {timeout:g} s") from self.trouble
            if tenure is None:
                raise PoolClosed("the pool was stopped while this caller waited for a slot")
        except BaseException:
            late = tenure or self._leave_line(waiter)
            if late is not None:
                self.give_back(late)
            with self.lock:
                self.counters.requests_errors += 1
            raise
        return tenure

    def _leave_line(self, waiter: _Waiter) -> Tenure | None:
        """Wait no more; a tenure that was handed over in the last moment. Without the lock."""
        with self.lock:
            if waiter in self.waiters:
                self.waiters.remove(waiter)
                return None
        try:
            return waiter.queue.get_nowait()
        except queue.Empty:
            return None

    def give_back(self, tenure: Tenure, keep: bool = False) -> None:
        """The caller is done with it. Returns at once; its server cleans the slot before anybody else gets it.

        :param keep: hand it on to the next caller as it is.
        """
        with self.lock:
            if tenure not in self.held:
                return  # the pool has been stopped
            self.held.discard(tenure)
            self.counters.usage_ms += (time.monotonic() - tenure.acquired_at) * 1000
            container = tenure.container
            if container.tenures.get(tenure.token) is not tenure:
                self.counters.returns_bad += 1  # lost while it was used
            elif tenure.lost:  # which a call has found out, and no renewal yet
                self.counters.returns_bad += 1
                self.counters.leases_lost += 1
                del container.tenures[tenure.token]
                self._has_room(container)
                self.refill()
            elif (keep or not tenure.used) and not container.cordoned:
                fresh = tenure.handed_on()
                container.tenures[fresh.token] = fresh
                self._deliver(fresh)
            else:
                self._return_to_server(tenure)

    def close(self) -> list[Tenure]:
        """Refuse everything from now on and wake who waits; the leases that were handed out."""
        with self.lock:
            self.open = False
            waiters, held = list(self.waiters), list(self.held)
            self.waiters.clear()
            self.held.clear()
        for waiter in waiters:
            waiter.queue.put(None)
        return held

    # With the lock held

    def _pop_ready(self) -> Tenure | None:
        while True:
            try:
                tenure = self.ready.get_nowait()
            except queue.Empty:
                return None
            if not tenure.lost:
                return tenure

    def keep_ready(self, wanted: Callable[[Tenure], bool]) -> None:
        """Leave only the wanted ones in the queue of ready leases, and no lost one. The lock is held."""
        for _ in range(self.ready.qsize()):
            tenure = self.ready.get_nowait()
            if not tenure.lost and wanted(tenure):
                self.ready.put_nowait(tenure)

    def _hand_out(self, tenure: Tenure) -> None:
        tenure.acquired_at = time.monotonic()
        self.held.add(tenure)

    def _deliver(self, tenure: Tenure) -> None:
        """A lease is there: to whoever has waited longest, else it is kept ready, or given back."""
        if self.waiters:
            self._hand_out(tenure)
            # Here, and not by the caller: to have the lock, he would have to wait for what is done under it from here on.
            self.counters.requests_wait_ms += (tenure.acquired_at - self.waiters[0].asked) * 1000
            self.waiters.popleft().queue.put(tenure)
        elif self.ready.qsize() < self._config.prefetch or tenure.used:
            self.ready.put_nowait(tenure)
        else:
            self._return_to_server(tenure)

    def _return_to_server(self, tenure: Tenure) -> None:
        container = tenure.container
        del container.tenures[tenure.token]
        self._has_room(container)
        self._owing.add(container)
        container.outbox.append(tenure.token)
        self._submit_exchange(container)

    def uses(self, container: Container) -> bool:
        """Whether a caller has one of its slots, or has left one for the next as it is. The lock is held."""
        held = any(tenure.container is container for tenure in self.held)
        return held or any(tenure.used for tenure in container.tenures.values())

    def close_at_server(self, container: Container, ttl: float) -> bool:
        """Have its server grant no leases for ``ttl`` seconds; False if somebody else has one. Without the lock.

        :raises SlotPoolError: there is no answer.
        """
        with self.lock:
            tokens = self._take_outbox(container)
        return container.client.cordon(self.owner, ttl, tokens)

    def close_off(self, containers: Sequence[Container], until: float) -> None:
        """Lease nothing more of them until then, and give their idle leases back. The lock is held."""
        for container in containers:
            container.closed_until = until
            container.outbox += container.tenures
            container.tenures.clear()
            if container.outbox:
                self._owing.add(container)
        self.changed()
        self.keep_ready(lambda tenure: not tenure.container.cordoned)
        self.later(max(0.0, until - time.monotonic()), self._time_is_up)

    def _time_is_up(self) -> None:
        """Containers that were closed may be used again, unless they have been ended. Without the lock."""
        with self.lock:
            self.changed()
            self.refill()

    def _take_outbox(self, container: Container) -> list[str]:
        tokens, container.outbox = container.outbox, []
        self._owing.discard(container)
        return tokens

    def add(self, container: Container) -> None:
        """Lease from it from now on. The lock is held."""
        self.containers[container.id] = container
        self.changed()

    def remove(self, container: Container) -> None:
        """What it is still asked for counts no more. The lock is held."""
        del self.containers[container.id]
        self._owing.discard(container)
        self._asking -= container.asking
        container.asking = 0
        self.changed()

    def has(self, container: Container) -> bool:
        """Whether it is one of the pool's, and not one of before under the same id. The lock is held."""
        return self.containers.get(container.id) is container

    def changed(self) -> None:
        """A container has come, gone, been closed or opened, or has told something new of itself. The lock is held."""
        self._order = self._standing = None
        self._first = 0

    def in_order(self) -> list[Container]:
        """Lowest first: those with the highest index are the first to be ended. The lock is held."""
        if self._order is None:
            order = sorted(self.containers.values(), key=lambda container: container.member.index)
            for position, container in enumerate(order):
                container.position = position
            self._order = order  # last, as an interrupt may come amid this
        return self._order

    def _has_room(self, container: Container) -> None:
        """It may have room again."""
        self._first = min(self._first, container.position)

    def _with_room(self) -> Iterator[Container]:
        """Those with room, lowest first. A lease costs the same however many containers there are, so no full one is looked at
        twice.
        """
        order = self.in_order()
        while self._first < len(order) and order[self._first].room <= 0:
            self._first += 1
        return (container for container in itertools.islice(order, self._first, None) if container.room > 0)

    def standing_demand(self) -> tuple[int, int]:
        """Slots that containers lack or others have leased, and the slots that a container has. The lock is held."""
        if self._standing is None:
            containers = [container for container in self.containers.values() if not container.cordoned]
            per_container = max((container.size for container in containers), default=self._config.slots_per_container)
            lacking = sum(per_container - container.capacity for container in containers)
            others = sum(container.leased_by_others for container in containers)
            self._standing = lacking + others, per_container
        return self._standing

    def refill(self) -> None:
        """See that leases are asked for, and containers, as need be. The lock is held."""
        if not self.open:
            return
        now = time.monotonic()
        for container in self._owing:
            if not container.exchanges and container.retry_at <= now:
                self._submit_exchange(container)
        need = self._need()
        holding = 0
        for container in self._with_room() if need > 0 else ():
            if need <= 0:
                break
            if container.retry_at > now:
                continue
            if container.exhausted:  # others have its slots: wait there for one, if somebody waits here, but don't count on it
                if self.waiters and holding < _HOLDING:
                    holding += 1
                    self._submit_exchange(container)
                continue
            need -= container.room
            self._submit_exchange(container)
        self.demand_changed()

    def _look_again(self) -> None:
        """Without the lock."""
        with self.lock:
            self.refill()

    def collect_strays(self) -> None:
        """Give back leases that nobody has, as an interrupt came while they changed hands. The lock is held."""
        ready = set(self.ready.queue)
        everywhere = [tenure for container in self.containers.values() for tenure in container.tenures.values()]
        strays = {tenure for tenure in everywhere if tenure not in self.held and tenure not in ready}
        for tenure in strays & self._strays:  # seen twice: it isn't just on its way
            self._return_to_server(tenure)
        self._strays = strays

    def _need(self) -> int:
        """Leases to ask for, beyond those that are asked for already."""
        return len(self.waiters) + self._config.prefetch - self.ready.qsize() - self._asking

    def _submit_exchange(self, container: Container) -> None:
        most = 2 * _EXCHANGES if container.outbox else _EXCHANGES  # what gives back does not queue behind what waits
        if container.exchanges < most and self.open:
            container.exchanges += 1
            self._background.submit(self._exchange, container)

    # In the background

    def _exchange(self, container: Container) -> None:
        """Give back what is in the container's outbox and take what is needed, in one request."""
        with self.lock:
            release = self._take_outbox(container)
            take = max(0, min(self._need(), container.room)) if self.has(container) else 0
            hopes = container.exhausted
            container.hoping += take if hopes else 0
            container.asking += 0 if hopes else take
            self._asking += 0 if hopes else take
            hold = _HOLD if self.waiters else _SHORT_HOLD if release else 0.0
            if self._shared and not release and not container.exhausted:
                hold = 0.0  # if others have all its slots, more containers may be needed, and not in a while
        granted: list[Tenure] = []
        answer: LeaseAnswer | None = None
        failure: SlotPoolError | None = None
        try:
            if take or release:
                answer = container.client.lease(self.owner, self._config.lease_ttl, take, release, hold)
                granted = [Tenure(container, lease) for lease in answer["leases"]]
        except SlotPoolError as e:
            failure = e
        finally:
            with self.lock:
                if failure is not None:
                    container.outbox = release + container.outbox  # giving back may be repeated
                    if container.outbox and self.has(container):
                        self._owing.add(container)
                container.hoping -= take if hopes else 0
                if not hopes and self.has(container):
                    container.asking -= take
                    self._asking -= take
                self._has_room(container)
                unwanted = self._exchanged(container, take, granted, failure)
                if answer is not None and self._shared:
                    if container.told(answer):  # of others' leases; it does not say more
                        self._standing = None
                    self.demand_changed()
        if unwanted:
            self._return_quietly(container, unwanted)
        if failure is not None:
            self._note(container, failure)

    def _exchanged(self, container: Container, asked: int, granted: list[Tenure], failure: SlotPoolError | None) -> list[str]:
        """Take the answer in; the tokens of leases that are of no use any more."""
        container.exchanges -= 1
        if failure is not None:
            self.trouble = failure
            container.retry_at = time.monotonic() + _RETRY
        elif asked:
            self.trouble = None
            container.exhausted = not granted
            if not granted and self.waiters:  # the server need not have held the request
                container.retry_at = time.monotonic() + _LEAST
                self.later(2 * _LEAST, self._look_again)
        if not self.has(container) or container.cordoned or not self.open:
            return [tenure.token for tenure in granted]
        for tenure in granted:
            container.tenures[tenure.token] = tenure
            self.counters.leases_num += 1
            self._deliver(tenure)
        if failure is None:
            if container.outbox:
                self._submit_exchange(container)
            self.refill()
        return []

    def _return_quietly(self, container: Container, tokens: list[str]) -> None:
        try:
            container.client.lease(self.owner, self._config.lease_ttl, 0, tokens)
        except SlotPoolError as e:
            log.debug("leases could not be given back, and will expire: %s", e)

    def _note(self, container: Container, failure: SlotPoolError) -> None:
        if self.open and not container.cordoned:
            log.warning("%s: %s", container.id, failure)
            self.later(_RETRY, self._look_again)

    def give_all_back(self, container: Container) -> None:
        """Every lease that the pool has in it, without waiting for their cleaning."""
        with self.lock:
            tokens = [*container.tenures, *self._take_outbox(container)]
            container.tenures.clear()
        if tokens:
            self._return_quietly(container, tokens)
