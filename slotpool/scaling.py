"""How many containers demand wants. Pure: no I/O, no clock of its own."""

from __future__ import annotations

import attr


@attr.s(slots=True, auto_attribs=True, frozen=True)
class Demand:
    """What is needed now, in slots."""

    leased: int  # handed out, by this pool and others, and those that containers lack
    waiting: int  # callers that wait for one
    per_container: int


@attr.s(slots=True, auto_attribs=True)
class Scaler:
    """Up at once to what leases and waiters need; down again to the most that was needed in ``down_after`` seconds."""

    minimum: int
    maximum: int
    down_after: float
    current: int = 0  # containers wanted at the last decision
    _size: int = attr.ib(default=0, init=False)  # containers that there were then
    _less_since: float | None = attr.ib(default=None, init=False)
    _most_since: int = attr.ib(default=0, init=False)  # needed in that time

    def needed(self, demand: Demand) -> int:
        """The number of containers that demand needs now."""
        needed = -(-(demand.leased + demand.waiting) // demand.per_container)
        return max(self.minimum, min(needed, self.maximum))

    def wanted(self, demand: Demand, size: int, now: float) -> int:
        """The number of containers to keep; ``now`` is in seconds on a monotonic clock.

        :param size: containers that there are to be. If there are more than before, somebody has asked for them just now, and
            they are kept for ``down_after`` too.
        """
        needed = self.needed(demand)
        if size > self._size:
            self.current, self._less_since = max(self.current, size), None
        self._size = size
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
