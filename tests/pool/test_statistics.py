"""What a pool's statistics tell of what its user did, see the README's table."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import servers, wait_until

from slotpool import InvalidRequest, LeaseLost, SlotPool, SlotState

ONE: dict[str, Any] = {"slots_per_container": 1, "max_containers": 1}


def test_time_that_slots_were_held_counts_when_they_are_given_back() -> None:
    with SlotPool(**ONE) as pool:
        asked = time.monotonic()
        slot = pool.acquire()
        got = time.monotonic()
        slot.bash("sleep 0.2")
        assert pool.get_stats()["usage_ms"] == 0
        returning = time.monotonic()
        slot.release()
        slot.release()
        least, most = (returning - got) * 1000, (time.monotonic() - asked) * 1000
        assert least - 1 <= pool.get_stats()["usage_ms"] <= most + 1


def test_a_lease_is_counted_once_though_several_callers_have_it() -> None:
    with SlotPool(**ONE) as pool:
        pool.acquire().release()
        slot = pool.acquire()
        assert pool.get_stats()["leases_num"] == 1, "it was not used, and so it was not given back"
        slot.bash("true")
        slot.release()
        pool.acquire().release()
        assert pool.get_stats()["leases_num"] == 2


def test_executions_that_gave_no_result_are_errors(pool: SlotPool) -> None:
    slot, other = pool.acquire(), pool.acquire()
    other.release()
    slot.bash("exit 3")
    with pytest.raises(InvalidRequest):
        pool.execute(slot, "nonsense", {})
    with pytest.raises(LeaseLost):
        other.bash("true")
    assert not pool.execute(slot, "read_file", {"path": "missing"}).success
    pool.execute_batch([(slot, "bash", {"command": "exit 3"}), (slot, "nonsense", {}), (other, "bash", {"command": "true"})])
    told = pool.get_stats()
    assert (told["executions_num"], told["executions_errors"]) == (7, 4)


def test_slots_by_state_and_those_given_back_when_they_were_lost() -> None:
    with ThreadPoolExecutor(1) as thread, SlotPool(slots_per_container=4, max_containers=1) as pool:
        idle, busy = pool.acquire(), pool.acquire()
        pool.acquire().release()
        running = thread.submit(busy.bash, "mkfifo gate; cat gate")
        assert wait_until(lambda: busy.bash("ls").stdout == "gate\n")
        states = {"available": 2, "acquired": 1, "executing": 1, "releasing": 0, "error": 0}
        assert pool.get_stats()["slots_by_state"] == states
        busy.bash("echo >gate")
        assert running.result().success
        assert pool.get_stats()["slots_by_state"] == {**states, "acquired": 2, "executing": 0}
        (server,) = servers()
        os.kill(server, signal.SIGKILL)
        assert wait_until(lambda: idle.state is busy.state is SlotState.ERROR)
        told = pool.get_stats()
        assert (told["slots_by_state"]["acquired"], told["slots_by_state"]["error"], told["returns_bad"]) == (0, 2, 0)
        idle.release()
        busy.release()
        told = pool.get_stats()
        assert (told["slots_by_state"]["error"], told["returns_bad"]) == (0, 2)


def test_scalings_for_demand_and_for_lack_of_it() -> None:
    def scaled() -> tuple[int, int, int]:
        told = pool.get_stats()
        return told["containers"], told["scale_ups"], told["scale_downs"]

    with SlotPool(slots_per_container=1, max_containers=2, scale_down_after=0.1, health_check_interval=0.05) as pool:
        first = pool.acquire()
        assert scaled() == (1, 0, 0)
        second = pool.acquire(timeout=60)
        assert scaled() == (2, 1, 0)
        second.release()
        assert wait_until(lambda: scaled() == (1, 1, 1))
        second = pool.acquire(timeout=60)
        assert scaled() == (2, 2, 1)
        first.release()
        second.release()
