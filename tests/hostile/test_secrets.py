"""Tokens: in no log, process list, error or representation, and in nothing of a slot's."""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

import pytest
from arena import Arena, family, serving
from attacks import attack
from conftest import PACKAGE, Server

from slotpool import SlotPool, SlotPoolConfig
from slotpool.errors import SlotPoolError
from slotpool.sandbox.client import SandboxClient
from slotpool.sandbox.logs import lease_id


def shown(server: Server, tokens: list[str]) -> list[str]:
    """Every error that a client can have, as it is printed, and pickled by parts."""
    slot, lease = "slot_0", tokens[0]
    wrong = SandboxClient(server.address, tokens[-1][:-1])
    gone = SandboxClient("http://127.0.0.1:9", tokens[-1])
    calls: list[Any] = []
    for client in (server.client, wrong, gone):
        for held in [lease[:-1]] if client is gone else [lease, lease[:-1], tokens[1]]:
            calls += [
                (client.execute, slot, held, "bash", {"command": "exit 3", "cwd": "/none"}, 5.0),
                (client.execute, slot, held, "bash", {"command": "kill -9 -1"}, 5.0),
                (client.execute, slot, held, "nothing", {}, 5.0),
                (client.execute, "slot_77", held, "bash", {"command": 1}, 5.0),
                (client.read_file, slot, held, "none/at/all"),
                (client.write_file, slot, held, "/proc/none", b"x"),
                (client.reset, slot, held, "nonsense"),
                (client.renew, [held, 3]),
                (client.cordon, "", -1.0, [held]),
                (client.lease, "", -1.0, -1, [held]),
            ][:: 3 if client is gone else 1]
    told = []
    for act, *args in calls:
        try:
            act(*args)
        except SlotPoolError as e:
            parts = [
                str(e),
                repr(e),
                repr(e.args),
                repr(vars(e)),
                "".join(traceback.format_exception(type(e), e, e.__traceback__)),
            ]
            told.append("\n".join(parts))
    for client in (wrong, gone):
        client.close()
    assert len(told) > 40
    return [*told, repr(server.client), repr(server.client._http)]


@attack("the wire: find tokens in the server's log, at its most talkative", "none, neither the server's nor a lease's")
@pytest.mark.parametrize("mode", ["bwrap", "user"])
def test_tokens_are_in_no_log_error_process_list_or_slot(mode: str, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(mode, "--slots", "2", general=["-vv"]) as server:
        (stale,) = server.lease()
        server.client.lease("test", 30.0, 0, [stale["token"]])
        one, other = server.lease(2)
        tokens = [one["token"], other["token"], stale["token"], server.token]
        errors = shown(server, tokens)
        processes = {pid: _told(pid, "cmdline") for pid in family(server.process.pid)}
        environments = {pid: _told(pid, "environ") for pid in processes if pid != server.process.pid}
        inside = server.bash(one, "env; set; cat /proc/self/environ /proc/[0-9]*/environ /proc/[0-9]*/cmdline 2>/dev/null")[
            "stdout"
        ]
        own = _told(server.process.pid, "environ")
        server.bash(one, "sleep 60 &")
        (lost,) = server.client.lease("test", 0.1, 1)["leases"] or [stale]  # one that expires, if there is any
        tokens.append(lost["token"])
    log = capfd.readouterr().err
    assert f"lease {lease_id(one['token'])}: execution " in log
    assert server.token in own, "the search finds nothing"
    for token in tokens:
        assert token not in log
        assert token not in inside
        assert not [pid for pid, told in processes.items() if token in told]
        assert not [pid for pid, told in environments.items() if token in told]
        assert not [told for told in errors if token in told]


def _told(pid: int, what: str) -> str:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes().decode(errors="replace")
    except OSError:
        return ""


@attack("the wire: find tokens in what a pool shows: its log, errors, statistics, representations", "none")
@pytest.mark.parametrize("mode", ["bwrap"])
def test_tokens_are_in_nothing_that_a_pool_shows(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    token = "SLOTPOOL_TEST_" + "pools_token"
    config = SlotPoolConfig(backend="local", token=token, isolation=mode, slots_per_container=2, max_containers=1)
    with SlotPool(config) as pool, pool.slot() as slot:
        lease = slot._tenure.token
        told = [repr(config), str(config), repr(pool), repr(slot), str(slot), str(pool.get_stats()), repr(slot.bash("env"))]
        for command in ("kill -9 -1; sleep 60", "exit 3"):
            with pytest.raises(SlotPoolError) as error:
                slot.bash(command, check=True)
            told.append(repr(error.value) + repr(vars(error.value)))
    told.append(caplog.text)
    for secret in (token, lease):
        assert not [one for one in told if secret in one]


@attack("find the command line's tokens in the process list", "they are in the environment, or a file")
def test_no_command_takes_a_token_as_a_word() -> None:
    for command in ("serve", "exec", "bench", "up", "down", "status", "build", "top"):
        done = subprocess.run(
            [sys.executable, "-m", "slotpool", command, "--help"],
            env={**os.environ, "PYTHONPATH": PACKAGE},
            capture_output=True,
            text=True,
            check=True,
        )
        words = [word.strip("[],") for word in done.stdout.split() if word.startswith(("--", "[--"))]
        assert words
        assert not [word for word in words if "token" in word and word != "--token-file"]


@attack("the server's token in what the slot's own helpers have: environ of all its processes", "not there", docker=True)
def test_no_process_of_a_slot_has_ever_had_the_servers_token(arena: Arena) -> None:
    """As root sees it: what the slot's user can't read today, a hole of the kernel's may show tomorrow."""
    for lease in (arena.a, arena.b):
        arena.server.bash(lease, "sleep 60 >/dev/null 2>&1 &")
    seen = 0
    for pid in family(arena.pid_here):
        if pid == arena.pid_here:
            continue
        for what in ("environ", "cmdline"):
            told = _told(pid, what)
            assert arena.server.token not in told
            seen += bool(told)
    assert seen > 4
    arena.assert_unharmed()
