"""What a real agent can't be made to do on demand, by the fake: no leader, nonsense, silence; and a thousand allocations."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import PACKAGE, wait_until
from fake_nomad import FakeNomad

from slotpool import SlotPool, SlotPoolError
from slotpool.errors import NomadError
from slotpool.sandbox.transport import _connector


@pytest.fixture
def fake() -> Iterator[FakeNomad]:
    with FakeNomad(nodes=1) as fake:
        yield fake


def settings(fake: FakeNomad, **more: Any) -> dict[str, Any]:
    return {
        "nomad_address": fake.address,
        "job_id": "job",
        "driver": "raw_exec",
        "slots_per_container": 1,
        "health_check_interval": 0.2,
        "env": {"PYTHONPATH": PACKAGE},
        **more,
    }


def works(pool: SlotPool) -> bool:
    with pool.slot(timeout=60) as s:
        return s.bash("echo well").stdout == "well\n"


def test_without_a_leader_leases_go_on_and_scaling_waits(fake: FakeNomad) -> None:
    with SlotPool(**settings(fake, max_containers=2, scale_cooldown=0)) as pool:
        held = pool.acquire()
        fake.no_leader()
        assert held.bash("echo well").stdout == "well\n"
        with pytest.raises(SlotPoolError):
            pool.acquire(timeout=1)
        fake.heal()
        assert works(pool)


def test_an_agent_that_is_gone_for_a_while_loses_nobody_a_lease(fake: FakeNomad) -> None:
    with SlotPool(**settings(fake, max_containers=2, scale_cooldown=0)) as pool:
        held = pool.acquire()
        fake.down()
        assert held.bash("echo well").stdout == "well\n"
        with pytest.raises(SlotPoolError, match="can't be reached"):
            pool.acquire(timeout=6)
        fake.up()
        assert works(pool)
        assert held.bash("echo well").stdout == "well\n"


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, b"<html>a proxy's page</html>", "text/html"),
        (200, b"{", "application/json"),
        (500, b"out of luck", "text/plain"),
        (502, b"bad gateway", "text/plain"),
    ],
)
def test_nonsense_is_told_as_what_it_is(fake: FakeNomad, status: int, body: bytes, kind: str) -> None:
    fake.answer_once("/v1/job/", status, body, kind)
    with pytest.raises(NomadError), SlotPool(**settings(fake)):
        pass
    with SlotPool(**settings(fake)) as pool:
        for path in ("/v1/job/", "/v1/allocation/"):
            fake.answer_once(path, status, body, kind)
        assert works(pool)


@pytest.mark.parametrize("body", [b"{}", b"17", b"[{}]"])
def test_json_of_another_shape_loses_nobody_a_lease(fake: FakeNomad, body: bytes, caplog: pytest.LogCaptureFixture) -> None:
    with SlotPool(**settings(fake, max_containers=2, scale_cooldown=0)) as pool:
        held = pool.acquire()
        for path in ("/v1/job/job/allocations", "/v1/allocation/", "/v1/job/job/scale", "/v1/job/job", "/v1/"):
            fake.answer_once(path, 200, body, "application/json")
        assert works(pool)  # in a second container, which Nomad must be asked for
        assert held.bash("echo well").stdout == "well\n"
    assert "defect of slotpool" not in caplog.text


def test_nothing_but_errors_for_a_while_loses_nobody_a_lease(fake: FakeNomad, caplog: pytest.LogCaptureFixture) -> None:
    with SlotPool(**settings(fake, max_containers=2, scale_cooldown=0, lease_ttl=1.0)) as pool:
        held = pool.acquire()
        for _ in range(1000):
            fake.answer_once("/v1/", 500, b"out of luck")
        with pytest.raises(SlotPoolError, match="out of luck"):
            pool.acquire(timeout=2)
        assert held.bash("echo well").stdout == "well\n"
        fake.heal()
        assert works(pool)
        assert held.bash("echo well").stdout == "well\n"
    assert "defect of slotpool" not in caplog.text


def test_stale_answers_do_no_harm(fake: FakeNomad) -> None:
    with SlotPool(**settings(fake, max_containers=3, scale_down_after=0.2)) as pool:
        fake.stale(0.5)
        held = [pool.acquire(timeout=60) for _ in range(3)]
        assert [s.bash("echo well").stdout for s in held] == ["well\n"] * 3
        fake.heal()
        for s in held[1:]:
            s.release()
        assert wait_until(lambda: [one["DesiredStatus"] for one in fake.allocations("job")].count("run") == 1, 30)
        assert held[0].bash("echo well").stdout == "well\n"


def test_an_answer_lost_on_the_way_submits_no_second_job(fake: FakeNomad) -> None:
    fake.answer_once("/v1/jobs", 0, b"", done=True)
    with pytest.raises(NomadError), SlotPool(**settings(fake)):
        pass
    with SlotPool(**settings(fake)) as pool:
        assert works(pool)
        assert pool.total_slots == 1


def test_a_container_that_may_not_be_replaced_is_used_again_when_it_answers(fake: FakeNomad) -> None:
    fake.deny("alloc-lifecycle")
    with SlotPool(**settings(fake, lease_ttl=1.0)) as pool:
        s = pool.acquire()
        pid = fake.pid_of(s.alloc_id)
        os.kill(pid, signal.SIGSTOP)
        try:
            assert wait_until(lambda: pool.total_slots == 0, 30)
        finally:
            os.kill(pid, signal.SIGCONT)
        assert works(pool)
        assert fake.pid_of(s.alloc_id) == pid


def test_a_container_with_anothers_lease_is_not_replaced_by_who_can_not_reach_it(fake: FakeNomad) -> None:
    """As when this pool's own network is what has failed."""
    shared = settings(fake, slots_per_container=2, lease_ttl=1.0)
    with SlotPool(**shared) as one, SlotPool(**shared) as two:
        theirs = two.acquire()
        mine = one.acquire()
        container = mine._tenure.container
        assert wait_until(lambda: container.leased_by_others == 1)
        container.client._http._connect = _connector("http://127.0.0.1:9")  # where nobody listens
        while container.client._http._idle:
            container.client._http._idle.pop().close()
        assert wait_until(lambda: one.get_stats()["containers_lost"] == 1, 30)
        assert theirs.bash("echo well").stdout == "well\n"
        assert works(one)  # it was found again
        assert theirs.bash("echo well").stdout == "well\n"


