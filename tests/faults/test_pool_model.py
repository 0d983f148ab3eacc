"""The supply of leases against a model of its servers: no slot is with two callers, and none is lost to all."""

from __future__ import annotations

from typing import Any, Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from slotpool.config import SlotPoolConfig
from slotpool.container import Container
from slotpool.errors import AcquireTimeout, ContainerLost, PoolClosed
from slotpool.fleet import Member
from slotpool.supply import Supply
from slotpool.tenure import Tenure


class Work:
    """The pool's background, done when the test says so."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, act: Callable[..., None], *args: Any) -> None:
        self.waiting.append(lambda: act(*args))


class Server:
    """What a server is to a pool: so many slots, each with one lease at most."""

    def __init__(self, name: str, slots: int) -> None:
        self.name = name
        self.slots = [f"{name}/slot_{i}" for i in range(slots)]
        self.leased: dict[str, str] = {}  # tokens, by slot
        self.broken = ""  # "deaf": no request comes to it; "mute": they do, and its answers are lost
        self.untold: set[str] = set()  # tokens whose answer was lost
        self.meanwhile: Callable[[], None] = lambda: None  # what happens while the next request is under way
        self._given = 0

    def lease(self, owner: str, ttl: float, take: int, release: list[str], wait: float = 0.0) -> dict[str, Any]:
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        if self.broken == "deaf":
            raise ContainerLost("it does not answer", False)
        self.leased = {slot: token for slot, token in self.leased.items() if token not in release}
        leases: list[dict[str, Any]] = []
        for slot in [slot for slot in self.slots if slot not in self.leased][:take]:
            self._given += 1
            self.leased[slot] = f"{slot}:{self._given}"
            leases.append({"slot": slot, "token": self.leased[slot], "workspace": "/", "network": True})
        if self.broken == "mute":
            self.untold |= {lease["token"] for lease in leases}
            raise ContainerLost("it has not answered", False)
        return {"boot_id": "", "leases": leases, "leased": len(self.leased)}

    def expire(self) -> None:
        """End the leases that nobody knows of."""
        self.leased = {slot: token for slot, token in self.leased.items() if token not in self.untold}

    def close(self) -> None:
        pass


class SupplyModel(RuleBasedStateMachine):
    """Callers acquire, use and release; containers come, go, and do not answer; requests are done in any order."""

    tenures = Bundle("tenures")

    @initialize(slots=st.integers(1, 3), prefetch=st.integers(0, 3), containers=st.integers(1, 3), local=st.booleans())
    def begin(self, slots: int, prefetch: int, containers: int, local: bool) -> None:
        self.work = Work()
        settings_: dict[str, Any] = {"backend": "local"} if local else {"servers": ["http://x:1"]}
        self.slots = slots
        self.supply = Supply(SlotPoolConfig.make({**settings_, "prefetch": prefetch}), "owner", self.work)  # type: ignore[arg-type]
        self.supply.later = lambda after, act: None  # settle() looks again instead
        self.servers: dict[str, Server] = {}
        self.containers: dict[str, Container] = {}
        self.held: dict[str, Tenure] = {}  # by slot: what callers have, as far as its container is there
        self.gone: dict[str, set[str]] = {}  # what was leased of a container when it went
        self.closed = False
        self.serial = 0
        for _ in range(containers):
            self.container_comes()

    def _work(self, pick: int) -> None:
        if self.work.waiting:
            self.work.waiting.pop(pick % len(self.work.waiting))()

    @rule()
    def container_comes(self) -> None:
        if len(self.containers) >= 4 or self.closed:
            return
        self.serial += 1
        name = f"c{self.serial}"
        container = Container(Member(name, self.serial, "http://x:1", None), self.slots)
        container.client.close()
        self.servers[name] = Server(name, self.slots)
        container.client = self.servers[name]  # type: ignore[assignment]
        self.containers[name] = container
        with self.supply.lock:
            self.supply.add(container)
            self.supply.refill()

    @rule(pick=st.integers(0, 3))
    def container_goes(self, pick: int) -> None:
        self.container_goes_now(pick)

    def container_goes_now(self, pick: int) -> None:
        """As the pool drops it: its leases are lost, also those that callers have."""
        if not self.containers:
            return
        container = self.containers.pop(sorted(self.containers)[pick % len(self.containers)])
        server = self.servers[container.id]
        server.broken = ""
        self.gone[container.id] = {*server.leased.values()}
        with self.supply.lock:
            self.supply.remove(container)
            for tenure in container.tenures.values():
                tenure.lose("its container has ended")
            container.tenures.clear()
            self.supply.keep_ready(lambda _: True)
            self.supply.refill()
        for slot, tenure in list(self.held.items()):
            if tenure.container is container:
                assert tenure.lost, "its holder is told"
                del self.held[slot]

    @rule(pick=st.integers(0, 3), how=st.sampled_from(["", "deaf", "mute"]))
    def server_fails(self, pick: int, how: str) -> None:
        if self.containers:
            self.servers[sorted(self.containers)[pick % len(self.containers)]].broken = how

    @rule(pick=st.integers(0, 20), amid=st.sampled_from(["", "", "goes", "stops"]), which=st.integers(0, 3))
    def work_is_done(self, pick: int, amid: str, which: int) -> None:
        """Perhaps something else happens while the request is under way."""
        acts: dict[str, Callable[[], Any]] = {"goes": lambda: self.container_goes_now(which), "stops": self._stop}
        if amid == "stops" and which:
            amid = ""  # not too often, as little happens afterwards
        for server in self.servers.values():
            server.meanwhile = acts.get(amid, lambda: None)
        self._work(pick)
        for server in self.servers.values():
            server.meanwhile = lambda: None

    def _take(self) -> Tenure | None:
        if self.closed:
            with pytest.raises(PoolClosed):
                self.supply.take(0)
            return None
        ready = self.supply.ready.qsize()
        try:
            tenure = self.supply.take(0)
        except AcquireTimeout:
            assert ready == 0, "what is ready is given"
            return None
        assert ready > 0
        assert not tenure.lost
        assert tenure.slot not in self.held, "no slot is with two callers"
        server = self.servers[tenure.container.id]
        assert server.leased[tenure.slot] == tenure.token, "the server knows of it"
        self.held[tenure.slot] = tenure
        return tenure

    @rule(target=tenures)
    def acquire(self) -> object:
        tenure = self._take()
        return multiple() if tenure is None else tenure

    @rule(target=tenures)
    def acquire_until_nothing_is_ready(self) -> object:
        self._settle()
        taken = []
        while (tenure := self._take()) is not None:
            taken.append(tenure)
        return multiple(*taken)

    @rule(tenure=consumes(tenures), used=st.booleans(), keep=st.booleans())
    def give_back(self, tenure: Tenure, used: bool, keep: bool) -> None:
        self.release(tenure, used, keep)

    def release(self, tenure: Tenure, used: bool, keep: bool) -> None:
        tenure.used = tenure.used or used
        known = self.held.get(tenure.slot) is tenure
        assert tenure.end(), "once"
        self.supply.give_back(tenure, keep)
        if known:
            del self.held[tenure.slot]
        assert not tenure.end()
        waiting = len(self.work.waiting)
        self.supply.give_back(tenure, keep)
        assert len(self.work.waiting) == waiting, "a second time does nothing"

    @rule(tenure=consumes(tenures))
    def release_to_a_deaf_server(self, tenure: Tenure) -> None:
        """It is told again, when it answers."""
        self.servers[tenure.container.id].broken = "deaf"
        self.release(tenure, True, False)
        for _ in range(20):
            self._work(0)
        self.none_is_lost()

    @rule(close=st.sampled_from([False] * 9 + [True]))
    def close(self, close: bool) -> None:
        if close:
            self._stop()

    def _stop(self) -> None:
        if self.closed:
            return
        handed_out = self.supply.close()
        assert {one.slot for one in handed_out if not one.lost} == set(self.held)
        for tenure in handed_out:
            tenure.lose("the pool has been stopped")
        self.held.clear()
        self.closed = True

    def _settle(self) -> None:
        """Have everything answer, and do all that there is to do."""
        for name in self.containers:
            self.servers[name].broken = ""
        for _ in range(3):
            self._work_all()
            with self.supply.lock:
                for container in self.containers.values():
                    container.retry_at = 0.0
                    container.exhausted = False  # as the health check does in each period
                    self.servers[container.id].expire()
                self.supply.refill()
        self._work_all()

    def _work_all(self) -> None:
        for _ in range(1000):
            self._work(0)
        assert not self.work.waiting, "there is an end to it"

    @rule()
    def all_is_done(self) -> None:
        self.none_is_lost()

    def none_is_lost(self) -> None:
        """Once all is done, each slot is with a caller, ready, or free at its server, and as many are ready as are wanted."""
        self._settle()
        if self.closed:
            return
        ready = list(self.supply.ready.queue)
        slots = [one.slot for one in ready]
        assert len(set(slots)) == len(slots)
        assert not {*slots} & {*self.held}
        leased = {slot for name in self.containers for slot in self.servers[name].leased}
        assert leased == {*slots, *self.held}, "the servers have leased what callers have and what is ready, no more"
        free = self.slots * len(self.containers) - len(leased)
        assert free == 0 or len(ready) >= self.supply._config.prefetch

    @invariant()
    def what_callers_have_is_theirs(self) -> None:
        if not hasattr(self, "supply"):
            return
        known = {tenure.slot: tenure for tenure in self.supply.held if not tenure.lost}
        assert known == self.held
        for tenure in self.held.values():
            assert self.servers[tenure.container.id].leased.get(tenure.slot) == tenure.token
        for name, leased in self.gone.items():
            assert {*self.servers[name].leased.values()} <= leased | self.servers[name].untold, "a late grant is given back"
        ready = [tenure.token for tenure in self.supply.ready.queue if not tenure.lost]
        assert len(set(ready)) == len(ready)
        assert not {tenure.token for tenure in self.held.values()} & set(ready)

    def teardown(self) -> None:
        """At the end nothing is leased any more, whatever has happened, once everything was given back."""
        if not hasattr(self, "supply"):
            return
        for name in self.containers:
            self.servers[name].broken = ""
        self.supply.close()
        self._work_all()
        for name, container in self.containers.items():
            known = {*container.tenures, *container.outbox}
            self.supply.give_all_back(container)
            assert not known & {*self.servers[name].leased.values()}


SupplyModel.TestCase.settings = settings(max_examples=300, stateful_step_count=50)
TestSupplyModel = SupplyModel.TestCase
