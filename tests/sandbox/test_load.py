"""Many at once: nobody waits for another's command, and no connection is made twice."""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from arena import family
from conftest import Server, StartServer, wait_until
from proxy import CuttingProxy

from slotpool.errors import FileError
from slotpool.sandbox import census, linux
from slotpool.sandbox.client import SandboxClient
from slotpool.sandbox.protocol import Lease


def test_commands_that_take_long_hold_up_no_health_check_and_no_other_slot(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=9)
    *busy, idle = server.lease(9)
    running = threading.Barrier(9)

    def take_long(i: int) -> int:
        server.bash(busy[i], "true")
        running.wait(20)
        return int(server.bash(busy[i], "until [ -e end ]; do sleep 0.05; done; exit 7", 60)["exit_code"])

    with ThreadPoolExecutor(8) as threads:
        calls = [threads.submit(take_long, i) for i in range(8)]
        running.wait(20)
        for _ in range(20):
            assert server.client.health()["counts"]["leased"] == 9
            assert server.bash(idle, "echo well")["stdout"] == "well\n"
            assert server.client.renew([lease["token"] for lease in busy])["lost"] == []
        assert not any(call.done() for call in calls)
        for lease in busy:
            server.client.write_file(lease["slot"], lease["token"], "end", b"")
        assert [call.result(60) for call in calls] == [7] * 8


def test_each_concurrent_call_has_a_connection_and_none_is_made_anew(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=8)
    leases = server.lease(8)
    proxy = CuttingProxy(server.address, lambda where, seen: False)
    client = SandboxClient(proxy.address, server.token)
    try:

        def call_often(i: int) -> None:
            for _ in range(50):
                client.execute(leases[i]["slot"], leases[i]["token"], "bash", {"command": "true"}, 20)

        with ThreadPoolExecutor(8) as threads:
            list(threads.map(call_often, range(8)))
        assert 1 <= proxy.connections <= 8
    finally:
        client.close()
        proxy.close()


# Of a command: it has no process then that could pass for a shell while it is being started.
WAIT = "until [ -e end ]; do read -t 0.05 || :; done <>fifo"


def shells(server: Server) -> set[int]:
    """Those that are in its slots; a copy of the zygote that has not become one yet is none, nor is a dead one."""
    found = set()
    for pid in family(server.process.pid):
        with contextlib.suppress(OSError):  # it has ended
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"bash\0"):
                found.add(pid)
    return found


def shells_in(server: Server, lease: Lease) -> set[int]:
    """Those of one slot, whose workspace has a path of its own."""
    found = set()
    for pid in shells(server):
        with contextlib.suppress(OSError):  # it has ended
            if os.readlink(f"/proc/{pid}/cwd") == lease["workspace"]:
                found.add(pid)
    return found


def run_by_the_only_one(server: Server, lease: Lease) -> None:
    """A call in a slot for which none waits. Returns once its shell is gone, and the next one waits.

    Without the first, the shell that has run it could be taken for the next one, and a call that comes too soon has the slot
    keep more of them.
    """
    others = shells(server)
    own = server.bash(lease, "echo $$")["stdout"].strip()

    def only_the_next_waits() -> bool:
        new = shells(server) - others
        with contextlib.suppress(OSError):  # it has ended
            return len(new) == 1 and own not in map(inner_id, new)
        return False

    assert wait_until(only_the_next_waits)


