"""Start and stop, scaling, and every way in which a pool or its servers may end."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import OURS, PACKAGE, StartServer, servers, sleepers, slotpool_processes, state_directories, wait_until
from proxy import Proxy

from slotpool import AcquireTimeout, ContainerLost, LeaseLost, SlotPool, SlotPoolConfig, SlotPoolError, SlotState, upkeep
from slotpool.errors import IsolationUnavailable, PoolClosed, StartFailed
from slotpool.fleet.local import LocalFleet


def python(script: str, *args: str, **more: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": PACKAGE}
    command = [sys.executable, "-c", script, *args]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd="/", **more)


def test_a_pool_starts_once_and_stops_for_good() -> None:
    pool = SlotPool(SlotPoolConfig(slots_per_container=2, max_containers=1))
    with pytest.raises(PoolClosed, match="started"):
        pool.acquire()
    assert pool.start() is pool
    assert pool.start() is pool
    assert pool.total_slots == 2
    slot = pool.acquire()
    assert (pool.acquired_slots, pool.available_slots) == (1, 1)
    pool.stop()
    pool.stop()
    with pytest.raises(LeaseLost, match="stopped"):
        slot.bash("true")
    slot.release()
    with pytest.raises(PoolClosed):
        pool.acquire()
    with pytest.raises(PoolClosed, match="another"):
        pool.start()
    assert pool.get_stats()["started"] is False


def test_stopping_wakes_who_waits_and_who_runs() -> None:
    pool = SlotPool(slots_per_container=1, max_containers=1).start()
    slot = pool.acquire()
    ends: list[BaseException] = []

    def wait() -> None:
        try:
            pool.acquire(timeout=100)
        except PoolClosed as e:
            ends.append(e)

    def run() -> None:
        try:
            slot.bash("touch begun; sleep 100", timeout=200)
        except SlotPoolError as e:
            ends.append(e)

    threads = [threading.Thread(target=wait), threading.Thread(target=run)]
    for thread in threads:
        thread.start()
    assert wait_until(lambda: pool.get_stats()["requests_waiting"] == 1 and slot.bash("ls").stdout)
    pool.stop()
    for thread in threads:
        thread.join()
    assert len(ends) == 2


def test_an_isolation_that_does_not_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    before = set(slotpool_processes())
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(IsolationUnavailable, match="apt-get install bubblewrap"):
        SlotPool(isolation="bwrap").start()
    assert set(slotpool_processes()) == before


def test_auto_is_never_silently_weaker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")  # no bubblewrap
    if os.geteuid() == 0:
        with SlotPool(slots_per_container=1) as pool, pool.slot() as s:
            assert s.bash("true").metadata["isolation"] == "user"
            assert pool.get_stats()["isolation"] == ["user"]
    else:
        with pytest.raises(IsolationUnavailable):
            SlotPool(slots_per_container=1).start()


def test_a_server_that_cannot_start_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartFailed, match="file"):
        SlotPool(state_dir=str(tmp_path / "file")).start()


def test_demand_brings_containers_about_in_one_step_and_lack_of_it_ends_them() -> None:
    with SlotPool(slots_per_container=2, max_containers=4, scale_down_after=0.5, health_check_interval=0.1) as pool:
        assert pool.get_stats()["containers"] == 1
        slots: list[Any] = []
        threads = [threading.Thread(target=lambda: slots.append(pool.acquire())) for _ in range(7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert pool.get_stats()["containers"] == 4
        last = max(slots, key=lambda s: s._tenure.container.member.index)
        assert last.bash("echo held > f; cat f").stdout == "held\n"
        for slot in slots:
            if slot is not last:
                slot.release()
        time.sleep(1.0)
        assert last.bash("cat f").stdout == "held\n", "never under a lease"
        last.release()
        assert wait_until(lambda: pool.get_stats()["containers"] == 1 and len(servers()) == 1)
        assert pool.get_stats()["leases_lost"] == 0
        with pool.slot() as s:
            assert s.bash("echo well").stdout == "well\n"


def test_an_empty_pool_starts_with_the_first_caller() -> None:
    with SlotPool(slots_per_container=1, min_containers=0) as pool:
        assert pool.total_slots == 0
        with pool.slot() as s:
            assert s.bash("echo well").stdout == "well\n"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_that_dies_is_told_and_replaced(how: signal.Signals) -> None:
    with SlotPool(slots_per_container=2, max_containers=1, health_check_interval=0.2) as pool:
        slot = pool.acquire()
        slot.bash("setsid sleep 1007 & disown")
        failures: list[SlotPoolError] = []

        def run() -> None:
            try:
                slot.bash("touch begun; sleep 100", timeout=200)
            except SlotPoolError as e:
                failures.append(e)

        thread = threading.Thread(target=run)
        thread.start()
        assert wait_until(lambda: slot.bash("ls").stdout == "begun\n")
        (server,) = servers()
        os.kill(server, how)
        thread.join()
        assert isinstance(failures[0], (ContainerLost, LeaseLost))
        assert failures[0].may_have_run
        assert wait_until(lambda: slot.state is SlotState.ERROR)
        with pytest.raises(LeaseLost):
            slot.bash("true")
        slot.release()
        with pool.slot() as s:
            assert s.bash("ls -A; echo well").stdout == "well\n"
        assert pool.get_stats()["containers_lost"] == 1


def test_a_server_that_hangs_is_replaced_after_a_time_to_live() -> None:
    with SlotPool(slots_per_container=1, max_containers=1, lease_ttl=1.0, health_check_interval=0.2) as pool:
        with pool.slot() as s:
            s.bash("true")
        (server,) = servers()
        os.kill(server, signal.SIGSTOP)
        assert wait_until(lambda: servers() not in ([server], []), 30)
        with pool.slot(timeout=30) as s:
            assert s.bash("echo well").stdout == "well\n"


@pytest.mark.parametrize("isolation", ["bwrap", "user", "none"])
def test_nothing_outlives_a_killed_parent(isolation: str) -> None:
    if isolation == "user" and os.geteuid() != 0:
        pytest.skip("user mode needs root")
    before = set(slotpool_processes()), state_directories()
    parent = python(
        "from slotpool import SlotPool\n"
        f"pool = SlotPool(slots_per_container=2, isolation={isolation!r}).start()\n"
        "s = pool.acquire()\n"
        f"s.bash('setsid sleep 1008{OURS} & disown')\n"
        "print('ready', flush=True)\n"
        f"s.bash('sleep 1009{OURS}', timeout=2000)\n"
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    assert wait_until(lambda: sleepers("100[89]") == 2)
    parent.kill()
    parent.communicate()
    assert wait_until(lambda: set(slotpool_processes()) <= before[0] and state_directories() == before[1])
    assert wait_until(lambda: sleepers("100[89]") == 0)


def test_a_script_that_ends_without_stopping_leaves_nothing() -> None:
    before = set(slotpool_processes()), state_directories()
    script = python(
        "from slotpool import SlotPool\n"
        "pool = SlotPool(slots_per_container=2).start()\n"
        "s = pool.acquire()\n"
        "print(s.bash('echo hi').stdout)\n"
    )
    out, err = script.communicate(timeout=60)
    assert (out, err, script.returncode) == (b"hi\n\n", b"", 0)
    assert set(slotpool_processes()) <= before[0]
    assert state_directories() == before[1]


def test_so_does_one_with_pools_on_standing_servers(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=3)
    script = python(
        "import sys\n"
        "from slotpool import SlotPool\n"
        "settings = {'servers': sys.argv[1], 'token': sys.argv[2], 'lease_ttl': 3600}\n"
        "pools = [SlotPool(**settings).start() for _ in range(2)]\n"
        "slots = [pool.acquire() for pool in pools]\n",
        server.address,
        server.token,
    )
    assert script.communicate(timeout=60) == (b"", b"")
    assert server.client.health()["counts"]["leased"] == 0


def test_threads_that_outlive_the_main_one_still_run_batches() -> None:
    script = python(
        "import threading\n"
        "from slotpool import SlotPool\n"
        "pool = SlotPool(slots_per_container=1, min_containers=2).start()\n"
        "slots = [pool.acquire() for _ in range(2)]\n"
        "main = threading.main_thread()\n"
        "def run():\n"
        "    main.join()\n"
        "    results = pool.execute_batch([(slot, 'bash', {'command': 'echo late'}) for slot in slots])\n"
        "    print([result.stdout for result in results], flush=True)\n"
        "threading.Thread(target=run).start()\n"
    )
    assert script.communicate(timeout=60) == (b"['late\\n', 'late\\n']\n", b"")


def test_a_forked_child_can_neither_use_nor_break_the_pool(pool: SlotPool) -> None:
    with pool.slot() as s:
        s.bash("echo kept > f")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for act in (pool.acquire, lambda: s.bash("rm f")):
                    try:
                        act()
                    except (PoolClosed, LeaseLost) as e:
                        code = 0 if str(os.getppid()) in str(e) else 2
                s.release()
                pool.stop()
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        assert status == 0
        assert s.bash("cat f").stdout == "kept\n"


def test_a_pool_is_the_same_in_a_copy_of_what_uses_it_and_can_not_be_sent_elsewhere() -> None:
    pool = SlotPool()
    assert copy.deepcopy({"pool": pool})["pool"] is pool
    for send in (pickle.dumps, copy.copy):
        with pytest.raises(TypeError, match=r"SlotPool can't be pickled, .*; pickle its config"):
            send(pool)
    assert pickle.loads(pickle.dumps(pool.config)) == pool.config


def test_where_no_process_can_be_had_a_pool_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **more: object) -> None:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(subprocess, "Popen", fail)
    with pytest.raises(StartFailed, match=r"could not be started on this machine.*temporarily unavailable"):
        SlotPool(backend="local").start()


def test_a_standing_server_may_take_a_moment_to_answer(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    server.process.send_signal(signal.SIGSTOP)
    later = threading.Timer(0.6, server.process.send_signal, (signal.SIGCONT,))
    later.start()
    with SlotPool(servers=[server.address], token=server.token) as pool, pool.slot() as s:
        assert s.bash("echo well").stdout == "well\n"
    later.join()


def test_standing_servers_of_another_isolation_are_refused(start_server: StartServer) -> None:
    weak, strong = start_server("none", slots=1), start_server("bwrap", slots=1)
    settings: dict[str, Any] = {"token": weak.token, "isolation": "bwrap"}
    with pytest.raises(IsolationUnavailable, match=f"isolation: expected bwrap, got none at {weak.address}"):
        SlotPool(servers=[weak.address], **settings).start()
    with SlotPool(servers=[weak.address, strong.address], **settings) as pool, pool.slot() as s:
        assert s.container_addr == strong.address
        assert pool.total_slots == 1


def test_a_container_of_another_isolation_is_not_used_and_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    of_server = SlotPoolConfig.of_server
    monkeypatch.setattr(SlotPoolConfig, "of_server", lambda config: {**of_server(config), "isolation": "none"})
    monkeypatch.setattr(upkeep, "_HOPELESS", 2)  # attempts
    with pytest.raises(IsolationUnavailable, match="expected bwrap, got none"):
        SlotPool(isolation="bwrap", slots_per_container=1).start()
    with SlotPool(isolation="bwrap", slots_per_container=1, min_containers=0, max_containers=1) as pool:
        ended: list[BaseException] = []

        def acquire() -> None:
            with pytest.raises(AcquireTimeout, match="expected bwrap, got none") as caught:
                pool.acquire(timeout=3)
            ended.append(caught.value)

        caller = threading.Thread(target=acquire)
        caller.start()
        assert wait_until(servers)
        started = servers()
        caller.join()
        assert ended
        assert servers() == started


def test_a_start_fails_at_once_if_too_many_have_another_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    add = LocalFleet._add

    def first_is_weak(fleet: LocalFleet, index: int) -> None:
        fleet._settings = {**fleet._settings, "isolation": "bwrap" if index else "none"}
        add(fleet, index)

    monkeypatch.setattr(LocalFleet, "_add", first_is_weak)
    settings: dict[str, Any] = {"isolation": "bwrap", "slots_per_container": 1, "start_timeout": 1000}
    with pytest.raises(IsolationUnavailable, match="expected bwrap, got none"):
        SlotPool(min_containers=2, **settings).start()


def test_containers_that_hang_keep_no_others_leases_from_being_renewed() -> None:
    go_on = threading.Event()

    def hang() -> None:
        go_on.wait(60)

    with SlotPool(slots_per_container=1, max_containers=1, lease_ttl=3) as pool:
        s = pool.acquire()
        for _ in range(100):
            pool._background.submit(hang)
        container = s._tenure.container
        try:
            for _ in range(3):
                last = container.answered_at
                assert wait_until(lambda: container.answered_at > last)  # noqa: B023
            assert s.bash("echo well").stdout == "well\n"
        finally:
            go_on.set()


def test_two_pools_share_a_standing_server(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=3)
    settings: dict[str, Any] = {"servers": [server.address], "token": server.token, "lease_ttl": 2}
    with SlotPool(**settings) as one, SlotPool(**settings) as other:
        assert one.total_slots == 3
        first, second = one.acquire(), other.acquire()
        assert first.slot_id != second.slot_id
        waited: list[str] = []
        thread = threading.Thread(target=lambda: waited.append(other.acquire(timeout=60).slot_id))
        third = one.acquire()
        thread.start()
        assert wait_until(lambda: other.get_stats()["requests_waiting"] == 1)
        third.bash("echo mine > f")
        third.release()
        thread.join()
        assert waited == [third.slot_id]
        time.sleep(2.5)
        assert first.bash("echo renewed").stdout == "renewed\n"
    assert server.free(3)


def test_one_standing_server_is_enough_to_start(start_server: StartServer) -> None:
    server = start_server("none", slots=1)

    def slowly(direction: str, data: bytes) -> Iterator[bytes]:
        time.sleep(0.1)
        yield data

    proxy = Proxy(server.address, lambda: slowly)
    try:
        with SlotPool(servers=["http://127.0.0.1:9", proxy.address], token=server.token) as pool:
            assert pool.total_slots == 1
    finally:
        proxy.close()


def test_a_standing_server_that_is_not_there_is_told() -> None:
    with pytest.raises(StartFailed, match="no answer"):
        SlotPool(servers=["http://127.0.0.1:9"], start_timeout=5).start()


def test_the_wrong_token_is_told(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    with pytest.raises(StartFailed, match="token"):
        SlotPool(servers=[server.address], token="wrong", start_timeout=5).start()


def test_a_scaling_that_fails_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    grow = LocalFleet.grow
    with SlotPool(min_containers=0, slots_per_container=1, max_containers=1, scale_cooldown=0) as pool:
        monkeypatch.setattr(LocalFleet, "grow", _no_more_processes)
        with pytest.raises(AcquireTimeout, match="no process to be had"):
            pool.acquire(timeout=1.0)
        assert pool.get_stats()["scale_errors"] >= 1
        monkeypatch.setattr(LocalFleet, "grow", grow)
        pool.acquire(timeout=30).release()


def _no_more_processes(fleet: LocalFleet, wanted: int) -> None:
    raise BlockingIOError("no process to be had")


def test_a_pool_that_is_dropped_without_being_stopped_ends_its_servers() -> None:
    pool = SlotPool(slots_per_container=1, health_check_interval=0.1).start()
    assert servers()
    pools = [pool]
    del pool
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        pools.clear()
        assert wait_until(lambda: caught)  # a thread of the pool's may be the last to let go of it
    told = [str(one.message) for one in caught]
    caught.clear()  # it holds the pool
    assert [one for one in told if "stop" in one]
    assert wait_until(lambda: not servers(), 20)


def test_a_full_server_keeps_nobody_from_a_free_one(start_server: StartServer) -> None:
    full, free = start_server("bwrap", slots=1), start_server("bwrap", slots=1)
    full.lease(1)
    with SlotPool(servers=[full.address, free.address], token=full.token, health_check_interval=0.1) as pool:
        for _ in range(5):
            with pool.slot(timeout=3) as s:
                assert s.bash("echo well").stdout == "well\n"
