"""How many containers demand wants. Pure: no I/O, no clock of its own."""

from __future__ import annotations

import attr


@attr.s(slots=True, auto_attribs=True, frozen=True)
class Demand:
    """What the pool needs now."""

    leased: int  # slots handed out, and those that containers lack
    waiting: int  # callers that wait for one


@attr.s(slots=True, auto_attribs=True)
class Scaler:
    """Up at once to what leases and waiters need; down again to the most that was needed in ``down_after`` seconds."""

    slots_per_container: int
    minimum: int
    maximum: int
    down_after: float
    current: int = 0  # containers wanted at the last decision
    _less_since: float | None = attr.ib(default=None, init=False)
    _most_since: int = attr.ib(default=0, init=False)  # needed in that time

    def wanted(self, demand: Demand, now: float) -> int:
        """The number of containers to have from now on; ``now`` is in seconds on a monotonic clock."""
        needed = -(-(demand.leased + demand.waiting) // self.slots_per_container)
        needed = max(self.minimum, min(needed, self.maximum))
        if needed >= self.current:
            self._less_since = None
            self.current = needed
            return needed
        if self._less_since is None:
            self._less_since, self._most_since = now, needed
        self._most_since = max(self._most_since, needed)
        if now - self._less_since >= self.down_after:
            self.current = self._most_since
            self._less_since, self._most_since = now, needed
        return self.current
