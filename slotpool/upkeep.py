"""Containers come and go: taken in, scaled with demand, checked, and dropped when they are lost."""

from __future__ import annotations

import logging
import threading
import time

from .background import Background
from .config import SlotPoolConfig
from .container import Container
from .errors import ContainerRefused, SlotPoolError, StartFailed
from .fleet import Fleet, Member
from .sandbox.protocol import RenewAnswer
from .scaling import Demand, Scaler
from .supply import Supply

log = logging.getLogger(__name__)


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
        self._target = 0  # containers that the fleet is, or is being, brought to
        self._scaling = False  # that is under way
        self._no_scaling_before = 0.0
        self._admitting: set[str] = set()  # members that are being asked who they are
        self._changed = threading.Condition(supply.lock)  # signalled when containers have come, or can't
        supply.demand_changed = self._decide_scale

    def start(self) -> None:
        """Start the fleet and wait for the containers that must be there.

        :raises StartFailed: they are not there in time, or can't be started.
        """
        self._fleet.start(self.sync)
        with self._supply.lock:
            self._decide_scale()
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
            for container in list(self._supply.containers.values()):
                if container.id not in members:
                    self._drop(container, "its container has ended")
                elif container.cordoned and container.member.index < self._target:  # demand came back before it was ended
                    container.cordoned = False
            for id_, member in members.items():
                if id_ not in self._supply.containers and id_ not in self._admitting:
                    self._admitting.add(id_)
                    self._background.submit(self._admit, member)
            self._rescale()
            self._changed.notify_all()

    def _admit(self, member: Member) -> None:
        """Ask a new container who it is, and take it in. Without the lock."""
        container = Container(member, self._config.slots_per_container)
        failure: Exception | None = None
        try:
            container.info = container.client.health()
            container.size = container.capacity = int(container.info.get("slots", 0))
            if container.size < 1:
                failure = ContainerRefused(f"{member.address} did not tell how many slots it has; is the token right?")
        except Exception as e:  # it is not known what answers there
            failure = e
        with self._supply.lock:
            self._admitting.discard(member.id)
            admitted = failure is None and self._supply.open
            if admitted:
                self._supply.containers[member.id] = container
                self._supply.refill()
            elif failure is not None:
                self._supply.trouble = failure
            self._changed.notify_all()
        if not admitted:
            container.client.close()
        if failure is not None:
            log.warning("%s can't be used: %s", member.id, failure)
        else:
            isolation = container.info.get("isolation")
            log.info("%s has come, with %d slots, isolation %s", member.id, container.capacity, isolation)

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
        lacking = sum(
            max(0, self._config.slots_per_container - one.capacity)
            for one in self._supply.containers.values()
            if not one.cordoned
        )
        return Demand(len(self._supply.held) + lacking, len(self._supply.waiters))

    def _decide_scale(self) -> None:
        """Scale up, if demand wants it."""
        now = time.monotonic()
        if self._scales and self._scaler.wanted(self._demand(), now) > self._target and now >= self._no_scaling_before:
            self._target = self._scaler.current
            self._supply.counters.scale_ups += 1
            self._rescale()

    def _rescale(self) -> None:
        """Have the fleet brought to the target, in the background."""
        if self._scales and not self._scaling:
            self._scaling = True
            self._background.submit(self._scale)

    def _scale(self) -> None:
        """Without the lock."""
        while True:
            with self._supply.lock:
                target = self._target
            failure: Exception | None = None
            try:
                self._fleet.scale(target)
            except Exception as e:  # a Popen may fail in many ways
                failure = e
                log.warning("scaling to %d containers failed: %s", target, e)
            with self._supply.lock:
                if failure is not None:
                    self._supply.trouble = failure
                    self._supply.counters.scale_errors += 1
                    self._no_scaling_before = time.monotonic() + self._config.scale_cooldown
                    self._target = len(self._supply.containers)
                if failure is not None or target == self._target:
                    self._scaling = False
                    self._changed.notify_all()
                    return

    def _scale_down(self) -> None:
        """End containers that have not been needed for a while, from the highest; never one with a slot in use."""
        supply = self._supply
        wanted = self._scaler.wanted(self._demand(), time.monotonic())
        in_use = {tenure.container.id for tenure in supply.held}
        for container in reversed(supply.in_order()):
            if container.member.index < wanted or container.id in in_use:
                break
            container.cordoned = True
            container.tenures.clear()  # idle ones: they end with it
        used = [container.member.index + 1 for container in supply.containers.values() if not container.cordoned]
        keep = max([wanted, *used])
        if keep < self._target:
            self._target = keep
            supply.counters.scale_downs += 1
            supply.keep_ready(lambda tenure: not tenure.container.cordoned)
            self._rescale()

    # What the health thread does

    def tend(self) -> None:
        """Renew every lease, in one request a container, side by side; see to what is missing or not needed."""
        with self._supply.lock:
            for container in self._supply.containers.values():
                container.exhausted = False
                if not container.checking:
                    container.checking = True
                    self._background.submit(self._check, container)
            if self._scales:
                self._scale_down()
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
                self._drop(container, why)
        if hopeless:
            log.warning("%s is given up: %s", container.id, why)
            self._fleet.replace(container.member)
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
        container.capacity = int(answer.get("usable", container.capacity))
        worn = container.size - container.capacity
        if worn <= 0 or not self._scales or any(tenure.container is container for tenure in self._supply.held):
            return ""
        return f"{worn} of its {container.size} slots could not be made clean and are quarantined"
