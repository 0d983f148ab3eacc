"""What is logged of leases and executions: the same ids on both sides, and no token."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from typing import Any

import pytest
from conftest import DEFECT, PACKAGE, StartServer, wait_until

from slotpool import SlotPool
from slotpool.errors import LeaseLost, SlotBroken


def lines(caplog: pytest.LogCaptureFixture, logger: str, **ids: str) -> list[str]:
    """The messages of that logger whose records have these ids."""
    found = [record for record in caplog.records if record.name == logger]
    return [record.getMessage() for record in found if all(getattr(record, key, None) == ids[key] for key in ids)]


def test_both_sides_log_a_lease_and_its_executions_by_the_same_ids(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "slotpool")
    with SlotPool(slots_per_container=2, max_containers=1) as pool, pool.slot("task-17") as s:
        ids = {"slot": s.slot_id, "lease": s.lease_id}
        first = s.bash("exit 3")
        (second,) = pool.execute_batch([(s, "bash", {"command": "sleep 100"})], timeout=0.1)
        third = s.bash("echo SECRET", env={"KEY": "SECRET"})
        with pytest.raises(SlotBroken):
            s.bash("kill -9 -1; sleep 60", timeout=10)  # kill(2) spares the shell that calls it
        tokens = [s._tenure.token, *(str(c.member.token) for c in pool._supply.containers.values())]
    acquired, released = lines(caplog, "slotpool.pool", **ids)
    assert "acquired" in acquired
    assert s.alloc_id in acquired
    assert "task-17" in acquired
    assert "released" in released
    for result, end in (
        (first, "ended with exit code 3 after"),
        (second, "timed out after"),
        (third, "ended with exit code 0"),
    ):
        ours = lines(caplog, "slotpool.sandbox.client", **ids, execution_id=result.execution_id)
        theirs = [line for line in lines(caplog, "slotpool.sandbox.run") if result.execution_id in line]
        for begun, ended in (ours, theirs):
            assert "begins" in begun
            assert end in ended
            assert f"{s.slot_id}, lease {s.lease_id}: " in begun
    assert lines(caplog, "slotpool.sandbox.client", **ids)[-1].endswith(f"failed: SlotBroken at {s.container_addr}")
    granted = [line for line in lines(caplog, "slotpool.sandbox.host") if f"{s.slot_id}, lease {s.lease_id}: granted" in line]
    assert len(granted) == 1
    assert all(token not in caplog.text for token in tokens)
    assert "SECRET" not in caplog.text


def test_an_embedded_servers_lines_keep_their_level(caplog: pytest.LogCaptureFixture) -> None:
    with SlotPool(slots_per_container=1, max_containers=1, lease_ttl=0.5) as pool, pool.slot() as s:
        pool._health.stop()  # nothing renews any more
        lease = s.lease_id
        assert wait_until(lambda: f"lease {lease}: expired" in caplog.text)
    (record,) = [record for record in caplog.records if "expired" in record.getMessage()]
    assert (record.name, record.levelname) == ("slotpool.sandbox.host", "WARNING")


def test_a_lost_lease_is_told_by_its_id(start_server: StartServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "slotpool")
    server = start_server("none", slots=1)
    with SlotPool(servers=server.address, token=server.token, health_check_interval=0.1) as pool, pool.slot() as s:
        server.client.lease("somebody", 30, 0, release=[s._tenure.token])
        assert wait_until(lambda: lines(caplog, "slotpool.upkeep", slot=s.slot_id, lease=s.lease_id))
        with pytest.raises(LeaseLost):
            s.bash("true")
    assert s._tenure.token not in caplog.text


@pytest.mark.parametrize(("options", "is_told"), [([], False), (["-vv"], True)])
def test_a_standing_server_tells_as_much_as_it_is_asked_to(options: list[str], is_told: bool) -> None:
    command = [sys.executable, "-m", "slotpool", *options, "serve", "--port", "0", "--slots", "1", "--isolation", "none"]
    environment: dict[str, Any] = {**os.environ, "PYTHONPATH": PACKAGE, "SLOTPOOL_TOKEN": "SLOTPOOL_TEST_logs_token"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd="/"
    ) as server:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        with SlotPool(servers=address, token="SLOTPOOL_TEST_logs_token") as pool, pool.slot() as s:
            result = s.bash("true")
            token = s._tenure.token
        server.terminate()
        _, said = server.communicate(timeout=60)
    assert "serving 1 slots" in said
    assert (f"lease {s.lease_id}: execution {result.execution_id} (bash) ended" in said) == is_told
    assert token not in said
    assert "SLOTPOOL_TEST_logs_token" not in said
    assert DEFECT not in said
