"""How leases end: what they have started goes first, wherever it is, and nobody else's process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import PACKAGE, ROOT, StartServer, wait_until

from slotpool.sandbox import cgroups
from slotpool.sandbox.host import Host
from slotpool.sandbox.nursery_process import NurseryProcess
from slotpool.sandbox.tenancies import HostConfig, Tenancy, TenancyMaker

MANY = 20  # more than sandboxes are made at once


def test_all_that_is_released_has_ended_before_sandboxes_are_made_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(HostConfig(slots=MANY, isolation="none"), NurseryProcess())
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
        while len(tokens) < MANY:
            tokens += [lease["token"] for lease in host.lease("test", 60, MANY - len(tokens), (), 20)["leases"]]
        monkeypatch.setattr(TenancyMaker, "end", counted)
        monkeypatch.setattr(TenancyMaker, "make", held_up)
        host.lease("test", 60, 0, tokens, 0)
        for number in range(MANY):
            assert ended.acquire(timeout=20), f"only {number} of {MANY} have ended"
        go_on.set()
        assert wait_until(lambda: host.health()["counts"]["free"] == MANY)
    finally:
        go_on.set()
        host.close()


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


# Two of one user, one of another. What the user's group lists, one time after the other, is given. Tells who was killed.
KILL = """
import json, subprocess, sys
from slotpool.sandbox import cgroups, confine
uid, killer, other = 2_900_000_001, 2_900_000_002, 2_900_000_003
children = {}
for name, user in ("one", uid), ("two", uid), ("three", other):
    children[name] = subprocess.Popen(["sleep", "100"], user=user, group=user, extra_groups=[])
listings = json.loads(sys.argv[1])
unread = iter(listings)
cgroups.members = lambda file: {children[name].pid for name in next(unread)}
confine.kill_user(uid, killer, ["group"] if listings else [])
for child in children.values():
    child.terminate()
print(*(name for name, child in children.items() if child.wait() == -9))
"""


@pytest.mark.skipif(not ROOT, reason="only root may be another user")
@pytest.mark.parametrize(
    ("listings", "killed"),
    [
        pytest.param([], "one two", id="no group"),
        pytest.param([["one"], []], "one", id="who is listed"),
        pytest.param([["one", "three"], ["three"]], "one", id="not others that are listed"),
        pytest.param([["one"], ["one", "two"]], "one two", id="all once there are more"),
    ],
)
def test_killed_is_who_is_listed_and_that_users(listings: Sequence[Sequence[str]], killed: str) -> None:
    command = [sys.executable, "-c", KILL, json.dumps(listings)]
    told = subprocess.run(command, env={**os.environ, "PYTHONPATH": PACKAGE}, capture_output=True, text=True, timeout=60)
    assert told.stdout == f"{killed}\n", told.stderr