def inner_id(pid: int) -> str:
    """What a process itself takes for its id."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("NSpid:"))
    return line.split()[-1]


def require_one_for_one(server: Server, lease: Lease) -> None:
    """A shell that was used is replaced; beside it is the one of the sandbox that is made in advance."""

    def one_is_new(before: set[int]) -> bool:
        now = shells(server)
        return len(now) == 2 and len(now - before) == 1

    for _ in range(3):
        before = shells(server)
        server.bash(lease, "true")
        assert wait_until(functools.partial(one_is_new, before))


@contextlib.contextmanager
def two_at_once(server: Server, lease: Lease) -> Iterator[None]:
    """Two calls that run until this is left; of a slot that has one shell in advance, the second finds none."""
    slot = lease["slot"], lease["token"]

    def runs(i: int) -> bool:
        try:
            return server.client.read_file(*slot, str(i)) == b""
        except FileError:
            return False

    with ThreadPoolExecutor(2) as threads:
        calls = []
        for i in range(2):  # one after the other, so that the first is none of a slot in a hurry
            calls.append(threads.submit(server.bash, lease, f"mkfifo fifo 2>/dev/null; touch {i}; {WAIT}"))
            assert wait_until(functools.partial(runs, i))
        try:
            yield
        finally:
            server.client.write_file(*slot, "end", b"")
        assert [call.result()["exit_code"] for call in calls] == [0, 0]


def test_a_slot_has_one_shell_in_advance_and_more_once_a_call_has_found_none(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    assert wait_until(lambda: len(shells(server)) == 2)  # one of them in the sandbox that is made in advance
    require_one_for_one(server, lease)
    with two_at_once(server, lease):
        assert wait_until(lambda: len(shells(server)) == 4), "the next one is started while those are waited for"
    assert wait_until(lambda: len(shells(server)) == 4)


def test_where_calls_are_apart_the_next_shell_is_started_after_an_answer(start_server: StartServer) -> None:
    server = start_server("user", slots=2)
    lease, other = server.lease(2)
    assert wait_until(lambda: len(shells_in(server, lease)) == len(shells_in(server, other)) == 1)
    with two_at_once(server, lease):
        pass
    assert wait_until(lambda: len(shells_in(server, lease)) == 3)
    time.sleep(0.05)  # calls that are apart
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(server.bash, lease, f"rm end; touch begun; {WAIT}")
        try:
            assert wait_until(lambda: "begun" in os.listdir(lease["workspace"]))
            before = shells_in(server, other)
            server.bash(other, "true")
            assert wait_until(lambda: len(shells_in(server, other) - before) == 1)  # by who would have started one there before
            before = shells_in(server, lease)
            assert len(before) == 3
        finally:
            server.client.write_file(lease["slot"], lease["token"], "end", b"")
        assert call.result()["exit_code"] == 0
    assert wait_until(lambda: len(shells_in(server, lease)) == 3 and len(shells_in(server, lease) - before) == 1)


def run_behind(server: Server, lease: Lease, command: str) -> None:
    """In the background, while no call runs and the next shell waits."""
    before = shells(server)
    server.bash(lease, f"mkfifo fifo; ({WAIT}; {command}) >/dev/null 2>&1 &")

    def waits_beside_the_next() -> bool:
        now = shells(server)
        return len(now - before) == 2 and len(now & before) == 1

    assert wait_until(waits_beside_the_next)
    server.client.write_file(lease["slot"], lease["token"], "end", b"")


def test_a_slot_that_was_mended_has_one_shell_in_advance_too(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    assert wait_until(lambda: len(shells(server)) == 2)
    zygotes = {int(linux.stat_fields(f"/proc/{pid}")[census.PARENT]) for pid in shells(server)}
    run_behind(server, lease, "kill -KILL -1")
    assert wait_until(lambda: sum(os.path.exists(f"/proc/{pid}") for pid in zygotes) == len(shells(server)) == 1)
    run_by_the_only_one(server, lease)
    require_one_for_one(server, lease)


def test_a_waiting_shell_that_the_slot_has_killed_is_replaced_by_one(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    assert wait_until(lambda: len(shells(server)) == 2)
    run_behind(server, lease, "for pid in $(pgrep -P $PPID); do [ $pid = $BASHPID ] || kill -KILL $pid; done; touch done")

    def is_done() -> bool:
        with contextlib.suppress(FileError):
            return server.client.read_file(lease["slot"], lease["token"], "done") == b"" and len(shells(server)) == 1
        return False

    assert wait_until(is_done)
    run_by_the_only_one(server, lease)
    require_one_for_one(server, lease)
