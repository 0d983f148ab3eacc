"""Containers come and go: taken in, scaled with demand, checked, and dropped when they are lost."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Collection
from typing import Callable

from .background import Background
from .config import SlotPoolConfig
from .container import Container
from .errors import ContainerRefused, SlotPoolError, StartFailed
from .fleet import Fleet, Member
from .sandbox.protocol import RenewAnswer
from .scaling import Demand, Scaler
from .supply import Supply

log = logging.getLogger(__name__)

# Seconds for a new container to say who it is: few at first, as packets to one that is being set up are lost, and what waits
# for their repetition would learn a second late that it answers.
_HEALTH_LIMITS = (0.25,) * 10 + (1.0,) * 10 + (5.0,)
_QUICK = 0.1  # seconds between two times that it is asked, as often as _PATIENCE says
_PATIENCE = 100
_TELLING = 20  # attempts after which a caller who asks is told of them
_SLOW = 0.5  # and from then on
_WORN = 30.0  # seconds between two containers that are given up for their slots' state, doubled each time
_LONGEST = 3600.0
_CORDON = 30.0  # seconds for which a container that is to be ended grants no leases


class Upkeep:
    """Keeps the supply's containers as the fleet has them, and the fleet as demand wants it. Thread-safe.

    Methods that begin with an underscore expect the supply's lock to be held, unless they say otherwise.
    """

    def __init__(self, config: SlotPoolConfig, fleet: Fleet, supply: Supply, background: Background) -> None:
        self._config = config
        self._fleet = fleet
        self._supply = supply
        self._background = background
        self._scales = config.backend != "static"
        # Guarded by the supply's lock:
        self._scaler = Scaler(config.slots_per_container, config.min_containers, config.max_containers, config.scale_down_after)
        self._target = config.min_containers  # containers that demand has asked for
        self._scaling = False  # the fleet is being grown or shrunk
        self._no_scaling_before = 0.0
        self._no_worn_before = 0.0  # no container is given up for its slots' state
        self._worn_pause = _WORN
        self._members: Collection[str] = ()  # the fleet's, by their ids
        self._admitting: set[str] = set()  # members that are being asked who they are
        self.later: Callable[[float, Callable[[], None]], None]  # call something in so many seconds
        self._changed = threading.Condition(supply.lock)  # signalled when containers have come, or can't
        supply.demand_changed = self._decide_scale

    def start(self) -> None:
        """Start the fleet and wait for the containers that must be there.

        :raises StartFailed: they are not there in time, or can't be started.
        """
        self._fleet.start(self._config.min_containers, self.sync)
        needed = self._config.min_containers if self._scales else 1
        deadline = time.monotonic() + self._config.start_timeout
        while True:
            with self._changed:
                failure = self._fleet.failure()  # under the lock, or a change after it would not end the wait below
                if len(self._supply.containers) >= needed:
                    return
                if failure is None and not self._scales:
                    failure = self._supply.trouble
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
            self._regrow()
            self._changed.notify_all()

    def _admit(self, member: Member, attempt: int = 0) -> None:
        """Ask a new container who it is, and take it in. Without the lock."""
        container = Container(member, self._config.slots_per_container)
        failure: Exception | None = None
        try:
            container.introduce(container.client.health(_HEALTH_LIMITS[min(attempt, len(_HEALTH_LIMITS) - 1)], repeat=False))
        except Exception as e:  # it is not known what answers there
            failure = e
        with self._supply.lock:
            admitted = failure is None and self._supply.open
            if admitted:
                self._supply.containers[member.id] = container
                self._supply.refill()
            elif attempt >= _TELLING or not self._scales or isinstance(failure, ContainerRefused):
                self._supply.trouble = failure
            if failure is None or not self._supply.open:
                self._admitting.discard(member.id)
            else:
                self.later(_QUICK if attempt < _PATIENCE else _SLOW, functools.partial(self._try_again, member, attempt + 1))
            self._changed.notify_all()
        if not admitted:
            container.client.close()
        if failure is None:
            isolation = container.info.get("isolation")
            log.info("%s has come, with %d slots, isolation %s", member.id, container.capacity, isolation)
        elif attempt == _PATIENCE:
            log.warning("%s can't be used: %s", member.id, failure)

    def _try_again(self, member: Member, attempt: int) -> None:
        """A container runs before its server listens, and there is nothing to wait for but its answer. Without the lock."""
        with self._supply.lock:
            if self._supply.open and member.id in self._members:
                self._background.submit(self._admit, member, attempt)
            else:
                self._admitting.discard(member.id)

    def _drop(self, container: Container, why: str) -> None:
        """Its leases are lost."""
        del self._supply.containers[container.id]
        container.client.close()
        for tenure in container.tenures.values():
            tenure.lose(f"{tenure.slot} of {container.id} is lost: {why}")
        counters = self._supply.counters
        counters.leases_lost += len(container.tenures)
        counters.containers_lost += not container.cordoned
        container.tenures.clear()
        self._supply.keep_ready(lambda _: True)
        self._supply.refill()

    # Scaling

    def _demand(self) -> Demand:
        containers = [container for container in self._supply.containers.values() if not container.cordoned]
        lacking = sum(max(0, self._config.slots_per_container - container.capacity) for container in containers)
        others = sum(container.leased_by_others for container in containers)
        return Demand(len(self._supply.held) + lacking + others, len(self._supply.waiters))

    def _decide_scale(self) -> None:
        """Scale up, if demand wants it."""
        now = time.monotonic()
        wanted = self._scaler.wanted(self._demand(), now) if self._scales else 0
        if wanted > self._target and now >= self._no_scaling_before:
            self._supply.counters.scale_ups += wanted > self._fleet.size()
            self._target = wanted
            self._regrow()

    def _regrow(self) -> None:
        """Have the fleet brought to the target, in the background, and what has died replaced."""
        if self._scales and not self._scaling:
            self._scaling = True
            self._background.submit(self._grow)

    def _grow(self) -> None:
        """Without the lock."""
        while True:
            with self._supply.lock:
                target = self._target
            failure: Exception | None = None
            try:
                self._fleet.grow(target)
            except Exception as e:  # a Popen may fail in many ways
                failure = e
                log.warning("scaling to %d containers failed: %s", target, e)
            with self._supply.lock:
                if failure is not None:
                    self._supply.trouble = failure
                    self._supply.counters.scale_errors += 1
                    self._no_scaling_before = time.monotonic() + self._config.scale_cooldown
                    self._target = min(self._target, self._fleet.size())
                if failure is not None or target == self._target:
                    self._scaling = False
                    self._changed.notify_all()
                    return

    def _decide_shrink(self) -> None:
        """End containers that have not been needed for a while, from the highest; never one with a slot in use."""
        wanted = self._scaler.wanted(self._demand(), time.monotonic())
        self._target = min(self._target, wanted)
        if self._scaling or self._fleet.size() <= wanted:
            return
        surplus: list[Container] = []
        keep = wanted
        for container in reversed(self._supply.in_order()):
            if container.member.index < wanted:
                break
            if self._in_use(container) or container.leased_by_others:
                keep = container.member.index + 1
                break
            surplus.append(container)
        if self._fleet.size() > keep:
            self._scaling = True
            self._supply.close_off(surplus)
            self._background.submit(self._shrink, wanted, surplus)

    def _shrink(self, wanted: int, surplus: list[Container]) -> None:
        """End ``surplus``, unless somebody else has a slot there. Without the lock."""
        closed: list[Container] = []
        done = False
        try:
            for container in surplus:
                with self._supply.lock:
                    tokens, container.outbox = container.outbox, []
                if not container.client.cordon(_CORDON, tokens):
                    break
                closed.append(container)
            keep = max([wanted, *(container.member.index + 1 for container in surplus if container not in closed)])
            with self._supply.lock:
                needed = self._scaler.wanted(self._demand(), time.monotonic()) > wanted  # demand came back
            done = not needed and self._fleet.shrink(keep, {container.id for container in closed})
        except Exception as e:
            log.warning("scaling down to %d containers failed: %s", wanted, e)
            with self._supply.lock:
                self._supply.trouble = e
                self._supply.counters.scale_errors += 1
                self._no_scaling_before = time.monotonic() + self._config.scale_cooldown
        reopened = [container for container in surplus if not done or container not in closed]
        for container in reopened:
            self._reopen(container)
        with self._supply.lock:
            self._supply.counters.scale_downs += done
            for container in reopened:
                container.cordoned = False
            self._scaling = False
            self._supply.refill()

    def _reopen(self, container: Container) -> None:
        """Without the lock."""
        try:
            container.client.cordon(0)
        except SlotPoolError as e:
            log.info("%s stays closed to new leases for %g s: %s", container.id, _CORDON, e)

    # What the health thread does

    def tend(self) -> None:
        """Renew every lease, in one request a container, side by side; see to what is missing or not needed."""
        with self._supply.lock:
            for container in self._supply.containers.values():
                container.exhausted = False
                if not container.checking:
                    container.checking = True
                    self._background.submit(self._check, container)
            if self._scales and time.monotonic() >= self._no_scaling_before:
                self._decide_shrink()
        self.sync()  # one that could not be admitted is tried again, one that is missing is replaced
        with self._supply.lock:
            self._supply.refill()

    def _check(self, container: Container) -> None:
        """Without the lock."""
        with self._supply.lock:
            tokens = list(container.tenures)
        answer: RenewAnswer | None = None
        why = ""
        try:
            answer = container.client.renew(tokens, timeout=max(0.2, min(5.0, self._config.lease_ttl / 3)))
        except SlotPoolError as e:
            if self._supply.open and not container.cordoned:
                log.warning("%s does not answer the health check: %s", container.id, e)
            why = f"it has not answered for {self._config.lease_ttl:g} s: {e}"
        with self._supply.lock:
            container.checking = False
            if answer is not None:
                container.answered_at = time.monotonic()
                why = self._renewed(container, answer)
            # No lease in it can have outlived this, so nothing is taken from anybody.
            elif time.monotonic() - container.answered_at <= self._config.lease_ttl:
                why = ""
            hopeless = bool(why) and container.id in self._supply.containers
            if hopeless:
                self._admitting.add(container.id)  # until the fleet knows, it is still among the members
                self._drop(container, why)
        if hopeless:
            log.warning("%s is given up: %s", container.id, why)
            try:
                self._fleet.replace(container.member)
            except SlotPoolError as e:
                log.warning("%s can't be replaced, and is used again if it answers: %s", container.id, e)
            with self._supply.lock:
                self._admitting.discard(container.id)
            self.sync()

    def _renewed(self, container: Container, answer: RenewAnswer) -> str:
        """Take in what the server said; why the container should be replaced, if it should."""
        for token in answer["lost"]:
            tenure = container.tenures.pop(token, None)
            if tenure is not None:
                tenure.lose(f"{tenure.slot} of {container.id} is lost: its server has ended the lease")
                self._supply.counters.leases_lost += 1
        if answer["lost"]:
            self._supply.keep_ready(lambda _: True)
            self._supply.refill()
        container.told(answer)
        worn = container.size - container.capacity
        now = time.monotonic()
        if 2 * worn <= container.size or not self._scales or self._in_use(container) or now < self._no_worn_before:
            return ""
        # If it is the machine's fault, new ones fare no better.
        self._worn_pause = min(2 * self._worn_pause, _LONGEST) if now < self._no_worn_before + _LONGEST else _WORN
        self._no_worn_before = now + self._worn_pause
        return f"{worn} of its {container.size} slots could not be made clean and are quarantined"

    def _in_use(self, container: Container) -> bool:
        """Whether a caller has one of its slots, or has left one for the next as it is."""
        held = any(tenure.container is container for tenure in self._supply.held)
        return held or any(tenure.used for tenure in container.tenures.values())
