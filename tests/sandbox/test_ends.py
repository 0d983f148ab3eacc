"""How leases end: what they have started goes first, wherever it is, and nobody else's process."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cells import zygotes
from conftest import PACKAGE, ROOT, StartServer, call_of, wait_until, why_not

from slotpool.errors import IsolationUnavailable, StartFailed
from slotpool.sandbox import cgroups, confine, killing, linux, sandboxes
from slotpool.sandbox import host as host_module
from slotpool.sandbox.host import Host
from slotpool.sandbox.nursery_process import NurseryProcess
from slotpool.sandbox.protocol import RequestFailed
from slotpool.sandbox.tenancies import HostConfig, Tenancy, TenancyMaker

BATCH = 10  # more than sandboxes are made at once


def test_what_is_released_ends_while_sandboxes_are_made_for_what_was_before(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(HostConfig(slots=2 * BATCH, isolation="none"), NurseryProcess())
    ended = threading.Semaphore(0)
    go_on = threading.Event()
    end, make = TenancyMaker.end, TenancyMaker.make

    def counted(maker: TenancyMaker, tenancy: Tenancy) -> None:
        end(maker, tenancy)
        ended.release()

    def held_up(maker: TenancyMaker, network: bool) -> Tenancy:
        assert go_on.wait(60)
        return make(maker, network)

    try:
        tokens: list[str] = []
        while len(tokens) < 2 * BATCH:
            tokens += [lease["token"] for lease in host.lease("test", 60, 2 * BATCH - len(tokens), (), 20)["leases"]]
        monkeypatch.setattr(TenancyMaker, "end", counted)
        monkeypatch.setattr(TenancyMaker, "make", held_up)
        for batch in (tokens[:BATCH], tokens[BATCH:]):
            host.lease("test", 60, 0, batch, 0)
            for number in range(BATCH):
                assert ended.acquire(timeout=20), f"only {number} of {BATCH} have ended"
        go_on.set()
        assert wait_until(lambda: host.health()["counts"]["free"] == 2 * BATCH)
    finally:
        go_on.set()
        host.close()


def _no_threads(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith(named):
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)


def test_leases_end_also_where_no_more_threads_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(HostConfig(slots=2, isolation="none"), NurseryProcess())
    try:
        assert wait_until(lambda: host.health()["counts"]["free"] == 2)
        (released,) = host.lease("test", 60, 1, (), 20)["leases"]
        (expiring,) = host.lease("test", 0.2, 1, (), 20)["leases"]
        _no_threads(monkeypatch, "slotpool")
        host.lease("test", 60, 0, [released["token"]], 0)
        assert wait_until(lambda: host.health()["counts"]["free"] == 2), "by its time the other one, too"
        assert not host.holds(expiring["slot"], expiring["token"])
    finally:
        host.close()


def test_so_do_commands_that_go_on_after_their_requests_time(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(HostConfig(slots=1, isolation="none"), NurseryProcess())
    try:
        (lease,) = host.lease("test", 60, 1, (), 20)["leases"]
        _no_threads(monkeypatch, "slotpool-execution")
        (answer,), afterwards = host.execute([call_of(lease, "x", "sleep 1021", 0.5)], 0.0)
        afterwards()
        assert isinstance(answer, dict)
        assert answer["timed_out"]
    finally:
        host.close()


@pytest.mark.parametrize("networks", [(None, None), (True, False)])
def test_of_two_resets_at_once_none_takes_the_lease_for_lost(
    monkeypatch: pytest.MonkeyPatch, networks: tuple[bool | None, bool | None]
) -> None:
    if why_not("bwrap"):
        pytest.skip(why_not("bwrap"))
    make = TenancyMaker.make
    first, both = threading.Semaphore(2), threading.Barrier(2)

    def together(maker: TenancyMaker, network: bool) -> Tenancy:
        if first.acquire(blocking=False):
            both.wait(20)
        return make(maker, network)

    host = Host(HostConfig(slots=1, isolation="bwrap"), NurseryProcess())
    try:
        (lease,) = host.lease("test", 60, 1, (), 20)["leases"]
        monkeypatch.setattr(TenancyMaker, "make", together)
        with ThreadPoolExecutor(2) as executor:
            resets = [executor.submit(host.reset, lease["slot"], lease["token"], network) for network in networks]
            has = [reset.result() for reset in resets]
        assert has == [lease["network"] if network is None else network for network in networks]
        (answer,), afterwards = host.execute([call_of(lease, "x", "echo well")], 20.0)
        afterwards()
        assert isinstance(answer, dict)
        assert answer["stdout"] == "well\n"
        assert answer["network"] in has
    finally:
        host.close()


@pytest.mark.parametrize("which", ["undertaker", "warmer", "end", "make", "expiry"])
def test_a_server_that_can_not_have_its_threads_says_so_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    def there_is() -> set[object]:
        return {*threading.enumerate(), *killing.children(os.getpid()), *os.listdir("/proc/self/fd")}

    before = there_is()
    _no_threads(monkeypatch, f"slotpool-{which}")
    with pytest.raises(StartFailed, match="more threads than it may have"):
        Host(HostConfig(slots=2, isolation="none"), NurseryProcess())
    assert there_is() <= before


def test_what_is_given_back_while_the_server_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(HostConfig(slots=1, isolation="none"), NurseryProcess())
    try:
        (lease,) = host.lease("test", 60, 1, (), 20)["leases"]
        monkeypatch.setattr(Host, "_given_back", lambda *_: host.close())
        with pytest.raises(RequestFailed, match="shutting down"):
            host.lease("test", 60, 0, [lease["token"]], 0)
    finally:
        host.close()


def test_who_has_waited_long_for_what_he_gave_back_is_gone_and_gets_no_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(HostConfig(slots=1, isolation="none"), NurseryProcess())
    later = [0.0]
    end = TenancyMaker.end

    def long(maker: TenancyMaker, tenancy: Tenancy) -> None:
        end(maker, tenancy)
        later[0] = 20.0

    try:
        (lease,) = host.lease("test", 60, 1, (), 20)["leases"]
        monkeypatch.setattr(host_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + later[0]))
        monkeypatch.setattr(TenancyMaker, "end", long)
        assert host.lease("test", 60, 1, [lease["token"]], 5.0)["leases"] == []
        assert host.health()["counts"]["free"] == 1
    finally:
        host.close()


def test_who_waits_gets_a_lease_as_soon_as_a_cordon_runs_out() -> None:
    host = Host(HostConfig(slots=1, isolation="none"), NurseryProcess())
    with ThreadPoolExecutor(1) as executor:
        try:
            assert wait_until(lambda: host.health()["counts"]["free"] == 1)
            assert host.cordon("test", 0.5, ())
            waiting = executor.submit(host.lease, "test", 60, 1, (), 100)
            assert len(waiting.result(20)["leases"]) == 1
        finally:
            host.close()


def test_who_ends_a_sandbox_with_namespaces_waits_for_its_death_alone() -> None:
    if why_not("bwrap"):
        pytest.skip(why_not("bwrap"))
    maker = TenancyMaker(HostConfig(slots=1, isolation="bwrap"), process := NurseryProcess())
    try:
        tenancy = maker.make(network=False)
        inside = zygotes(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        maker.end(tenancy)
        assert inside
        assert not any(os.path.exists(f"/proc/{pid}") for pid in inside), "gone, and not only dead"
    finally:
        os.kill(process.pid, signal.SIGCONT)
        maker.close()


def test_bubblewrap_may_be_run_by_a_script(bubblewrap: Path, start_server: StartServer) -> None:
    bubblewrap.write_text(f'#!/bin/sh\n{shutil.which("bwrap", path=os.defpath)} "$@"\n')
    server = start_server("bwrap")
    (lease,) = server.lease()
    assert server.bash(lease, "echo inside")["stdout"] == "inside\n"


def test_a_process_that_is_no_sandboxs_first_is_not_taken_for_one(bubblewrap: Path) -> None:
    with subprocess.Popen(["sleep", "1009"]) as other:
        told = f'while [ "$1" != --info-fd ]; do shift; done\necho \'{{"child-pid": {other.pid}}}\' >&"$2"\n'
        bubblewrap.write_text(f"#!/bin/bash\n{told}")
        with pytest.raises(IsolationUnavailable, match=f"expected process {other.pid}.*to be its own"):
            TenancyMaker(HostConfig(slots=1, isolation="bwrap"), NurseryProcess())
        assert other.poll() is None
        other.kill()


@pytest.fixture
def crowd() -> Iterator[None]:
    """So many threads that what a lease has started is looked for in its control group first."""
    gone = threading.Event()
    threads = [threading.Thread(target=gone.wait) for _ in range(confine._MANY_THREADS)]
    for thread in threads:
        thread.start()
    yield
    gone.set()
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("crowd")
def test_a_process_that_has_left_its_control_group_ends_with_its_lease(start_server: StartServer) -> None:
    if not ROOT:
        pytest.skip("only root can move it")
    server = start_server("user", slots=1)
    kept_by = server.client.health()["limits"]["cpu_share"]
    if not kept_by.startswith("cgroup"):
        pytest.skip("no control groups can be had")
    (lease,) = server.lease()
    pid = int(server.bash(lease, "sleep 1000 >/dev/null 2>&1 & echo $!")["stdout"])
    for controller in (None,) if kept_by == "cgroup v2" else ("memory", "cpu"):
        Path(cgroups._own_directory(controller), "cgroup.procs").write_text(str(pid))
    server.client.lease("test", 30, 0, [lease["token"]])
    assert wait_until(lambda: not os.path.exists(f"/proc/{pid}"))
    assert server.free(1)


@pytest.mark.parametrize(("threads", "crowded"), [(300, False), (301, True), (None, False)])
def test_a_machine_is_crowded_from_so_many_threads_on(
    monkeypatch: pytest.MonkeyPatch, threads: int | None, crowded: bool
) -> None:
    def told() -> tuple[int, int]:
        if threads is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/proc/loadavg")
        return 1, threads

    monkeypatch.setattr(linux, "threads", told)
    assert confine.is_crowded() is crowded


@pytest.mark.parametrize(("crowded", "asked"), [(False, [(), ()]), (True, [("group",), ()])])
def test_its_control_group_is_asked_where_the_machine_is_crowded_and_only_the_first_time(
    monkeypatch: pytest.MonkeyPatch, crowded: bool, asked: list[tuple[str, ...]]
) -> None:
    of: list[tuple[str, ...]] = []
    monkeypatch.setattr(confine, "kill_user", lambda uid, killer, groups: of.append(tuple(groups)))
    monkeypatch.setattr(confine, "has_processes", lambda uid: True)
    nothing: Any = SimpleNamespace(remove=lambda uid: None, may_have=lambda uid: [])
    beside: Any = SimpleNamespace(
        is_crowded=crowded, bereaved={}, later=lambda call: None, ipc_objects=nothing, scratch=lambda directories: nothing
    )
    order: Any = {"uid": 2_900_000_001, "killer": 2_900_000_002, "groups": ["group"], "scratch": []}
    near, far = socket.socketpair()
    with near, far:
        sandbox = sandboxes.UserSandbox(beside, order, near, far)
        sandbox.kill()
        sandbox.kill()
    assert of == asked


# Two of one user, one of another. What the user's group lists, one time after the other, is given. Tells who was killed.
KILL = """
import json, subprocess, sys
from slotpool.sandbox import cgroups, confine, linux
uid, killer, other = 2_900_000_001, 2_900_000_002, 2_900_000_003
children = {}
for name, user in ("one", uid), ("two", uid), ("three", other):
    children[name] = subprocess.Popen(["sleep", "100"], user=user, group=user, extra_groups=[])
