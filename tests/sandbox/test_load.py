"""Many at once: nobody waits for another's command, and no connection is made twice."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from arena import family
from conftest import Server, StartServer, wait_until
from proxy import CuttingProxy

from slotpool.sandbox.client import SandboxClient


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


def shells(server: Server) -> int:
    """How many there are in its slots; a copy of the zygote that has not become one yet does not count."""
    found = 0
    for pid in family(server.process.pid):
        try:
            found += Path(f"/proc/{pid}/comm").read_text() == "bash\n"
        except OSError:  # it has ended
            pass
    return found


def test_a_slot_has_one_shell_in_advance_and_more_once_a_call_has_found_none(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    assert wait_until(lambda: shells(server) == 2)  # that of the sandbox made in advance, for the next lease, is one of them
    for _ in range(3):
        server.bash(lease, "true")
        assert wait_until(lambda: shells(server) == 2)
    with ThreadPoolExecutor(2) as threads:
        for _ in range(2):
            threads.submit(server.bash, lease, "until [ -e end ]; do sleep 0.01; done")
        assert wait_until(lambda: shells(server) == 3)
        server.client.write_file(lease["slot"], lease["token"], "end", b"")
    assert wait_until(lambda: shells(server) == 4)
