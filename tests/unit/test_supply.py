"""What the supply knows of containers without looking at each of them: it must not be out of date."""

from __future__ import annotations

import random
import threading
import time
from typing import Any, Callable

import pytest

from slotpool.config import SlotPoolConfig
from slotpool.container import Container
from slotpool.errors import ContainerLost
from slotpool.fleet import Member
from slotpool.supply import Supply

SIZE = 3


class Work:
    """The pool's background and its clock, in the test's hands."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []
        self.later: list[tuple[float, Callable[[], None]]] = []

    def submit(self, act: Callable[..., None], *args: Any) -> None:
        self.waiting.append(lambda: act(*args))

    def do_all(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


class Server:
    """A client of a server that nobody else uses."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.leased: set[str] = set()
        self.broken = False
        self._given = 0

    def lease(self, owner: str, ttl: float, take: int, release: list[str], wait: float = 0.0) -> dict[str, Any]:
        if self.broken:
            raise ContainerLost("it is broken", False)
        self.leased -= set(release)
        leases = []
        for _ in range(min(take, SIZE - len(self.leased))):
            self._given += 1
            token = f"{self.index}-{id(self)}-{self._given}"
            self.leased.add(token)
            leases.append({"slot": "slot", "token": token, "workspace": "/", "network": True})
        return {"boot_id": "", "leases": leases, "leased": len(self.leased)}

    def cordon(self, owner: str, ttl: float, release: list[str]) -> bool:
        self.leased -= set(release)
        return not self.leased

    def close(self) -> None:
        pass


class World:
    def __init__(self, prefetch: int = 0) -> None:
        self.work = Work()
        self.supply = Supply(SlotPoolConfig(servers=["http://x:1"], prefetch=prefetch), "owner", self.work)  # type: ignore[arg-type]
        self.supply.later = lambda after, act: self.work.later.append((after, act))

    def add(self, index: int) -> Container:
        container = Container(Member(f"c{index}", index, "http://x:1", None), SIZE)
        container.client.close()
        container.client = Server(index)  # type: ignore[assignment]
        with self.supply.lock:
            self.supply.add(container)
            self.supply.refill()
        return container

    def drop(self, container: Container) -> None:
        with self.supply.lock:
            self.supply.remove(container)
            for tenure in container.tenures.values():
                tenure.lose("it is gone")
            container.tenures.clear()
            self.supply.keep_ready(lambda _: True)
            self.supply.refill()

    def caller(self) -> tuple[threading.Thread, list[Any]]:
        """A thread that waits for a lease, and what it gets."""
        got: list[Any] = []
        waiting = len(self.supply.waiters)
        thread = threading.Thread(target=lambda: got.append(self.supply.take(60)), daemon=True)
        thread.start()
        while not got and len(self.supply.waiters) == waiting:
            time.sleep(0.001)
        with self.supply.lock:  # by then it has also said what it needs
            return thread, got

    def check(self) -> None:
        """What is kept is what a look at everything finds."""
        supply = self.supply
        with supply.lock:
            all_ = list(supply.containers.values())
            assert supply._asking == sum(one.asking for one in all_)
            assert {one.id for one in supply._owing} == {one.id for one in all_ if one.outbox}
            assert list(supply._with_room()) == sorted((c for c in all_ if c.room > 0), key=lambda c: c.member.index)
            kept = supply.standing_demand()
            supply._standing = None
            assert kept == supply.standing_demand()


def test_what_a_dropped_container_was_asked_for_is_asked_of_another() -> None:
    world = World()
    first = world.add(0)
    thread, got = world.caller()
    request = world.work.waiting.pop(0)
    answering = threading.Event()
    lease = first.client.lease

    def hang(*args: Any) -> Any:
        asked.set()
        assert answering.wait(30)
        first.client.broken = True  # type: ignore[attr-defined]
        return lease(*args)

    asked = threading.Event()
    first.client.lease = hang  # type: ignore[assignment]
    hanging = threading.Thread(target=request)
    hanging.start()
    assert asked.wait(30)
    world.drop(first)
    second = world.add(1)
    world.work.do_all()
    thread.join(30)
    assert [tenure.container for tenure in got] == [second]
    answering.set()
    hanging.join()
    world.check()


def test_a_container_of_before_is_not_used_beside_the_one_that_has_come_in_its_place() -> None:
    world = World()
    old = world.add(0)
    thread, got = world.caller()
    world.work.do_all()
    thread.join(30)
    got[0].used = True
    world.supply.give_back(got[0])
    giving_back = world.work.waiting.pop(0)
    world.drop(old)
    new = world.add(0)
    old.client.broken = True  # type: ignore[attr-defined]
    giving_back()
    old.client.broken = False  # type: ignore[attr-defined]
    thread, got = world.caller()
    world.work.do_all()
    thread.join(30)
    assert [tenure.container for tenure in got] == [new]
    world.check()


def test_a_closed_container_is_used_again_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    world = World()
    container = world.add(0)
    with world.supply.lock:
        world.supply.close_off([container], 2000.0)
    thread, got = world.caller()
    world.work.do_all()
    assert not container.client.leased  # type: ignore[attr-defined]
    ((after, act),) = [(after, act) for after, act in world.work.later if act == world.supply._time_is_up]
    now += after
    act()
    world.work.do_all()
    thread.join(30)
    assert [tenure.container for tenure in got] == [container]


@pytest.mark.parametrize("seed", range(20))
def test_nothing_kept_is_out_of_date_whatever_happens(seed: int) -> None:
    chance = random.Random(seed)
    world = World(prefetch=chance.randrange(4))
    supply, held, serial = world.supply, [], 0
    for _ in range(300):
        containers = list(supply.containers.values())
        kind = chance.randrange(9)
        if kind == 0 and len(containers) < 6:
            serial += 1
            world.add(chance.choice([serial, 0]) if "c0" not in supply.containers else serial)
        elif kind == 1 and containers and chance.random() < 0.3:
            world.drop(chance.choice(containers))
        elif kind == 2 and containers:
            chosen = chance.choice(containers).client
            chosen.broken = not chosen.broken  # type: ignore[attr-defined]
        elif kind == 3 and containers:
            with supply.lock:
                supply.close_off([chance.choice(containers)], time.monotonic() + chance.choice([0.0, 1000.0]))
        elif kind in (4, 5) and supply.ready.qsize():
            held.append(supply.take(0))
        elif kind == 6 and held:
            tenure = held.pop(chance.randrange(len(held)))
            tenure.used = chance.random() < 0.8
            supply.give_back(tenure)
        elif kind == 7 and containers:
            with supply.lock:
                told = {"usable": chance.randrange(SIZE + 1), "leased": chance.randrange(SIZE)}
                if chance.choice(containers).told(told):
                    supply.changed()
        for _ in range(chance.randrange(3)):
            if world.work.waiting:
                world.work.waiting.pop(chance.randrange(len(world.work.waiting)))()
        for container in supply.containers.values():
            container.retry_at = 0.0
        world.check()


def test_how_long_callers_waited_is_counted_for_each() -> None:
    world = World()
    began = time.monotonic()
    callers = [world.caller() for _ in range(2)]
    in_line = time.monotonic()
    world.add(0)
    delivered = time.monotonic()
    world.work.do_all()
    for thread, _ in callers:
        thread.join(30)
    ended = time.monotonic()
    assert all(got for _, got in callers)
    assert 2 * (delivered - in_line) * 1000 <= world.supply.counters.requests_wait_ms <= 2 * (ended - began) * 1000
    assert world.supply.counters.requests_queued == 2
