"""Who holds which slot: a table with lease, renewal, release and expiry. Pure: no I/O, no threads, the clock is passed in."""

from __future__ import annotations

import enum
import hmac
import math
import secrets
from collections.abc import Iterable

import attr


class State(enum.Enum):
    """Where a slot is in its life: preparing → free → leased → preparing …, or quarantined for good."""

    PREPARING = "preparing"
    FREE = "free"
    LEASED = "leased"
    QUARANTINED = "quarantined"


@attr.s(slots=True, auto_attribs=True, eq=False)
class Lease:
    """The exclusive right to one slot. ``token`` is random: a fencing token that every use must show."""

    slot: str
    owner: str
    ttl: float
    expires: float
    token: str = attr.ib(factory=lambda: secrets.token_urlsafe(16))


@attr.s(slots=True, auto_attribs=True, eq=False)
class _Row:
    state: State = State.PREPARING
    lease: Lease | None = None
    why: str = ""


class LeaseTable:
    """The slots of one server. Not thread-safe: the owner locks. All times are seconds on one monotonic clock.

    A slot that loses its lease is ``PREPARING`` until :meth:`ready` or :meth:`quarantine` says how its cleaning went.
    """

    def __init__(self, slots: Iterable[str]) -> None:
        self._rows: dict[str, _Row] = {slot: _Row() for slot in slots}
        self._by_token: dict[str, Lease] = {}
        self._cordons: dict[str, float] = {}  # until when, by who has asked for it

    def take(self, owner: str, count: int, ttl: float, now: float) -> list[Lease]:
        """Lease up to ``count`` free slots, the first in order."""
        taken: list[Lease] = []
        if now < self.opens():
            return taken
        for slot, row in self._rows.items():
            if len(taken) == count:
                break
            if row.state is State.FREE:
                row.state = State.LEASED
                row.lease = Lease(slot, owner, ttl, now + ttl)
                self._by_token[row.lease.token] = row.lease
                taken.append(row.lease)
        return taken

    def check(self, slot: str, token: str, now: float) -> Lease | None:
        """The lease of ``slot``, renewed, if ``token`` is its token; else None, and nothing has changed."""
        row = self._rows.get(slot)
        if row is None or row.lease is None or not hmac.compare_digest(row.lease.token.encode(), token.encode()):
            return None
        if row.lease.expires <= now:
            return None
        row.lease.expires = now + row.lease.ttl
        return row.lease

    def renew(self, tokens: Iterable[str], now: float) -> list[str]:
        """Renew those leases; the tokens among them that aren't held."""
        lost = []
        for token in tokens:
            lease = self._by_token.get(token)
            if lease is None or self.check(lease.slot, token, now) is None:
                lost.append(token)
        return lost

    def held(self, tokens: Iterable[str]) -> list[Lease]:
        """The leases of those tokens, but for tokens that aren't held."""
        return [lease for lease in (self._by_token.get(token) for token in tokens) if lease is not None]

    def release(self, tokens: Iterable[str]) -> list[str]:
        """End those leases; the slots to be cleaned. Tokens that aren't held are passed over."""
        return [self._end(lease) for lease in (self._by_token.get(token) for token in tokens) if lease is not None]

    def overdue(self, now: float) -> list[Lease]:
        """The leases whose time is up."""
        return [lease for lease in self._by_token.values() if lease.expires <= now]

    def expire(self, now: float) -> list[str]:
        """End the leases whose time is up; the slots to be cleaned."""
        return [self._end(lease) for lease in self.overdue(now)]

    def next_expiry(self) -> float | None:
        """When the next lease expires, if nothing renews it; None if there is none."""
        return min((lease.expires for lease in self._by_token.values()), default=None)

    def _end(self, lease: Lease) -> str:
        row = self._rows[lease.slot]
        row.state, row.lease = State.PREPARING, None
        del self._by_token[lease.token]
        return lease.slot

    def ready(self, slot: str) -> None:
        """``slot`` is clean and may be leased."""
        row = self._rows[slot]
        assert row.state is State.PREPARING, row.state
        row.state = State.FREE

    def quarantine(self, slot: str, why: str) -> None:
        """``slot`` could not be made clean; it is not leased."""
        row = self._rows[slot]
        assert row.state is State.PREPARING, row.state
        row.state, row.why = State.QUARANTINED, why

    def prepare_again(self, slot: str) -> None:
        """Another attempt is made to make ``slot`` clean, which was quarantined."""
        row = self._rows[slot]
        assert row.state is State.QUARANTINED, row.state
        row.state, row.why = State.PREPARING, ""

    def cordon(self, owner: str, until: float, now: float) -> bool:
        """Grant no lease until then, or, if that is past, again as far as ``owner`` is concerned; False if one is held, and
        nothing has changed.
        """
        self._cordons = {other: end for other, end in self._cordons.items() if end > now and other != owner}
        if until <= now:
            return True
        if self._by_token:
            return False
        self._cordons[owner] = until
        return True

    def opens(self) -> float:
        """When leases are granted again, unless who has asked for a cordon changes that; not in the future if they are."""
        return max(self._cordons.values(), default=-math.inf)

    def has_free(self) -> bool:
        """Whether a slot may be leased, unless it is cordoned."""
        return any(row.state is State.FREE for row in self._rows.values())

    def leased(self) -> int:
        """How many slots are leased."""
        return len(self._by_token)

    def usable(self) -> int:
        """How many slots are not quarantined."""
        return sum(row.state is not State.QUARANTINED for row in self._rows.values())

    def counts(self) -> dict[str, int]:
        """How many slots are in each state."""
        found = {state.value: 0 for state in State}
        for row in self._rows.values():
            found[row.state.value] += 1
        return found

    def describe(self) -> list[dict[str, str]]:
        """Each slot's id, state, owner and, if it is quarantined, why."""
        return [
            {
                "slot": slot,
                "state": row.state.value,
                "owner": row.lease.owner if row.lease else "",
                "why": row.why,
            }
            for slot, row in self._rows.items()
        ]
