"""What comes back from a command: both streams, bounded, whatever bytes they hold."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import MODES, StartServer

from slotpool import SlotPool


def resident_megabytes(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


@pytest.mark.parametrize("mode", MODES)
def test_stdout_stderr_and_exit_code_come_apart(start_server: StartServer, mode: str) -> None:
    server = start_server(mode, slots=1)
    (lease,) = server.lease()
    result = server.bash(lease, "echo out; echo err >&2; exit 3")
    assert (result["stdout"], result["stderr"], result["exit_code"], result["signal"]) == ("out\n", "err\n", 3, None)
    assert result["isolation"] == server.isolation
    result = server.bash(lease, "kill -9 $$")
    assert (result["exit_code"], result["signal"]) == (137, 9)
    result = server.bash(lease, "echo x > /dev/stderr; echo y > /dev/stdout")
    assert (result["stdout"], result["stderr"]) == ("y\n", "x\n")


def test_bytes_that_are_not_utf8_survive(pool: SlotPool) -> None:
    with pool.slot() as s:
        result = s.bash(r"printf 'a\xff\xfeb'; printf '\xe2\x82' >&2")
        assert result.stdout == "a\ufffd\ufffdb"
        assert result.stdout_bytes == b"a\xff\xfeb"
        assert result.stderr == "\ufffd"
        assert result.stderr_bytes == b"\xe2\x82"


def test_characters_split_between_reads_are_put_together(pool: SlotPool) -> None:
    with pool.slot() as s:
        split = r"printf '\xe2'; sleep 0.05; printf '\x82'; sleep 0.05; printf '\xac'"
        assert s.bash(split).stdout == "€"
        many = s.bash("python3 -c \"import sys; sys.stdout.write('€' * 10000)\"")
        assert many.stdout == "€" * 10000
        assert not many.truncated


def test_head_and_tail_of_long_output_are_kept(pool: SlotPool) -> None:
    with pool.slot() as s:
        result = s.bash("echo begin; seq 1000000; echo end; seq 3 >&2")
        assert result.truncated
        assert result.stdout_truncated
        assert not result.stderr_truncated
        assert result.stdout.startswith("begin\n1\n2\n")
        assert result.stdout.endswith("1000000\nend\n")
        assert "bytes left out" in result.stdout
        assert len(result.stdout) < pool.config.max_output + 100


def test_a_flood_of_output_is_not_held_in_memory(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    server.bash(lease, "yes | head -c 10000000")
    before = resident_megabytes(server.process.pid)
    result = server.bash(lease, "yes", timeout=5.0)
    assert result["timed_out"]
    assert result["stdout_truncated"]
    assert resident_megabytes(server.process.pid) - before < 50


def test_a_background_process_that_holds_the_pipe_does_not_hold_the_call(pool: SlotPool) -> None:
    with pool.slot() as s:
        result = s.bash("sleep 100 & echo started $!", timeout=50)
        assert result.success
        assert not result.timed_out
        pid = result.stdout.split()[1]
        assert s.bash(f"kill -0 {pid} && echo alive").stdout == "alive\n"


def test_stdin_is_empty_unless_given(pool: SlotPool) -> None:
    with pool.slot() as s:
        assert s.bash("cat; echo over").stdout == "over\n"
        assert s.bash("cat", stdin="some input").stdout == "some input"
        assert s.bash("cat", stdin=b"\xff\x00\xfe").stdout_bytes == b"\xff\x00\xfe"
        assert s.bash("wc -c", stdin="x" * 3_000_000).stdout.strip() == "3000000"
        assert s.bash("exit 0", stdin="y" * 3_000_000).success, "a command that does not read its input"


def test_each_command_has_a_shell_of_its_own(pool: SlotPool) -> None:
    with pool.slot() as s:
        assert s.bash("cd /; X=1; echo $#:$0").stdout == "0:bash\n"
        assert s.bash("echo -n $X; pwd").stdout == s.workspace_dir + "\n"
        assert s.bash('echo "$A|$B"', env={"A": "it's", "B": "$(id) `id`"}).stdout == "it's|$(id) `id`\n"
        s.bash("mkdir -p 'a b'")
        assert s.bash("pwd", cwd="a b").stdout == f"{s.workspace_dir}/a b\n"
        assert s.bash("if").exit_code == 2
        assert s.bash("nosuchcommand").exit_code == 127
        assert "bash: line 3: nosuch" in s.bash("true\ntrue\nnosuch").stderr
        assert s.bash("echo $SECONDS").stdout == "0\n"
        assert s.bash("x='" + "a" * 300_000 + "'; echo ${#x}").stdout == "300000\n"
