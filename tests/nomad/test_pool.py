"""Pools on a Nomad job: the main job, sharing, scaling, and containers that are lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from typing import Any

import pytest
from conftest import PACKAGE, wait_until
from nomads import Nomad, acquire_at_once

from slotpool import AcquireTimeout, SlotPool, SlotPoolError
from slotpool.errors import JobDiffers, SlotError


def test_the_main_job(nomad: Nomad) -> None:
    with nomad.pool() as pool:
        with pool.slot() as s:
            s.write_file("a.py", "print(6*7)")
            r = s.bash("python3 a.py; ls")
            assert (r.stdout, r.exit_code) == ("42\na.py\n", 0)
            assert s.alloc_id == nomad.running(pool.config.job_id)[0]["ID"]
        with pool.slot() as s:
            assert s.bash("ls -A").stdout == ""
        pool.stop(purge_job=True)
    assert wait_until(lambda: not nomad.running_anything(pool.config.job_id))


def test_a_job_outlives_its_pool_and_is_found_by_the_next(nomad: Nomad) -> None:
    settings = nomad.settings()
    with SlotPool(**settings):
        (first,) = nomad.running(settings["job_id"])
    with SlotPool(**settings) as pool, pool.slot() as s:
        assert s.alloc_id == first["ID"]
        assert s.bash("echo well").stdout == "well\n"


def test_a_purged_job_is_made_anew(nomad: Nomad) -> None:
    settings = nomad.settings()
    with SlotPool(**settings):
        (first,) = nomad.running(settings["job_id"])
    with SlotPool(**settings, purge_job_on_start=True) as pool, pool.slot() as s:
        assert s.alloc_id != first["ID"]


def test_the_token_is_in_no_job(nomad: Nomad) -> None:
    with nomad.pool(token="SLOTPOOL_TEST_nomad_token") as pool:
        job = pool.config.job_id
        told = repr([nomad.api("GET", f"/v1/job/{job}"), nomad.api("GET", f"/v1/job/{job}/allocations")])
        assert "SLOTPOOL_TEST_nomad_token" not in told
        assert nomad.api("GET", f"/v1/var/nomad/jobs/{job}")["Items"] == {"token": "SLOTPOOL_TEST_nomad_token"}


def test_demand_scales_up_and_lack_of_it_down(nomad: Nomad) -> None:
    with nomad.pool(max_containers=4, scale_down_after=0.5) as pool:
        job = pool.config.job_id
        held = [pool.acquire(timeout=30), *acquire_at_once(pool, 6)]
        assert nomad.count(job) == 4
        assert [s.bash("echo well").stdout for s in held] == ["well\n"] * 7
        lowest = nomad.running(job)[0]["ID"]
        for s in held:
            if s.alloc_id != lowest:
                s.release()
        kept = [s for s in held if s.alloc_id == lowest]
        assert wait_until(lambda: nomad.count(job) == 1, 30)
        assert [s.bash("echo well").stdout for s in kept] == ["well\n"] * len(kept)
        assert wait_until(lambda: pool.total_slots == 2, 30)


def test_no_container_is_ended_under_anothers_lease(nomad: Nomad) -> None:
    settings = nomad.settings(max_containers=2, scale_down_after=1.5)
    with SlotPool(**settings) as one, SlotPool(**settings) as two:
        first = [one.acquire(timeout=30), one.acquire(timeout=30)]
        theirs = two.acquire(timeout=60)
        assert {s.alloc_id for s in first} != {theirs.alloc_id}
        for s in first:
            s.release()
        # Both pools look often enough to end the container with the higher number.
        looked = threading.Barrier(3)
        for pool in (one, two):
            looks = _count_looks(pool, 8, looked)
            looks.start()
        looked.wait(60)
        assert theirs.bash("echo well").stdout == "well\n"
        theirs.release()
        assert wait_until(lambda: nomad.count(settings["job_id"]) == 1, 30)


def _count_looks(pool: SlotPool, count: int, reached: threading.Barrier) -> threading.Thread:
    """A thread that passes the barrier when the pool's health thread has looked that often."""
    looks = threading.Semaphore(0)
    tend = pool._upkeep.tend

    def counted() -> None:
        tend()
        looks.release()

    pool._upkeep.tend = counted  # type: ignore[method-assign]

    def wait() -> None:
        for _ in range(count):
            looks.acquire()
        reached.wait(60)

    return threading.Thread(target=wait, daemon=True)  # a test that fails leaves it waiting


def test_a_waiter_is_told_why(nomad: Nomad) -> None:
    with nomad.pool(max_containers=1) as pool:
        held = [pool.acquire(timeout=30) for _ in range(2)]

        def refusal() -> str:
            with pytest.raises(AcquireTimeout) as refused:
                pool.acquire(timeout=0.5)
            return str(refused.value)

        # Nomad may call a container pending for a moment longer, whose slots are leased.
        assert wait_until(lambda: f"job {pool.config.job_id} with a count of 1: 1 running" in refusal())
        del held


