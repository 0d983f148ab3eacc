"""The lease table, call by call and against a small model."""

from __future__ import annotations

import attr
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from slotpool.sandbox.leases import LeaseTable

SLOTS = [f"slot_{i}" for i in range(4)]


def ready_table(count: int = 3) -> LeaseTable:
    table = LeaseTable(SLOTS[:count])
    for slot in SLOTS[:count]:
        table.ready(slot)
    return table


def test_a_slot_is_not_leased_before_it_is_ready() -> None:
    table = LeaseTable(SLOTS)
    assert table.counts() == {"preparing": 4, "free": 0, "leased": 0, "quarantined": 0}
    assert table.take("o", 4, 10, 0) == []
    table.ready("slot_2")
    assert [lease.slot for lease in table.take("o", 4, 10, 0)] == ["slot_2"]


def test_the_first_free_slots_are_taken_and_none_twice() -> None:
    table = ready_table()
    first = table.take("a", 2, 10, 0)
    second = table.take("b", 2, 10, 0)
    assert [lease.slot for lease in first] == ["slot_0", "slot_1"]
    assert [lease.slot for lease in second] == ["slot_2"]
    assert table.take("c", 1, 10, 0) == []
    assert table.take("c", 0, 10, 0) == []
    assert len({lease.token for lease in [*first, *second]}) == 3


def test_a_token_is_long_and_random() -> None:
    tokens = set()
    table = ready_table(1)
    for _ in range(100):
        (lease,) = table.take("o", 1, 10, 0)
        tokens.add(lease.token)
        assert len(lease.token) >= 20
        assert table.release([lease.token]) == ["slot_0"]
        table.ready("slot_0")
    assert len(tokens) == 100


def test_only_its_own_token_opens_a_slot() -> None:
    table = ready_table()
    first, second = table.take("o", 2, 10, 0)
    assert table.check("slot_0", first.token, 1) is first
    assert table.check("slot_1", first.token, 1) is None
    assert table.check("slot_0", second.token, 1) is None
    assert table.check("slot_2", first.token, 1) is None
    assert table.check("slot_9", first.token, 1) is None
    for wrong in ("", first.token[:-1], first.token + "x", "\u00e9"):
        assert table.check("slot_0", wrong, 1) is None


def test_a_use_renews_and_a_refused_one_does_not() -> None:
    table = ready_table()
    first, second = table.take("o", 2, 10, 0)
    assert table.check("slot_0", second.token, 9) is None
    assert table.next_expiry() == 10
    table.check("slot_0", first.token, 9)
    assert first.expires == 19
    assert second.expires == 10
    assert table.expire(10) == ["slot_1"]
    assert table.next_expiry() == 19


def test_a_lease_whose_time_is_up_is_refused_even_before_anybody_expires_it() -> None:
    table = ready_table(1)
    (lease,) = table.take("o", 1, 10, 0)
    assert table.check("slot_0", lease.token, 10) is None
    assert table.renew([lease.token], 10) == [lease.token]
    assert table.expire(10) == ["slot_0"]


def test_renewal_in_bulk_tells_which_are_lost() -> None:
    table = ready_table()
    first, second, third = table.take("o", 3, 10, 0)
    table.release([second.token])
    assert table.renew([first.token, "nonsense", second.token, third.token, ""], 5) == ["nonsense", second.token, ""]
    assert (first.expires, third.expires) == (15, 15)


def test_a_released_token_is_stale_and_changes_nothing() -> None:
    table = ready_table(1)
    (old,) = table.take("a", 1, 10, 0)
    assert table.release([old.token, old.token, "nonsense"]) == ["slot_0"]
    assert table.take("b", 1, 10, 0) == []  # it has to be cleaned first
    table.ready("slot_0")
    (new,) = table.take("b", 1, 10, 0)
    assert table.release([old.token]) == []
    assert table.check("slot_0", old.token, 1) is None
    assert table.renew([old.token], 1) == [old.token]
    assert table.check("slot_0", new.token, 1) is new
    assert table.describe() == [{"slot": "slot_0", "state": "leased", "owner": "b", "why": ""}]


def test_a_quarantined_slot_is_counted_and_not_leased_until_it_is_clean() -> None:
    table = ready_table(2)
    (lease,) = table.take("o", 1, 10, 0)
    table.release([lease.token])
    table.quarantine("slot_0", "its processes could not be killed")
    assert table.counts() == {"preparing": 0, "free": 1, "leased": 0, "quarantined": 1}
    assert [one.slot for one in table.take("o", 2, 10, 0)] == ["slot_1"]
    assert table.describe()[0] == {
        "slot": "slot_0",
        "state": "quarantined",
        "owner": "",
        "why": "its processes could not be killed",
    }
    table.prepare_again("slot_0")
    assert table.take("o", 2, 10, 0) == []
    assert table.describe()[0] == {"slot": "slot_0", "state": "preparing", "owner": "", "why": ""}
    table.ready("slot_0")
    assert [one.slot for one in table.take("o", 2, 10, 0)] == ["slot_0"]


def test_only_a_slot_that_is_being_prepared_can_become_ready() -> None:
    table = ready_table(1)
    with pytest.raises(AssertionError):
        table.ready("slot_0")
    table.take("o", 1, 10, 0)
    with pytest.raises(AssertionError):
        table.ready("slot_0")
    with pytest.raises(AssertionError):
        table.quarantine("slot_0", "x")
    with pytest.raises(AssertionError):
        table.prepare_again("slot_0")