listings = json.loads(sys.argv[1])
unread = iter(listings)
def members(file):
    listing = next(unread)
    if listing is None:
        raise OSError("not told")
    return {children[name].pid for name in listing}
cgroups.members = members
confine.kill_user(uid, killer, ["group"] if listings else [])
for child in children.values():
    child.terminate()
print(*(name for name, child in children.items() if child.wait() == -9))
print(len(list(unread)))
"""


@pytest.mark.skipif(not ROOT, reason="only root may be another user")
@pytest.mark.parametrize(
    ("listings", "killed"),
    [
        pytest.param([], "one two", id="all of the user, where no group is asked"),
        pytest.param([["one"], []], "one", id="who is listed"),
        pytest.param([["one", "three"], ["three"]], "one", id="not others that are listed"),
        pytest.param([["one"], ["one", "two"]], "one two", id="all once there are more"),
        pytest.param([None], "one two", id="all where that is not told"),
    ],
)
def test_killed_are_processes_of_that_user_alone(listings: list[Any], killed: str) -> None:
    command = [sys.executable, "-c", KILL, json.dumps(listings)]
    told = subprocess.run(command, env={**os.environ, "PYTHONPATH": PACKAGE}, capture_output=True, text=True, timeout=60)
    assert told.stdout.splitlines() == [killed, "0"], told.stderr
