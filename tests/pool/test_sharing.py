"""Slots shared by many threads: exclusive, clean, and fairly."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import wait_until

from slotpool import AcquireTimeout, LeaseLost, SlotPool

THREADS, LEASES, SLOTS = 64, 2000, 10
# What files and what processes there are, told by bash alone: so many programs would take longer than all else.
LEFT = "shopt -s nullglob dotglob; echo *; for p in /proc/[0-9]*/comm; do read -r c <$p && [ $c = sleep ] && echo $p; done"


def test_64_threads_share_10_slots_2000_times() -> None:
    share: Counter[int] = Counter()
    holders: dict[str, int] = {}
    broken: list[str] = []
    tickets = iter(range(LEASES))
    lock = threading.Lock()
    start = threading.Barrier(THREADS)

    def work(me: int) -> None:
        start.wait()
        while True:
            with lock:
                if next(tickets, None) is None:
                    return
            with pool.slot() as s:
                with lock:
                    share[me] += 1
                    if s.slot_id in holders:
                        broken.append(f"{s.slot_id} is held by {holders[s.slot_id]} and {me}")
                    holders[s.slot_id] = me
                found = s.bash(f"{LEFT}; echo {me} > mine; setsid sleep 1000 & sleep 1000 &").stdout
                if found != "\n":
                    broken.append(f"{s.slot_id} was not clean: {found!r}")
                if s.read_file("mine") != f"{me}\n":
                    broken.append(f"{s.slot_id} was written by another")
                with lock:
                    del holders[s.slot_id]

    with SlotPool(slots_per_container=SLOTS, max_containers=1, acquire_timeout=100) as pool:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        stats = pool.get_stats()
    assert broken == []
    assert sum(share.values()) == LEASES
    fair = LEASES / THREADS
    assert min(share.values()) >= fair / 2
    assert max(share.values()) <= fair * 2
    assert stats["requests_num"] == LEASES
    assert stats["acquired_slots"] == 0
    assert stats["requests_waiting"] == 0


def test_waiters_are_served_in_the_order_they_came(pool: SlotPool) -> None:
    slots = [pool.acquire() for _ in range(4)]
    order: list[int] = []
    threads = []

    def wait(i: int) -> None:
        with pool.slot():
            order.append(i)

    for i in range(8):
        thread = threading.Thread(target=wait, args=(i,))
        before = pool.get_stats()["requests_waiting"]
        thread.start()
        threads.append(thread)
        while pool.get_stats()["requests_waiting"] == before:
            pass
    for slot in slots[:1]:
        slot.release()
    for thread in threads:
        thread.join()
    assert order == list(range(8))


def test_an_untouched_slot_is_handed_on_and_its_old_handle_is_void(pool: SlotPool) -> None:
    first = pool.acquire()
    first.release()
    seen = set()
    slots = [pool.acquire() for _ in range(4)]
    for slot in slots:
        seen.add((slot.alloc_id, slot.slot_id))
        assert slot.bash("ls -A").stdout == ""
    assert len(seen) == 4
    with pytest.raises(LeaseLost, match="released"):
        first.bash("echo mine")
    for slot in slots:
        slot.release()


def test_a_wait_that_runs_out_says_what_for() -> None:
    with SlotPool(slots_per_container=1, max_containers=1) as pool:
        held = pool.acquire()
        with pytest.raises(AcquireTimeout, match=r"1 of 1 slots are held by this pool.*at most 1 containers of 1"):
            pool.acquire(timeout=0.2)
        with pytest.raises(TimeoutError):
            pool.acquire(timeout=0)
        assert pool.get_stats()["requests_errors"] == 2
        assert pool.get_stats()["requests_waiting"] == 0
        held.release()
        pool.acquire().release()


def test_slots_come_back_without_being_released_when_they_are_dropped() -> None:
    with SlotPool(slots_per_container=1, max_containers=1, health_check_interval=0.1) as pool:
        slot = pool.acquire()
        slot.bash("echo > file")
        del slot
        with pool.slot(timeout=20) as s:
            assert s.bash("ls -A").stdout == ""
        assert pool.get_stats()["slots_abandoned"] == 1


def test_a_slot_released_as_it_is_keeps_its_files_and_processes() -> None:
    with SlotPool(slots_per_container=1, max_containers=1) as pool:
        slot = pool.acquire("first")
        slot.bash("echo kept > file; sleep 1006 & echo")
        pool.release(slot, reset_workspace=False)
        with pool.slot("second") as s:
            assert s.trajectory_id == "second"
            assert s.bash("cat file; pgrep -c sleep").stdout == "kept\n1\n"
            s.reset()
            assert s.bash("ls -A; pgrep -c sleep").stdout == "0\n"
        with pool.slot() as s:
            assert s.bash("ls -A").stdout == ""


def test_a_lost_lease_is_not_handed_on_as_it_is() -> None:
    with SlotPool(slots_per_container=1, max_containers=1) as pool:
        slot = pool.acquire()
        slot._tenure.container.client.lease("somebody else", 30, 0, [slot._tenure.token])
        with pytest.raises(LeaseLost):
            slot.bash("true")
        pool.release(slot, reset_workspace=False)
        with pool.slot() as s:
            assert s.bash("echo well").stdout == "well\n"
        stats = pool.get_stats()
        assert (stats["leases_lost"], stats["returns_bad"]) == (1, 1)


def test_who_waits_has_the_slot_of_a_lost_lease_that_is_given_back() -> None:
    with SlotPool(slots_per_container=1, max_containers=1) as pool, ThreadPoolExecutor(1) as threads:
        slot = pool.acquire()
        slot._tenure.container.client.lease("somebody else", 30, 0, [slot._tenure.token])
        with pytest.raises(LeaseLost):
            slot.bash("true")
        waiting = threads.submit(pool.acquire, timeout=8)  # less than until leases are renewed
        assert wait_until(lambda: pool.get_stats()["requests_waiting"] == 1)
        slot.release()
        waiting.result().release()
