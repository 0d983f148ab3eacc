"""The lease table against a model in which a slot's life is read off a history, cordons and all."""

from __future__ import annotations

import attr
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from slotpool.sandbox.leases import Lease, LeaseTable, State

OWNERS = st.sampled_from("abc")
TTLS = st.sampled_from([1.0, 2.0])


@attr.s(auto_attribs=True, eq=False)
class Held:
    """What the model knows of one lease."""

    slot: str
    owner: str
    ttl: float
    token: str
    until: float


class LeaseModel(RuleBasedStateMachine):
    """Three lists of slots and one of leases; every token that there has ever been may be shown again."""

    granted = Bundle("granted")
    dirty = Bundle("dirty")  # slots as they came to be cleaned; consumed when that is told

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.table = LeaseTable([])
        self.slots: list[str] = []
        self.free: set[str] = set()
        self.preparing: set[str] = set()
        self.bad: dict[str, str] = {}
        self.held: list[Held] = []
        self.past: set[str] = set()
        self.cordons: dict[str, float] = {}

    @initialize(target=dirty, count=st.integers(1, 5), clean=st.booleans())
    def begin(self, count: int, clean: bool) -> object:
        self.slots = [f"slot_{i}" for i in range(count)]
        self.preparing = set(self.slots)
        self.table = LeaseTable(self.slots)
        if not clean:
            return multiple(*self.slots)
        for slot in self.slots:
            self.cleaned(slot)
        return multiple()

    def _living(self, token: str) -> Held | None:
        return next((one for one in self.held if one.token == token), None)

    def _end(self, one: Held) -> None:
        self.held.remove(one)
        self.preparing.add(one.slot)

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=granted, owner=OWNERS, count=st.integers(0, 6), ttl=TTLS)
    def take(self, owner: str, count: int, ttl: float) -> object:
        closed = any(until > self.now for until in self.cordons.values())
        expected = [] if closed else [slot for slot in self.slots if slot in self.free][:count]
        leases = self.table.take(owner, count, ttl, self.now)
        assert [(one.slot, one.owner, one.ttl, one.expires) for one in leases] == [
            (slot, owner, ttl, self.now + ttl) for slot in expected
        ]
        for one in leases:
            assert one.token not in self.past, "a token is never given twice"
            self.past.add(one.token)
            self.free.remove(one.slot)
            self.held.append(Held(one.slot, owner, ttl, one.token, self.now + ttl))
        return multiple(*leases)

    @rule(lease=granted, other=st.integers(0, 5))
    def show_to_another_slot(self, lease: Lease, other: int) -> None:
        slot = f"slot_{other}"
        if slot != lease.slot:
            assert self.table.check(slot, lease.token, self.now) is None

    @rule(lease=granted, spoilt=st.sampled_from(["", "x", "\xe9"]))
    def show_a_spoilt_token(self, lease: Lease, spoilt: str) -> None:
        for token in (lease.token[:-1] + spoilt, spoilt):
            if token != lease.token:
                assert self.table.check(lease.slot, token, self.now) is None

    @rule(lease=granted)
    def use(self, lease: Lease) -> None:
        one = self._living(lease.token)
        shown = self.table.check(lease.slot, lease.token, self.now)
        if one is None or one.until <= self.now:
            assert shown is None
        else:
            one.until = self.now + one.ttl
            assert shown is lease

    @rule(leases=st.lists(granted, max_size=6), strange=st.booleans())
    def renew(self, leases: list[Lease], strange: bool) -> None:
        tokens = ["strange"] * strange + [lease.token for lease in leases]
        lost = []
        for token in tokens:
            one = self._living(token)
            if one is None or one.until <= self.now:
                lost.append(token)
            else:
                one.until = self.now + one.ttl
        assert self.table.renew(tokens, self.now) == lost

    @rule(target=dirty, leases=st.lists(granted, max_size=4), strange=st.booleans())
    def release(self, leases: list[Lease], strange: bool) -> object:
        tokens = ["strange"] * strange + [lease.token for lease in leases]
        ended = []
        for token in tokens:
            one = self._living(token)
            if one is not None:
                self._end(one)
                ended.append(one.slot)
        assert self.table.release(iter(tokens)) == ended
        return multiple(*ended)

    @rule(target=dirty)
    def expire(self) -> object:
        due = [one for one in self.held if one.until <= self.now]
        for one in due:
            self._end(one)
        expired = self.table.expire(self.now)
        assert sorted(expired) == sorted(one.slot for one in due)
        return multiple(*expired)

    @rule(slot=consumes(dirty))
    def is_clean(self, slot: str) -> None:
        self.cleaned(slot)

    def cleaned(self, slot: str) -> None:
        self.table.ready(slot)
        self.preparing.remove(slot)
        self.free.add(slot)

    @rule(slot=consumes(dirty), why=st.sampled_from(["", "it was not clean"]))
    def not_cleaned(self, slot: str, why: str) -> None:
        self.table.quarantine(slot, why)
        self.preparing.remove(slot)
        self.bad[slot] = why

    @rule(target=dirty, pick=st.integers(0, 4))
    def try_again(self, pick: int) -> object:
        """Another attempt to clean what could not be cleaned."""
        if not self.bad:
            return multiple()
        name = sorted(self.bad)[pick % len(self.bad)]
        self.table.prepare_again(name)
        del self.bad[name]
        self.preparing.add(name)
        return name

    @rule(slot=st.integers(0, 4))
    def clean_what_is_not_dirty(self, slot: int) -> None:
        """It would free a slot under its holder: refused, and nothing has changed."""
        name = f"slot_{slot}"
        if name in self.slots and name not in self.preparing:
            with pytest.raises(AssertionError):
                self.table.ready(name)
            with pytest.raises(AssertionError):
                self.table.quarantine(name, "wrongly")
        if name in self.slots and name not in self.bad:
            with pytest.raises(AssertionError):
                self.table.prepare_again(name)

    @rule(owner=OWNERS, ttl=st.sampled_from([-1.0, 0.0, 1.0, 4.0]))
    def cordon_it(self, owner: str, ttl: float) -> None:
        self.cordon(owner, ttl)

    def cordon(self, owner: str, ttl: float) -> None:
        if ttl <= 0:
            assert self.table.cordon(owner, self.now + ttl, self.now), "to open it is always allowed"
            self.cordons.pop(owner, None)
        elif self.held:
            assert not self.table.cordon(owner, self.now + ttl, self.now)
            if owner in self.cordons:  # a cordon of before can't be in force while somebody holds a lease
                assert self.cordons[owner] <= self.now
        else:
            assert self.table.cordon(owner, self.now + ttl, self.now)
            self.cordons[owner] = self.now + ttl

    @rule(owner=OWNERS)
    def close_and_open(self, owner: str) -> None:
        """Whoever else has closed it keeps it closed."""
        self.cordon(owner, 4.0)
        self.cordon(owner, 0.0)
        if not any(until > self.now for until in self.cordons.values()):
            leases = self.table.take(owner, 1, 1.0, self.now)
            assert len(leases) == bool(self.free)
            for lease in leases:
                assert self.table.release([lease.token]) == [lease.slot]
                self.table.ready(lease.slot)

    @invariant()
    def each_slot_is_in_one_place(self) -> None:
        leased = [one.slot for one in self.held]
        assert sorted([*leased, *self.free, *self.preparing, *self.bad]) == self.slots

    @invariant()
    def the_table_tells_the_same(self) -> None:
        owners = {one.slot: one.owner for one in self.held}
        states = {
            **dict.fromkeys(self.free, State.FREE),
            **dict.fromkeys(self.preparing, State.PREPARING),
            **dict.fromkeys(self.bad, State.QUARANTINED),
            **dict.fromkeys(owners, State.LEASED),
        }
        assert self.table.describe() == [
            {"slot": slot, "state": states[slot].value, "owner": owners.get(slot, ""), "why": self.bad.get(slot, "")}
            for slot in self.slots
        ]
        assert self.table.counts() == {state.value: list(states.values()).count(state) for state in State}
        assert (self.table.leased(), self.table.usable()) == (len(self.held), len(self.slots) - len(self.bad))
        assert self.table.has_free() == bool(self.free)
        assert max(self.table.opens(), self.now) == max([*self.cordons.values(), self.now])
        assert self.table.next_expiry() == min((one.until for one in self.held), default=None)


LeaseModel.TestCase.settings = settings(max_examples=300, stateful_step_count=50)
TestLeaseModel = LeaseModel.TestCase