def test_a_server_that_is_killed_comes_back_and_its_leases_are_lost(nomad: Nomad) -> None:
    with nomad.pool() as pool:
        s = pool.acquire(timeout=30)
        os.kill(nomad.pid_of(s.alloc_id), signal.SIGKILL)
        with pytest.raises(SlotError):
            s.bash("sleep 1000", timeout=100)
        s.release()
        with pool.slot(timeout=60) as s:
            assert s.bash("ls -A; echo well").stdout == "well\n"


def test_an_allocation_that_is_stopped_is_replaced(nomad: Nomad) -> None:
    with nomad.pool() as pool:
        s = pool.acquire(timeout=30)
        first = s.alloc_id
        nomad.api("POST", f"/v1/allocation/{first}/stop")
        with pytest.raises(SlotError):
            s.bash("sleep 1000", timeout=100)
        s.release()
        with pool.slot(timeout=60) as s:
            assert s.alloc_id != first
            assert s.bash("echo well").stdout == "well\n"


def test_a_server_that_hangs_is_replaced_and_its_return_disturbs_nobody(nomad: Nomad) -> None:
    with nomad.pool(lease_ttl=2.0, max_containers=1) as pool:
        s, last = pool.acquire(timeout=30), pool.acquire(timeout=30)  # all, so that none is granted just before it hangs
        first, pid = s.alloc_id, nomad.pid_of(s.alloc_id)
        os.kill(pid, signal.SIGSTOP)
        try:
            with pool.slot(timeout=90) as other:
                assert other.alloc_id != first
                assert other.bash("echo well").stdout == "well\n"
        finally:
            with_pid(pid, signal.SIGCONT)
        with pytest.raises(SlotPoolError):
            s.bash("echo mine")
        s.release()
        last.release()
        assert wait_until(lambda: pool.total_slots == 2, 30)


def with_pid(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:  # Nomad has killed it meanwhile
        pass


def test_a_job_of_another_shape_is_refused_field_by_field(nomad: Nomad) -> None:
    settings = nomad.settings()
    with SlotPool(**settings):
        pass
    different = {**settings, "slots_per_container": 3, "memory": 96, "env": {**settings["env"], "A": "b"}}
    with pytest.raises(JobDiffers) as refused, SlotPool(**different):
        pass
    assert "Resources.MemoryMB: 64 -> 96" in str(refused.value)
    assert "Env[A]: (nothing) -> b" in str(refused.value)
    with SlotPool(**different, update_job=False) as pool, pool.slot(timeout=30):
        assert pool.total_slots == 2
    with SlotPool(**different, update_job=True) as pool, pool.slot(timeout=30):
        assert wait_until(lambda: pool.total_slots == 3, 30)


def test_three_processes_share_a_job_and_a_killed_ones_slots_come_back(nomad: Nomad) -> None:
    settings = nomad.settings(max_containers=3, lease_ttl=2.0)
    processes = [_worker(settings, leases=3, threads=10) for _ in range(2)]
    killed = _worker(settings, leases=10**6, threads=10)
    assert killed.stdout is not None
    assert killed.stdout.readline() == b"working\n"
    killed.kill()
    killed.wait()
    killed.stdout.close()
    for process in processes:
        out, _ = process.communicate(timeout=100)
        assert out.splitlines()[-1] == b"done 30", out
    with SlotPool(**{**settings, "slots_per_container": 2}) as pool:
        slots = [pool.acquire(timeout=60) for _ in range(6)]
        assert [s.bash("ls -A").stdout for s in slots] == [""] * 6


_WORKER = """
import sys, threading, json
from slotpool import SlotPool
settings, leases, threads = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
done, failures = [], []
with SlotPool(**settings) as pool:
    print("working", flush=True)
    def work(name):
        try:
            for _ in range(leases):
                with pool.slot(timeout=60) as s:
                    r = s.bash(f"ls -A; echo {name} > mine; sleep 0.02; cat mine")
                    assert r.stdout == f"{name}\\n", r
                    done.append(1)
        except BaseException as e:
            failures.append(repr(e))
    workers = [threading.Thread(target=work, args=(f"{id(pool)}-{i}",)) for i in range(threads)]
    [w.start() for w in workers]
    [w.join() for w in workers]
print(failures or "done", len(done), flush=True)
"""


def _worker(settings: dict[str, Any], leases: int, threads: int) -> subprocess.Popen[bytes]:
    import json

    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, json.dumps(settings), str(leases), str(threads)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": PACKAGE},
    )