def test_pools_with_different_bounds_do_not_undo_each_others_scaling(fake: FakeNomad) -> None:
    more = {"max_containers": 3, "scale_down_after": 60.0}
    with SlotPool(**settings(fake, **more)), SlotPool(**settings(fake, **more, min_containers=3)) as large:
        assert large.total_slots == 3
        del fake.requests[:]
        looks = threading.Event()
        large._health.call(2.0, looks.set)
        assert looks.wait(60)
        assert [one for one in fake.requests if one.path.endswith("/scale")] == []
        assert large.get_stats()["containers_lost"] == 0


def test_a_thousand_allocations(fake: FakeNomad) -> None:
    more = {"slots_per_container": 10, "max_containers": 1000, "update_job": False}
    fake.populate(
        "job",
        1000,
        **{name: value for name, value in settings(fake, **more).items() if name not in ("job_id", "nomad_address")},
    )
    before = threading.active_count()
    with SlotPool(**settings(fake, **more, min_containers=1000, health_check_interval=30.0, lease_ttl=3600.0)) as pool:
        assert pool.total_slots == 10_000
        assert threading.active_count() - before <= 40
        del fake.requests[:]
        first, last = fake.allocations("job")[0], fake.allocations("job")[-1]
        assert first["ID"] != last["ID"]
        fake.lose(last["ID"])
        assert wait_until(lambda: pool.get_stats()["containers_lost"] == 1)
        asked = [(one.method, one.path.partition("?")[0]) for one in list(fake.requests)]
        # A refresh is one request, and one more for each allocation that is new.
        assert len([one for one in asked if one[1].endswith("/allocations")]) <= 4
        assert len([one for one in asked if one[1].startswith("/v1/allocation/")]) <= 2
