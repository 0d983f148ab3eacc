"""How many containers demand wants: up at once, down when it has needed less for long enough."""

from __future__ import annotations

from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st

from slotpool.scaling import Demand, Scaler


class Need(NamedTuple):
    leased: int
    waiting: int


class Wants:
    """A scaler with containers of so many slots, which nobody else asks for."""

    def __init__(self, slots: int, minimum: int, maximum: int, down_after: float) -> None:
        self.slots_per_container, self.minimum, self.maximum, self.down_after = slots, minimum, maximum, down_after
        self.scaler = Scaler(minimum, maximum, down_after)

    def wanted(self, need: Need, now: float, size: int = 0) -> int:
        return self.scaler.wanted(Demand(*need, self.slots_per_container), size, now)


# Steps of time and demand. Whole numbers, so that sums are exact.
STEPS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=30)
SCALERS = st.builds(
    lambda slots, low, more, after: Wants(slots, low, low + more, after),
    st.integers(1, 10),
    st.integers(0, 5),
    st.integers(1, 10),
    st.integers(0, 60),
)
FEW = settings(max_examples=150)


def needed(scaler: Wants, leased: int, waiting: int) -> int:
    """The least number of containers with so many slots, within the limits; counted up, not computed."""
    count = scaler.minimum
    while count < scaler.maximum and count * scaler.slots_per_container < leased + waiting:
        count += 1
    return count


def test_nothing_is_needed_for_nobody() -> None:
    assert Wants(10, 0, 5, 60).wanted(Need(0, 0), 0) == 0


def test_the_minimum_is_there_without_demand() -> None:
    assert Wants(10, 2, 5, 60).wanted(Need(0, 0), 0) == 2


def test_a_full_container_is_enough_and_one_more_waiter_is_not() -> None:
    assert Wants(10, 0, 5, 60).wanted(Need(9, 1), 0) == 1
    assert Wants(10, 0, 5, 60).wanted(Need(10, 1), 0) == 2


def test_all_that_is_needed_is_wanted_at_once_up_to_the_maximum() -> None:
    assert Wants(10, 0, 5, 60).wanted(Need(0, 45), 0) == 5
    assert Wants(10, 0, 5, 60).wanted(Need(0, 4500), 0) == 5


def test_it_goes_down_when_less_was_enough_for_long_enough_and_not_before() -> None:
    scaler = Wants(10, 1, 5, 60)
    assert scaler.wanted(Need(50, 0), 0) == 5
    assert scaler.wanted(Need(0, 0), 100) == 5
    assert scaler.wanted(Need(0, 0), 159) == 5
    assert scaler.wanted(Need(0, 0), 160) == 1


def test_a_peak_meanwhile_starts_the_time_anew() -> None:
    scaler = Wants(10, 1, 5, 60)
    scaler.wanted(Need(50, 0), 0)
    scaler.wanted(Need(0, 0), 10)
    assert scaler.wanted(Need(50, 0), 60) == 5
    assert scaler.wanted(Need(0, 0), 71) == 5
    assert scaler.wanted(Need(0, 0), 130) == 5
    assert scaler.wanted(Need(0, 0), 131) == 1


def test_what_was_needed_a_second_ago_is_kept_though_the_peak_before_is_long_past() -> None:
    scaler = Wants(10, 0, 5, 60)
    scaler.wanted(Need(50, 0), 0)
    scaler.wanted(Need(0, 0), 10)
    scaler.wanted(Need(40, 0), 69)
    assert scaler.wanted(Need(0, 0), 70) == 4


@FEW
@given(scaler=SCALERS, steps=STEPS)
def test_it_is_always_enough_and_always_within_the_limits(scaler: Wants, steps: list[tuple[int, int, int]]) -> None:
    now, most = 0, 0
    for pause, leased, waiting in steps:
        now += pause
        need = needed(scaler, leased, waiting)
        most = max(most, need)
        wanted = scaler.wanted(Need(leased, waiting), now)
        assert need <= wanted <= most
        assert scaler.minimum <= wanted <= scaler.maximum
        assert scaler.scaler.current == wanted


@FEW
@given(scaler=SCALERS, steps=STEPS)
def test_no_container_is_given_up_that_was_needed_a_moment_ago(scaler: Wants, steps: list[tuple[int, int, int]]) -> None:
    now = 0
    seen: list[tuple[int, int]] = []
    for pause, leased, waiting in steps:
        now += pause
        seen.append((now, needed(scaler, leased, waiting)))
        wanted = scaler.wanted(Need(leased, waiting), now)
        assert wanted >= max(seen[-1][1], *(need for at, need in seen if now - at < scaler.down_after), 0)


@FEW
@given(scaler=SCALERS, steps=STEPS, leased=st.integers(0, 40))
def test_steady_demand_ends_with_just_what_it_needs(scaler: Wants, steps: list[tuple[int, int, int]], leased: int) -> None:
    now = 0
    for pause, before, waiting in steps:
        now += pause
        scaler.wanted(Need(before, waiting), now)
    for _ in range(3):
        wanted = scaler.wanted(Need(leased, 0), now)
        now += int(scaler.down_after)
    assert wanted == needed(scaler, leased, 0)


def test_containers_that_somebody_else_has_just_asked_for_are_kept_as_long() -> None:
    wants = Wants(10, 1, 5, 60)
    assert wants.wanted(Need(0, 0), 0, size=1) == 1
    assert wants.wanted(Need(0, 0), 1000, size=4) == 4
    assert wants.wanted(Need(0, 0), 1059, size=4) == 4
    assert wants.wanted(Need(0, 0), 1060, size=4) == 1
    assert wants.scaler.needed(Demand(0, 0, 10)) == 1
