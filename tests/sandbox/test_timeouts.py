"""A time-out ends what the call started, all of it and nothing else."""

from __future__ import annotations

import sys
import tempfile
import threading

import pytest
from conftest import MODES, OURS, PACKAGE, StartServer, wait_until

from slotpool import CommandFailed, SlotPool

TREE = f"setsid sleep 101{OURS} & (sleep 102{OURS} &) ; (ulimit -m 1000; sleep 103{OURS}) & echo hi; sleep 104{OURS}"
COUNT = f"pgrep -u $(id -u) -f '^sleep 10[0-9]{OURS}$' | wc -l"


@pytest.mark.parametrize("mode", MODES)
def test_everything_that_the_call_started_is_killed(start_server: StartServer, mode: str) -> None:
    server = start_server(mode, slots=1)
    (lease,) = server.lease()
    server.bash(lease, f"sleep 1000{OURS} & disown; setsid sleep 1001{OURS} & echo")
    result = server.bash(lease, TREE, timeout=1.0)
    assert result["timed_out"]
    assert result["stdout"] == "hi\n"
    after = server.bash(lease, COUNT)
    assert after["stdout"].strip() == "0", "the sleeps are dead, and the next command runs at once"
    others = server.bash(lease, f"pgrep -u $(id -u) -f '^sleep 100[01]{OURS}$' | wc -l")
    assert others["stdout"].strip() == "2", "what an earlier call left running lives on"


@pytest.mark.parametrize("mode", MODES)
def test_a_call_that_takes_its_mark_off_is_killed_all_the_same(start_server: StartServer, mode: str) -> None:
    server = start_server(mode, slots=1)
    (lease,) = server.lease()
    server.bash(lease, f"sleep 1000{OURS} & echo")
    for command in (f"ulimit -m 1000; sleep 101{OURS}", f"(ulimit -m 1000; setsid sleep 102{OURS} &); sleep 103{OURS}"):
        result = server.bash(lease, command, timeout=0.5)
        assert (result["timed_out"], result["restarted"]) == (True, False)
        assert server.bash(lease, COUNT)["stdout"].strip() == "0"
    others = server.bash(lease, f"pgrep -u $(id -u) -f '^sleep 1000{OURS}$' | wc -l")
    assert others["stdout"].strip() == "1"


def test_another_slots_call_is_left_alone(start_server: StartServer) -> None:
    server = start_server("none", slots=2)
    one, other = server.lease(2)
    results = []
    command = "touch begun; until [ -e end ]; do sleep 0.05; done; echo fine"
    calm = threading.Thread(target=lambda: results.append(server.bash(other, command, timeout=60)))
    calm.start()
    assert wait_until(lambda: server.bash(other, "ls")["stdout"] == "begun\n")
    assert server.bash(one, f"sleep 101{OURS}", timeout=1.0)["timed_out"]
    server.bash(other, "touch end")
    calm.join()
    assert [result["stdout"] for result in results] == ["fine\n"]


@pytest.mark.filterwarnings("ignore::slotpool.security.SecurityWarning")
def test_a_server_inside_a_slot_outlives_a_time_out() -> None:
    inner = (
        "from slotpool import SlotPool\n"
        "with SlotPool(isolation='none', slots_per_container=1, max_containers=1) as pool, pool.slot() as s:\n"
        "    print(s.bash('sleep 100', timeout=0.5).timed_out, s.bash('echo well').stdout.strip())\n"
    )
    with SlotPool(isolation="none", slots_per_container=1) as pool, pool.slot() as s:
        # The slot's own TMPDIR can be too long for a Unix socket in a directory of another pool's.
        env = {"PYTHONPATH": PACKAGE, "TMPDIR": tempfile.gettempdir()}
        told = s.bash(f"{sys.executable} -", stdin=inner, env=env, timeout=60)
        assert told.stdout == "True well\n", told.stderr


def test_a_process_that_ignores_signals_and_hides_is_killed(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    hide = (
        "import os, signal, time\n"
        "for s in range(1, 32):\n"
        "    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except OSError: pass\n"
        "if os.fork(): os._exit(0)\n"
        "os.setsid()\n"
        "if os.fork(): os._exit(0)\n"
        "os.environ.clear()\n"
        f"os.execve('/bin/sleep', ['sleep', '104{OURS}'], {{}})\n"
    )
    result = server.bash(lease, f'python3 -c "{hide}"; echo up; while :; do :; done', timeout=1.5)
    assert result["timed_out"]
    assert result["stdout"] == "up\n"
    assert server.bash(lease, COUNT)["stdout"].strip() == "0"


def test_calls_side_by_side_time_out_apart(pool: SlotPool) -> None:
    with pool.slot() as s:
        results = {}

        def run(name: str, command: str, timeout: float) -> None:
            results[name] = s.bash(command, timeout=timeout)

        threads = [
            threading.Thread(target=run, args=("short", "(setsid sleep 105 &); sleep 106", 0.5)),
            threading.Thread(target=run, args=("long", "(setsid sleep 107 &); sleep 2; echo done", 60)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results["short"].timed_out
        assert results["long"].stdout == "done\n"
        assert s.bash("pgrep -f '^sleep 10[567]$' -a | cut -d' ' -f2-").stdout == "sleep 107\n"


def test_a_timed_out_result_fails_its_check(pool: SlotPool) -> None:
    with pool.slot() as s:
        result = s.bash("echo partial; sleep 100", timeout=0.3)
        assert not result.success
        assert result.signal == 9
        with pytest.raises(CommandFailed, match="timed out"):
            result.check()
        with pytest.raises(CommandFailed) as failed:
            s.bash("sleep 100", timeout=0.3, check=True)
        assert failed.value.result.timed_out


def test_a_fork_bomb_ends_with_its_time_out(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=2, max_processes=200)
    one, other = server.lease(2)
    result = server.bash(one, "bomb() { bomb | bomb & }; bomb 2>/dev/null; sleep 100", timeout=1.0)
    assert result["timed_out"]
    assert server.bash(one, "echo well")["stdout"] == "well\n"
    assert server.bash(other, "echo well")["stdout"] == "well\n"
