"""Leases over the wire: a token that is not, or no longer, a slot's is refused everywhere, and changes nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
from conftest import PACKAGE, SESSION, Server, StartServer, slotpool_processes, wait_until

from slotpool.errors import ContainerLost, ContainerRefused, LeaseLost
from slotpool.sandbox.client import SandboxClient
from slotpool.sandbox.killing import children


def routes(server: Server, slot: str, token: str) -> dict[str, Callable[[], Any]]:
    client = server.client
    return {
        "execute": lambda: client.execute(slot, token, "bash", {"command": "echo ran >> trace; pkill sleep"}, 10),
        "write": lambda: client.write_file(slot, token, "trace", b"written"),
        "read": lambda: client.read_file(slot, token, "secret"),
        "reset": lambda: client.reset(slot, token),
    }


def check_refused(server: Server, slot: str, token: str) -> None:
    for name, call in routes(server, slot, token).items():
        with pytest.raises(LeaseLost) as lost:
            call()
        assert not lost.value.may_have_run, name
    args = {"command": "touch trace"}
    (answer,) = server.client.batch(
        [{"slot": slot, "lease": token, "execution_id": "x", "tool": "bash", "args": args, "timeout": 5.0}]
    )
    assert isinstance(answer, LeaseLost)
    assert server.client.renew([token])["lost"] == [token]
    status, _ = server.client._http.json(
        "POST", f"/v1/slots/{slot}/cancel", {"execution_id": "x"}, 10, {"Slotpool-Lease": token}
    )
    assert status == 409


def test_a_stale_token_is_refused_everywhere_and_changes_nothing(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (old,) = server.lease()
    server.client.lease("test", 30, 0, release=[old["token"]])
    (new,) = server.lease()
    assert new["slot"] == old["slot"]
    assert new["token"] != old["token"]
    server.client.write_file(new["slot"], new["token"], "secret", b"mine")
    server.bash(new, "sleep 1000 & echo")
    check_refused(server, old["slot"], old["token"])
    server.client.lease("test", 30, 0, release=[old["token"]])
    assert server.bash(new, "cat secret; ls; pgrep -c sleep")["stdout"] == "minesecret\n1\n"


def test_a_token_is_good_for_its_own_slot_only(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=2)
    one, other = server.lease(2)
    server.client.write_file(other["slot"], other["token"], "secret", b"theirs")
    for token in (one["token"], "", "é", other["token"] + "x", other["token"][:-1]):
        for call in routes(server, other["slot"], token).values():
            with pytest.raises(LeaseLost):
                call()
    assert server.bash(other, "ls; cat secret")["stdout"] == "secret\ntheirs"


def test_a_slot_that_a_server_has_not_is_held_by_no_lease(start_server: StartServer) -> None:
    """As when a container was lost, and its port has gone to one with fewer slots."""
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    for call in routes(server, "slot_1", lease["token"]).values():
        with pytest.raises(LeaseLost, match="slot_1"):
            call()


def test_an_expired_lease_is_void_and_its_slot_clean(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease(ttl=0.5)
    server.bash(lease, "touch mine; setsid sleep 1000 & disown")
    assert server.free(1)
    check_refused(server, lease["slot"], lease["token"])
    (fresh,) = server.lease()
    assert server.bash(fresh, "ls -A; pgrep -c sleep")["stdout"] == "0\n"


def test_any_call_renews_and_so_does_a_renewal(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=2)
    called, renewed = server.lease(2, ttl=4)
    for _ in range(5):
        server.bash(called, "sleep 1")
        assert server.client.renew([renewed["token"]])["lost"] == []
    assert server.bash(renewed, "echo held")["stdout"] == "held\n"


def test_the_bearer_token_guards_every_route(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    for token in (None, "wrong", server.token + "x", ""):
        client = SandboxClient(server.address, token)
        stranger = Server(server.process, client, server.address, "", server.isolation)
        for call in routes(stranger, lease["slot"], lease["token"]).values():
            with pytest.raises(ContainerRefused):
                call()
        with pytest.raises(ContainerRefused):
            client.lease("me", 30, 1)
        with pytest.raises(ContainerRefused):
            client.renew([])
        assert client._http.json("GET", "/v1/slots", None, 10)[0] == 401
        if token is None:
            assert client.health() == {"status": "ok"}
        client.close()
    assert server.bash(lease, "ls -A")["stdout"] == ""


def test_a_wrong_route_is_told(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    assert server.client._http.json("GET", "/v1/nothing", None, 5)[0] == 404
    assert server.client._http.json("GET", "/v1/leases", None, 5)[0] == 405


def test_a_killed_client_loses_its_slots_and_nobody_else_does(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=3)
    (mine,) = server.lease()
    server.bash(mine, "echo kept > file; sleep 1002 & echo")
    script = (
        "import sys; from slotpool.sandbox.client import SandboxClient\n"
        f"c = SandboxClient({server.address!r}, {server.token!r})\n"
        "leases = []\n"
        "while len(leases) < 2: leases += c.lease('victim', 2.0, 2, wait=10)['leases']\n"
        "c.execute(leases[1]['slot'], leases[1]['token'], 'bash', {'command': 'touch left; setsid sleep 1003 & disown'}, 30)\n"
        "print('ready', flush=True)\n"
        "c.execute(leases[0]['slot'], leases[0]['token'], 'bash', {'command': 'sleep 1004'}, 300)\n"
    )
    client = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": PACKAGE}, cwd="/"
    )
    assert client.stdout is not None
    assert client.stdout.readline() == b"ready\n"
    assert server.client.health()["counts"]["leased"] == 3
    client.send_signal(signal.SIGKILL)
    client.wait()
    client.stdout.close()
    assert server.free(2)
    assert server.client.renew([mine["token"]])["lost"] == []
    for lease in server.lease(2):
        assert server.bash(lease, "ls -A; pgrep -c sleep")["stdout"] == "0\n"
    assert server.bash(mine, "cat file; pgrep -c sleep")["stdout"] == "kept\n1\n"


def test_a_restarted_server_voids_old_leases(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    boot_id = server.client.health()["boot_id"]
    server.stop()
    with pytest.raises(ContainerLost) as lost:
        server.bash(lease, "true")
    assert not lost.value.may_have_run
    again = start_server("bwrap", slots=1)
    assert again.client.health()["boot_id"] != boot_id
    assert again.free(1)
    check_refused(again, lease["slot"], lease["token"])


def kill_nursery(server: Server) -> None:
    (nursery,) = children(server.process.pid)
    os.kill(nursery, signal.SIGKILL)


@pytest.mark.parametrize("mode", ["bwrap", "bwrap-as-user", "user", "none"])
@pytest.mark.parametrize("victim", ["server", "nursery"])
def test_nothing_outlives_a_killed_server(start_server: StartServer, mode: str, victim: str) -> None:
    before = set(slotpool_processes())
    server = start_server(mode, slots=2)
    (lease,) = server.lease()
    server.bash(lease, "setsid sh -c 'SLOTPOOL_TEST=1 exec -a SLOTPOOL_TEST_straggler sleep 1005' & disown; echo")
    state = os.path.dirname(server.address[len("unix://") :])
    if victim == "server":
        server.process.kill()
    else:
        kill_nursery(server)
    assert wait_until(lambda: set(slotpool_processes()) <= before), slotpool_processes()
    assert wait_until(lambda: not os.path.exists(state))
    server.process.wait(10)


@pytest.mark.parametrize("mode", ["bwrap", "bwrap-as-user"])
def test_nothing_of_a_sandbox_that_was_being_made_outlives_a_killed_nursery(
    start_server: StartServer, mode: str, bubblewrap: Path
) -> None:
    # What a bubblewrap that is killed at the wrong moment leaves: a process that waits for it, for ever.
    real = shutil.which("bwrap", path=os.defpath)
    bubblewrap.write_text(f"#!/bin/sh\nsh -c 'sleep 1007; :' {SESSION} &\nexec {real} \"$@\"\n")
    before = set(slotpool_processes())
    server = start_server(mode, slots=1)
    assert [line for line in slotpool_processes() if "sleep 1007" in line]
    kill_nursery(server)
    assert wait_until(lambda: set(slotpool_processes()) <= before), slotpool_processes()
    server.process.wait(10)


def test_what_was_there_before_a_server_outlives_it_and_its_killed_nursery(tmp_path: Path) -> None:
    began = tmp_path / "began"
    script = f"sleep 1008 & echo $! >{began}; exec {sys.executable} -m slotpool serve --slots 2 --port 0"
    environment = {**os.environ, "PYTHONPATH": PACKAGE}
    process = subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE, env=environment, start_new_session=True)
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline().startswith(b"http://")
    helper = int(began.read_text())
    (nursery,) = {child for child in children(process.pid) if child != helper}
    os.kill(nursery, signal.SIGKILL)
    process.wait(30)
    os.kill(helper, signal.SIGTERM)  # it is there
