"""Containers come and go: taken in, scaled with demand, checked, and dropped when they are lost."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Collection, Sequence
from typing import Callable

from .background import Background
from .config import SlotPoolConfig
from .container import Container
from .errors import ContainerRefused, IsolationUnavailable, PlacementFailed, SlotPoolError, StartFailed
from .fleet import Fleet, Member
from .resizing import CORDON, Resizer
from .sandbox.protocol import RenewAnswer
from .supply import Supply
from .tenure import Tenure

log = logging.getLogger(__name__)

# Seconds for a new container to say who it is: few at first, as packets to one that is being set up are lost, and what waits
# for their repetition would learn a second late that it answers. A standing server has the last from the beginning.
_HEALTH_LIMITS = (0.25,) * 10 + (1.0,) * 10 + (5.0,)
_QUICK = 0.1  # seconds between two times that it is asked, as often as _PATIENCE says
_PATIENCE = 100
_TELLING = 20  # attempts after which a caller who asks is told of them
_SLOW = 0.5  # and from then on
_TOLD_AT_ONCE = (ContainerRefused, IsolationUnavailable)
_WORN = 30.0  # seconds between two containers that are given up for their slots' state, doubled each time
_LONGEST = 3600.0
_UNFIT = 60.0  # seconds until one is asked again whose isolation is another
_HOPELESS = 700  # attempts, at least six minutes, after which a container is given up that never answers


class Upkeep:
    """Keeps the supply's containers as the fleet has them, and the fleet as demand wants it. Thread-safe.

    Methods that begin with an underscore expect the supply's lock to be held, unless they say otherwise.
    """

    def __init__(
        self, config: SlotPoolConfig, fleet: Fleet, supply: Supply, background: Background, renewals: Background
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._supply = supply
        self._background = background
        self._renewals = renewals
        self._scales = config.backend != "static"
        # Guarded by the supply's lock:
        self._no_worn_before = 0.0  # no container is given up for its slots' state
        self._worn_pause = _WORN
        self._members: Collection[str] = ()  # the fleet's, by their ids
        self._admitting: set[str] = set()  # members that are being asked who they are
        self._asked_in_vain: set[str] = set()  # standing servers that have not answered yet
        self._unfit: dict[str, Exception] = {}  # members with another isolation than is asked for
        self.later: Callable[[float, Callable[[], None]], None]  # call something in so many seconds
        self._changed = threading.Condition(supply.lock)  # signalled when containers have come, or can't
        self._resizer = Resizer(config, fleet, supply, background, self._changed)
        supply.demand_changed = self._resizer.decide_grow

    @property
    def needed(self) -> int:
        """Containers that must be there for a pool to have started."""
        return self._config.min_containers if self._scales else 1

    def start(self) -> None:
        """Start the fleet and wait for the containers that must be there.

        :raises StartFailed: they are not there in time, or can't be started.
        """
        self._fleet.start(self._config.min_containers, self.sync)
        needed = self.needed
        deadline = time.monotonic() + self._config.start_timeout
        while True:
            with self._changed:
                if len(self._supply.containers) >= needed:
                    return
                failure = self._fleet.failure()  # under the lock, or a change after it would not end the wait below
                if isinstance(failure, PlacementFailed) and len(self._fleet.members()) >= needed:
                    failure = None  # what lacks room is another pool's wish
                if failure is None and not self._scales and self._asked_in_vain.issuperset(self._members):
                    failure = self._supply.trouble  # nobody starts them, and others may be there
                if failure is None and len(self._members) >= needed > len(self._members) - len(self._unfit):
                    failure = next(iter(self._unfit.values()))  # the servers, or the job, were taken as they are
                left = deadline - time.monotonic()
                if failure is not None or left <= 0 or not self._supply.open:
                    failure = failure or self._supply.trouble
                    break
                self._changed.wait(left)
        if isinstance(failure, StartFailed):
            raise failure
        limit = f"expected {needed} container(s) within {self._config.start_timeout:g} s, got {len(self._supply.containers)}"
        raise StartFailed(f"{limit}: {self._fleet.describe()}" + (f"; {failure}" if failure else "")) from failure

    def sync(self) -> None:
        """Take in new containers and drop those that are gone. Called by the fleet, from any thread."""
        with self._supply.lock:
            if not self._supply.open:
                self._changed.notify_all()
                return
            members = {member.id: member for member in self._fleet.members()}  # under the lock, or it may be out of date
            self._members = members.keys()
            self._unfit = {id_: why for id_, why in self._unfit.items() if id_ in members}
            for container in list(self._supply.containers.values()):
                if container.id not in members:
                    self._drop(container, "its container has ended")
            for id_, member in members.items():
                if id_ not in self._supply.containers and id_ not in self._admitting:
                    self._admitting.add(id_)
                    if member.delay:
                        self.later(member.delay, functools.partial(self._try_again, member, 0))
                    else:
                        self._background.submit(self._admit, member)
            self._resizer.regrow()
            self._changed.notify_all()

    def _admit(self, member: Member, attempt: int = 0) -> None:
        """Ask a new container who it is, and take it in. Without the lock."""
        container = Container(member, self._config.slots_per_container)
        failure: Exception | None = None
        limit = _HEALTH_LIMITS[min(attempt, len(_HEALTH_LIMITS) - 1) if self._scales else -1]
        try:
            container.introduce(container.client.health(limit, repeat=False), self._config.isolation)
        except Exception as e:  # it is not known what answers there
            failure = e
        with self._supply.lock:
            admitted = failure is None and self._supply.open
            if admitted:
                self._supply.add(container)
                self._supply.refill()
            is_found_unfit = self._note_answer(member, failure, attempt)
            self._changed.notify_all()
        if not admitted:
            container.client.close()
        if failure is None:
            isolation = container.info.get("isolation")
            log.info("%s has come, with %d slots, isolation %s", member.id, container.capacity, isolation)
        elif attempt == _PATIENCE or is_found_unfit:
            log.warning("%s can't be used: %s", member.id, failure)
        if failure is not None and attempt >= _HOPELESS and not isinstance(failure, IsolationUnavailable):
            self._replace(member)

    def _note_answer(self, member: Member, failure: Exception | None, attempt: int) -> bool:
        """What came of asking a member, and when to ask again; whether it is found just now to have another isolation."""
        if failure is None or self._scales:
            self._asked_in_vain.discard(member.id)
        else:
            self._asked_in_vain.add(member.id)
        was_unfit = member.id in self._unfit
        is_unfit = isinstance(failure, IsolationUnavailable)  # and well: others may use it
        if failure is None:
            self._unfit.pop(member.id, None)
        elif is_unfit:
            self._unfit[member.id] = failure
        if failure is not None and (attempt >= _TELLING or not self._scales or isinstance(failure, _TOLD_AT_ONCE)):
            self._supply.trouble = failure
        if failure is None or not self._supply.open or (attempt >= _HOPELESS and not is_unfit):
            self._admitting.discard(member.id)
        elif is_unfit:
            self.later(_UNFIT, functools.partial(self._try_again, member, _PATIENCE + 1))
        else:
            self.later(_QUICK if attempt < _PATIENCE else _SLOW, functools.partial(self._try_again, member, attempt + 1))
        return is_unfit and not was_unfit

    def _try_again(self, member: Member, attempt: int) -> None:
        """A container runs before its server listens, and there is nothing to wait for but its answer. Without the lock."""
        with self._supply.lock:
            if self._supply.open and member.id in self._members:
                self._background.submit(self._admit, member, attempt)
            else:
                self._admitting.discard(member.id)

    def _drop(self, container: Container, why: str) -> None:
        """Its leases are lost."""
        self._supply.remove(container)
        container.client.close()
        self._lose(list(container.tenures.values()), why)
        self._supply.counters.containers_lost += not container.cordoned
        container.tenures.clear()
        self._supply.keep_ready(lambda _: True)
        self._supply.refill()

    def _lose(self, tenures: Sequence[Tenure], why: str) -> None:
        for tenure in tenures:
            tenure.lose(f"{tenure.slot} of {tenure.container.id} is lost: {why}")
        self._supply.counters.leases_lost += len(tenures)
        if tenures and log.isEnabledFor(logging.INFO):
            self._background.submit(_log_lost, tenures, why)  # as the lock is held

    # What the health thread does

    def tend(self) -> None:
        """Renew every lease, in one request a container, side by side; see to what is missing or not needed."""
        with self._supply.lock:
            # Those last that did not answer last time.
            for container in sorted(self._supply.containers.values(), key=lambda one: -one.answered_at):
                container.exhausted = False
                if not container.checking:
                    container.checking = True
                    self._renewals.submit(self._check, container)
            self._resizer.decide_shrink()
        self.sync()  # one that could not be admitted is tried again, one that is missing is replaced
        with self._supply.lock:
            self._supply.refill()

    def _check(self, container: Container) -> None:
        """Without the lock."""
        with self._supply.lock:
            tokens = list(container.tenures)
        try:
            answer = container.client.renew(tokens, timeout=max(0.2, min(5.0, self._config.lease_ttl / 3)))
        except Exception as e:  # whatever it is, it must be looked at again
            self._silent(container, e)
            return
        with self._supply.lock:
            container.checking = False
            container.answered_at = time.monotonic()
            self._renewed(container, answer)
            worn = self._supply.has(container) and self._is_worn(container)
            if worn:
                self._supply.close_off([container], time.monotonic() + CORDON)
        if worn:
            self._give_up_worn(container)

    def _silent(self, container: Container, e: Exception) -> None:
        """It has not answered. Without the lock."""
        if self._supply.open and not container.cordoned:
            log.warning("%s does not answer the health check: %s", container.id, e)
        with self._supply.lock:
            container.checking = False
            # No lease of this pool in it can have outlived this.
            lost = time.monotonic() - container.answered_at > self._config.lease_ttl
            lost = lost and self._supply.has(container)
            others = container.leased_by_others
            if lost:
                self._admitting.add(container.id)  # until the fleet knows, it is still among the members
                self._drop(container, f"it has not answered for {self._config.lease_ttl:g} s: {e}")
        if not lost:
            return
        log.warning("%s is given up: it has not answered for %g s: %s", container.id, self._config.lease_ttl, e)
        if others:  # it may be this pool that is cut off, and not the container
            self._try_again(container.member, _PATIENCE)
        else:
            self._replace(container.member)

    def _renewed(self, container: Container, answer: RenewAnswer) -> None:
        lost = [container.tenures.pop(token) for token in answer["lost"] if token in container.tenures]
        self._lose(lost, "its server has ended the lease")
        if container.told(answer) or answer["lost"]:
            self._supply.changed()
        if answer["lost"]:
            self._supply.keep_ready(lambda _: True)
            self._supply.refill()

    def _is_worn(self, container: Container) -> bool:
        """Whether it has lost most of its slots, and nobody has one, so that it should be replaced."""
        now = time.monotonic()
        if 2 * container.capacity >= container.size or not self._scales or now < self._no_worn_before:
            return False
        if container.cordoned or self._supply.uses(container) or container.leased_by_others:
            return False
        # If it is the machine's fault, new ones fare no better.
        self._worn_pause = min(2 * self._worn_pause, _LONGEST) if now < self._no_worn_before + _LONGEST else _WORN
        self._no_worn_before = now + self._worn_pause
        return True

    def _give_up_worn(self, container: Container) -> None:
        """Without the lock."""
        try:
            if not self._supply.close_at_server(container, CORDON):
                with self._supply.lock:
                    container.closed_until = 0.0
                    self._supply.changed()
                return
        except SlotPoolError as e:
            log.info("%s could not be closed: %s", container.id, e)
            return
        worn = container.size - container.capacity
        why = f"{worn} of its {container.size} slots could not be made clean and are quarantined"
        log.warning("%s is given up: %s", container.id, why)
        with self._supply.lock:
            self._admitting.add(container.id)
            if self._supply.has(container):
                self._drop(container, why)
        self._replace(container.member)

    def _replace(self, member: Member) -> None:
        """Have another in its place. Without the lock."""
        try:
            self._fleet.replace(member)
        except SlotPoolError as e:
            log.warning("%s can't be replaced, and is used again if it answers: %s", member.id, e)
        with self._supply.lock:
            self._admitting.discard(member.id)
        self.sync()


def _log_lost(tenures: Sequence[Tenure], why: str) -> None:
    for tenure in tenures:
        ids = {"slot": tenure.slot, "lease": tenure.lease_id}
        log.info("%s, lease %s: lost in %s: %s", *ids.values(), tenure.container.id, why, extra=ids)
