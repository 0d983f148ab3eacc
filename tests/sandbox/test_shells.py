"""A shell that has told how its command ended waits to be let go; where its death has to tell that, it is let go at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import StartServer, wait_until

from slotpool.sandbox.protocol import Lease

# Shells of this slot, but for the one that asks; one that waits for a script, once it has been started again, is one of them.
SHELLS = "grep -lx bash /proc/[0-9]*/comm 2>/dev/null | grep -vc ^/proc/$$/"
FRESH = "the slot's calls are not hurried then, and its shells wait"


@pytest.mark.parametrize(
    ("command", "status", "stdout"),
    [
        ("false", 1, ""),
        ("exit 3", 3, ""),
        ("exec true", 0, ""),
        ("set -e; false; true", 1, ""),
        ("trap 'echo bye; exit 6' EXIT; false", 6, "bye\n"),
        ("trap 'echo bye' EXIT; set -e; (exit 4)", 4, "bye\n"),
        ("set -x; echo hi", 0, "hi\n"),
        ("trap 'trap \"exit 5\" EXIT' DEBUG; :", 5, ""),
        ("trap 'echo err' ERR; false", 1, "err\n"),
        ("read() { echo mine; }; false", 1, ""),
        ("read() { exit 9; }; (exit 8)", 8, ""),
        ("set -x; read() { sleep 20; }; false", 1, ""),
        ("set -x; read() { exit 9; }; (exit 8)", 8, ""),
        ("trap 'echo bye' EXIT; read() { exit 9; }; (exit 8)", 8, "bye\n"),
        ("declare -i REPLY; set -x; (exit 3)", 3, ""),
        ("declare -n REPLY='a[x y]'; set -x; (exit 4)", 4, ""),
        ("readonly REPLY; false", 1, ""),
        ("TMOUT=1; false", 1, ""),
        ("exec 10>&1; echo hi >&10; (exit 7)", 7, "hi\n"),
        ("echo hi >&59; (exit 2)", 2, ""),
    ],
)
def test_a_call_ends_as_bash_would_and_not_by_its_time(
    start_server: StartServer, command: str, status: int, stdout: str
) -> None:
    server = start_server("auto", slots=1)
    for _ in range(2):
        (lease,) = server.lease()
        result = server.bash(lease, command, timeout=10.0)
        assert (result["exit_code"], result["stdout"], result["timed_out"]) == (status, stdout, False), FRESH
        assert server.bash(lease, "echo on")["stdout"] == "on\n"
        server.client.lease("test", 30.0, 0, [lease["token"]])


def test_what_tells_nothing_as_it_begins_has_all_of_its_input(start_server: StartServer) -> None:
    """What is written to it goes on while its silence is seen to."""
    server = start_server("auto", slots=4)
    leases = server.lease(4)
    content = "x" * 200_000

    def call(lease: Lease) -> list[str]:
        return [server.bash(lease, "exec 3>&-; cat | wc -c", stdin=content)["stdout"].strip() for _ in range(40)]

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(call, leases)) == [["200000"] * 40] * 4


def test_shells_do_not_pile_up(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    for command in ("true", "set -x; true", "trap 'true' EXIT", "sleep 1000 & true") * 5:
        server.bash(lease, command)
    assert wait_until(lambda: int(server.bash(lease, SHELLS)["stdout"]) <= 4)
    assert server.bash(lease, "pgrep -c sleep")["stdout"] == "5\n", "what they had left running goes on"
