"""The fleet is brought to what demand wants: up at once, down without touching a lease."""

from __future__ import annotations

import logging
import threading
import time

from .background import Background
from .config import SlotPoolConfig
from .container import Container
from .errors import SlotPoolError
from .fleet import Fleet
from .scaling import Demand, Scaler
from .supply import Supply

log = logging.getLogger(__name__)

CORDON = 120.0  # seconds for which a container that is to be ended grants no leases
_SETTLING = 3.0  # after which one that was closed is still there because somebody has asked for more again
_ENOUGH = 60.0  # of these, in which the fleet must have been told to end it; the rest is for its answer


class Resizer:
    """Thread-safe. Methods that begin with ``decide`` and ``regrow`` expect the supply's lock to be held.

    :param changed: is notified when the fleet has been asked for more.
    """

    def __init__(
        self, config: SlotPoolConfig, fleet: Fleet, supply: Supply, background: Background, changed: threading.Condition
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._supply = supply
        self._background = background
        self._changed = changed
        self._scales = config.backend != "static"
        # Guarded by the supply's lock:
        self._scaler = Scaler(config.min_containers, config.max_containers, config.scale_down_after)
        self._busy = False  # the fleet is being grown or shrunk
        self._no_growth_before = 0.0  # after a failure
        self._no_shrinking_before = 0.0

    def _demand(self) -> Demand:
        standing, per_container = self._supply.standing_demand()
        return Demand(len(self._supply.held) + standing, len(self._supply.waiters), per_container)

    def decide_grow(self) -> None:
        """Scale up, if demand wants it."""
        if not self._scales or self._busy or time.monotonic() < self._no_growth_before:
            return
        if self._scaler.needed(self._demand()) > self._fleet.size():
            self._supply.counters.scale_ups += 1
            self.regrow()

    def regrow(self) -> None:
        """Have what has died replaced, in the background, and the fleet brought to what demand needs."""
        if self._scales and not self._busy:
            self._busy = True
            self._background.submit(self._grow)

    def _grow(self) -> None:
        """Without the lock."""
        while True:
            with self._supply.lock:
                wanted = self._scaler.needed(self._demand())
                if time.monotonic() < self._no_growth_before:
                    wanted = min(wanted, self._fleet.size())
            failure: Exception | None = None
            try:
                self._fleet.grow(wanted)
            except Exception as e:  # a Popen may fail in many ways
                failure = e
                log.warning("scaling to %d containers failed: %s", wanted, e)
            with self._supply.lock:
                if failure is not None:
                    self._no_growth_before = self._failed(failure)
                elif self._scaler.needed(self._demand()) > wanted and time.monotonic() >= self._no_growth_before:
                    self._supply.counters.scale_ups += 1
                    continue
                self._busy = False
                self._changed.notify_all()
                return

    def _failed(self, failure: Exception) -> float:
        """Note it; until when not to try again. The lock is held."""
        self._supply.trouble = failure
        self._supply.counters.scale_errors += 1
        return time.monotonic() + self._config.scale_cooldown

    def decide_shrink(self) -> None:
        """End containers that have not been needed for a while, from the highest; never one with a slot in use."""
        size, now = self._fleet.size(), time.monotonic()
        self._reopen_kept(size, now)
        wanted = self._scaler.wanted(self._demand(), size, now)
        if not self._scales or self._busy or now < self._no_shrinking_before or size <= wanted:
            return
        surplus: list[Container] = []
        keep = wanted
        for container in reversed(self._supply.in_order()):
            if container.member.index < wanted:
                break
            if container.cordoned or self._supply.uses(container) or container.leased_by_others:
                keep = container.member.index + 1
                break
            surplus.append(container)
        if size > keep:
            self._busy = True
            self._supply.close_off(surplus, now + CORDON)
            self._background.submit(self._shrink, keep, surplus)

    def _shrink(self, wanted: int, surplus: list[Container]) -> None:
        """End ``surplus``, unless somebody else has a slot there. Without the lock."""
        before = time.monotonic() + _ENOUGH
        closed: list[Container] = []
        reopen = True
        failure: Exception | None = None
        try:
            for container in surplus:
                if not self._close(container):
                    break
                closed.append(container)
            keep = max([wanted, *(container.member.index + 1 for container in surplus if container not in closed)])
            with self._supply.lock:
                needed = self._scaler.needed(self._demand()) > wanted  # demand has come back
            if not needed:
                reopen = False  # even if that fails, as it may have been done all the same
                reopen = not self._fleet.shrink(keep, {container.id for container in closed}, before)
        except Exception as e:
            failure = e
            log.warning("scaling down to %d containers failed: %s", wanted, e)
        if reopen:
            for container in closed:
                self._reopen(container)
        with self._supply.lock:
            if failure is not None:
                self._no_shrinking_before = self._failed(failure)
            self._supply.counters.scale_downs += not reopen and failure is None
            for container in surplus:
                if reopen or container not in closed:
                    container.closed_until = 0.0
            self._supply.changed()
            self._busy = False
            self._supply.refill()

    def _close(self, container: Container) -> bool:
        """Without the lock."""
        try:
            return self._supply.close_at_server(container, CORDON)
        except SlotPoolError as e:  # another pool may be ending it
            log.info("%s could not be closed: %s", container.id, e)
            return False

    def _reopen_kept(self, size: int, now: float) -> None:
        """Use containers again that were to be ended, and are wanted after all. The lock is held."""
        for container in self._supply.containers.values() if not self._busy else ():
            if container.cordoned and container.member.index < size and now > container.closed_until - CORDON + _SETTLING:
                container.closed_until = 0.0
                self._supply.changed()
                self._background.submit(self._reopen, container)

    def _reopen(self, container: Container) -> None:
        """Without the lock."""
        try:
            container.client.cordon(self._supply.owner, 0)
        except SlotPoolError as e:
            log.info("%s stays closed to new leases for a while: %s", container.id, e)