def test_nothing_expires_of_a_new_one() -> None:
    assert LeaseTable(SLOTS).next_expiry() is None


@attr.s(auto_attribs=True)
class Row:
    state: str = "preparing"
    owner: str = ""
    token: str | None = None
    ttl: int = 0
    expires: int = 0
    why: str = ""


class LeasesAgainstModel(RuleBasedStateMachine):
    """A list of rows says what holds; tokens of the past are kept, to be tried again."""

    def __init__(self) -> None:
        super().__init__()
        self.table = LeaseTable(SLOTS)
        self.model = {slot: Row() for slot in SLOTS}
        self.tokens = ["", "nonsense"]
        self.now = 0

    def _end(self, row: Row) -> None:
        row.state, row.owner, row.token = "preparing", "", None

    def _slot_of(self, token: str) -> str | None:
        return next((slot for slot, row in self.model.items() if row.token == token), None)

    def _picked(self, picks: list[int]) -> list[str]:
        return [self.tokens[pick % len(self.tokens)] for pick in picks]

    @rule(seconds=st.integers(0, 8))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds

    @rule(count=st.integers(0, 5), owner=st.sampled_from("ab"), ttl=st.integers(1, 10))
    def take(self, count: int, owner: str, ttl: int) -> None:
        free = [slot for slot, row in self.model.items() if row.state == "free"][:count]
        leases = self.table.take(owner, count, ttl, self.now)
        assert [lease.slot for lease in leases] == free
        for lease in leases:
            assert lease.token not in self.tokens
            assert (lease.owner, lease.expires) == (owner, self.now + ttl)
            self.tokens.append(lease.token)
            self.model[lease.slot] = Row("leased", owner, lease.token, ttl, self.now + ttl)

    @rule(slot=st.sampled_from([*SLOTS, "slot_9"]), pick=st.integers(0, 50))
    def check(self, slot: str, pick: int) -> None:
        (token,) = self._picked([pick])
        row = self.model.get(slot)
        holds = row is not None and row.token == token and row.expires > self.now
        lease = self.table.check(slot, token, self.now)
        assert (lease is not None) == holds
        if row is not None and holds:
            row.expires = self.now + row.ttl

    @rule(picks=st.lists(st.integers(0, 50), max_size=5))
    def renew(self, picks: list[int]) -> None:
        lost = []
        for token in self._picked(picks):
            slot = self._slot_of(token)
            if slot is None or self.model[slot].expires <= self.now:
                lost.append(token)
            else:
                self.model[slot].expires = self.now + self.model[slot].ttl
        assert self.table.renew(self._picked(picks), self.now) == lost

    @rule(picks=st.lists(st.integers(0, 50), max_size=5))
    def release(self, picks: list[int]) -> None:
        ended = []
        for token in self._picked(picks):
            slot = self._slot_of(token)
            if slot is not None:
                self._end(self.model[slot])
                ended.append(slot)
        assert self.table.release(self._picked(picks)) == ended

    @rule()
    def expire(self) -> None:
        due = [slot for slot, row in self.model.items() if row.token is not None and row.expires <= self.now]
        for slot in due:
            self._end(self.model[slot])
        assert sorted(self.table.expire(self.now)) == due

    @precondition(lambda self: any(row.state == "preparing" for row in self.model.values()))
    @rule(pick=st.integers(0, 3), clean=st.sampled_from([True, True, True, False]))
    def cleaned(self, pick: int, clean: bool) -> None:
        preparing = [slot for slot, row in self.model.items() if row.state == "preparing"]
        slot = preparing[pick % len(preparing)]
        if clean:
            self.table.ready(slot)
            self.model[slot] = Row("free")
        else:
            self.table.quarantine(slot, f"because of {slot}")
            self.model[slot] = Row("quarantined", why=f"because of {slot}")

    @precondition(lambda self: any(row.state == "quarantined" for row in self.model.values()))
    @rule(pick=st.integers(0, 3))
    def tried_again(self, pick: int) -> None:
        quarantined = [slot for slot, row in self.model.items() if row.state == "quarantined"]
        slot = quarantined[pick % len(quarantined)]
        self.table.prepare_again(slot)
        self.model[slot] = Row("preparing")

    @invariant()
    def tells_the_same(self) -> None:
        described = [{"slot": slot, "state": row.state, "owner": row.owner, "why": row.why} for slot, row in self.model.items()]
        assert self.table.describe() == described
        states = [row.state for row in self.model.values()]
        assert self.table.counts() == {name: states.count(name) for name in ("preparing", "free", "leased", "quarantined")}
        assert self.table.next_expiry() == min((row.expires for row in self.model.values() if row.token), default=None)


LeasesAgainstModel.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestLeasesAgainstModel = LeasesAgainstModel.TestCase


def test_a_cordoned_table_grants_nothing_until_everybody_who_closed_it_has_opened_it_again() -> None:
    table = LeaseTable(["slot_0"])
    table.ready("slot_0")
    assert table.cordon("a", 100, 0)
    assert table.cordon("b", 50, 0)
    assert table.take("c", 1, 10, 1) == []
    assert table.cordon("a", 2, 2)
    assert table.take("c", 1, 10, 3) == []
    (lease,) = table.take("c", 1, 10, 50)
    assert not table.cordon("a", 100, 51)
    assert table.leased() == 1
    table.release([lease.token])
    assert table.cordon("a", 100, 52)
