"""What a real agent can't be made to do on demand, by the fake: no leader, nonsense, silence; and a thousand allocations."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import PACKAGE, wait_until
from fake_nomad import FakeNomad

from slotpool import SlotPool, SlotPoolError
from slotpool.errors import NomadDenied, NomadError


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


def test_stale_answers_do_no_harm(fake: FakeNomad) -> None:
    with SlotPool(**settings(fake, max_containers=3, scale_down_after=0.2)) as pool:
        fake.stale(0.5)
        held = [pool.acquire(timeout=60) for _ in range(3)]
        assert [s.bash("echo well").stdout for s in held] == ["well\n"] * 3
        fake.heal()
        for s in held[1:]:
            s.release()
        assert wait_until(lambda: len(fake.allocations("job")) >= 1)
        assert held[0].bash("echo well").stdout == "well\n"


def test_an_answer_lost_on_the_way_submits_no_second_job(fake: FakeNomad) -> None:
    fake.answer_once("/v1/jobs", 0, b"", done=True)
    with pytest.raises(NomadError), SlotPool(**settings(fake)):
        pass
    with SlotPool(**settings(fake)) as pool:
        assert works(pool)
        assert pool.total_slots == 1


def test_a_refused_replacement_is_told_and_the_container_used_again(fake: FakeNomad) -> None:
    fake.deny("alloc-lifecycle")
    with SlotPool(**settings(fake)) as pool:
        assert works(pool)
    fake.heal()
    fake.deny("submit-job")
    with pytest.raises(NomadDenied, match="submit-job"), SlotPool(**settings(fake, job_id="another")):
        pass


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
