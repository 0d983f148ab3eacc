"""Tools by name, batches, files, and what a slot tells of itself."""

from __future__ import annotations

import json
import os
import pickle
from types import MappingProxyType
from typing import Any

import pytest

from slotpool import CommandFailed, ExecutionResult, InvalidRequest, LeaseLost, SlotPool, SlotState
from slotpool.errors import FileError


def test_the_main_job(pool: SlotPool) -> None:
    with pool.slot() as s:
        s.write_file("a.py", "print(6*7)")
        r = s.bash("python3 a.py; ls")
        assert (r.stdout, r.exit_code) == ("42\na.py\n", 0)


def test_tools_by_name(pool: SlotPool) -> None:
    with pool.slot() as s:
        assert pool.execute(s, "write_file", {"path": "d/f", "content": "hi €\n"}).success
        read = pool.execute(s, "read_file", {"path": "d/f"})
        assert (read.output, read.success, read.slot_id) == ("hi €\n", True, s.slot_id)
        missing = pool.execute(s, "read_file", {"path": "nothing"})
        assert not missing.success
        assert "No such file" in missing.error
        assert (missing.stdout, missing.stderr) == ("", "")
        ran = pool.execute(s, "bash", {"command": "cat d/f; exit 4"}, timeout=5)
        assert (ran.output, ran.exit_code, ran.success) == ("hi €\n", 4, False)
        with pytest.raises(InvalidRequest) as error:
            pool.execute(s, "python", {})
        assert error.value.field == "tool"
        assert "bash" in error.value.expected


def test_a_batch_comes_back_in_order_and_fails_apart() -> None:
    with SlotPool(slots_per_container=2, max_containers=2, min_containers=2) as pool:
        slots = [pool.acquire() for _ in range(4)]
        assert len({slot.alloc_id for slot in slots}) == 2
        calls: list[Any] = [(slot, "bash", {"command": f"echo {i}"}) for i, slot in enumerate(slots * 5)]
        assert [result.stdout for result in pool.execute_batch(calls)] == [f"{i}\n" for i in range(20)]
        slots[1].release()
        mixed: list[Any] = [
            (slots[0], "bash", {"command": "exit 1"}),
            (slots[1], "bash", {"command": "echo lost"}),
            (slots[2], "nonsense", {}),
            (slots[3], "read_file", {"path": "none"}),
            (slots[0], "bash", {"command": "sleep 100"}),
        ]
        results = pool.execute_batch(mixed, timeout=1)
        assert [result.success for result in results] == [False] * 5
        assert results[0].exit_code == 1
        assert results[1].metadata["exception"] == "LeaseLost"
        assert results[2].metadata["exception"] == "InvalidRequest"
        assert "No such file" in results[3].error
        assert results[4].timed_out
        assert pool.execute_batch([]) == []
        for slot in slots:
            slot.release()


def test_results_are_data(pool: SlotPool) -> None:
    with pool.slot() as s:
        result = s.bash("echo out; echo err >&2; exit 2")
        as_dict = json.loads(json.dumps(result.to_dict()))
        assert as_dict["output"] == "out\nerr\n"
        assert as_dict["metadata"]["isolation"] in ("bwrap", "user")
        assert pickle.loads(pickle.dumps(result)) == result
        with pytest.raises(CommandFailed, match="exited with 2: err") as failed:
            result.check()
        assert pickle.loads(pickle.dumps(failed.value)).result == result
        assert isinstance(s.bash("true", check=True), ExecutionResult)


def test_files(pool: SlotPool) -> None:
    with pool.slot() as s:
        s.write_file("text", "zwölf\n")
        assert s.read_file("text") == "zwölf\n"
        s.write_file(f"{s.workspace_dir}/bin", bytes(range(256)))
        assert s.read_bytes("bin") == bytes(range(256))
        assert s.read_file("bin").startswith("\x00\x01")
        with pytest.raises(FileError, match="No such file") as error:
            s.read_file("none")
        assert isinstance(error.value, OSError)
        assert error.value.errno == 2


def test_any_mapping_does_for_arguments(pool: SlotPool) -> None:
    with pool.slot() as s:
        assert pool.execute(s, "bash", MappingProxyType({"command": "echo well"})).stdout == "well\n"
        (result,) = pool.execute_batch([(s, "bash", MappingProxyType({"command": "echo well"}))])
        assert result.stdout == "well\n"
        assert s.bash('echo "$A"', env=MappingProxyType({"A": "b"})).stdout == "b\n"


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda p, s: s.bash(5), "command"),
        (lambda p, s: s.bash("a\0b"), "command"),
        (lambda p, s: s.bash("true", timeout=0), "timeout"),
        (lambda p, s: s.bash("true", timeout="5"), "timeout"),
        (lambda p, s: s.bash("true", timeout=float("nan")), "timeout"),
        (lambda p, s: s.bash("true", cwd="../../nowhere"), "cwd"),
        (lambda p, s: s.bash("true", cwd=5), "cwd"),
        (lambda p, s: s.bash("true", env={"1": "x"}), "env"),
        (lambda p, s: s.bash("true", env="abc"), "env"),
        (lambda p, s: s.bash("true", env=5), "env"),
        (lambda p, s: s.write_file("../up", "x"), "path"),
        (lambda p, s: s.write_file("/etc/passwd", "x"), "path"),
        (lambda p, s: s.write_file("a\0b", "x"), "path"),
        (lambda p, s: s.write_file(3, "x"), "path"),
        (lambda p, s: s.write_file("x", 3), "content"),
        (lambda p, s: s.write_file("x", "\ud800"), "content"),
        (lambda p, s: s.write_file("x", b"x" * (p.config.max_file_size + 1)), "content"),
        (lambda p, s: s.read_file("/etc/passwd"), "path"),
        (lambda p, s: p.execute(s, 5, {}), "tool"),
        (lambda p, s: p.execute(s, "bash", "ls"), "args"),
        (lambda p, s: p.execute(s, "bash", {"command": {1, 2}}), "args"),
        (lambda p, s: p.execute("slot_0", "bash", {}), "slot"),
        (lambda p, s: p.execute_batch([(s, "bash")]), "calls"),
        (lambda p, s: p.release("slot_0"), "slot"),
        (lambda p, s: p.acquire(timeout=-1), "timeout"),
        (lambda p, s: p.acquire(5), "trajectory_id"),
        (lambda p, s: p.acquire(network="yes"), "network"),
    ],
)
def test_bad_input_names_the_field_and_loses_nothing(call: Any, field: str) -> None:
    with SlotPool(slots_per_container=1, max_containers=1, max_file_size=1000) as pool, pool.slot() as s:
        s.write_file("kept", "kept")
        with pytest.raises(InvalidRequest) as error:
            call(pool, s)
        assert error.value.field == field
        assert error.value.expected
        assert s.bash("cat kept; ls -A").stdout == "keptkept\n"
        assert pool.acquired_slots == 1


def test_a_slot_tells_of_itself(pool: SlotPool) -> None:
    slot = pool.acquire("my-trajectory")
    assert slot.state == SlotState.ACQUIRED
    assert slot.trajectory_id == "my-trajectory"
    slot.metadata["step"] = 3
    told = json.loads(json.dumps(slot.to_dict()))
    assert told["slot_id"].startswith("slot_")
    assert told["state"] == "acquired"
    assert told["metadata"] == {"step": 3}
    assert slot._tenure.token not in json.dumps(told) + repr(slot)
    slot.release()
    slot.release()
    assert slot.state == SlotState("releasing")
    with pytest.raises(LeaseLost) as lost:
        slot.bash("true")
    assert not lost.value.may_have_run
    assert pool.acquire().trajectory_id.startswith("trajectory-")


def test_network_is_off_unless_asked_for(pool: SlotPool) -> None:
    interfaces = "cat /proc/net/dev | tail -n +3 | cut -d: -f1 | tr -d ' \\n'"
    of_this_machine = os.readlink("/proc/self/ns/net")
    for network in (False, True, False):
        with pool.slot(network=network or None) as s:
            namespace = s.bash("readlink -n /proc/self/ns/net")
            assert (namespace.stdout == of_this_machine, s.network, namespace.metadata["network"]) == (network,) * 3
            if not network:
                assert s.bash(interfaces).stdout == "lo"


@pytest.mark.filterwarnings("ignore::slotpool.security.SecurityWarning")
def test_a_wish_that_the_isolation_cannot_grant_is_an_error() -> None:
    with SlotPool(slots_per_container=1, max_containers=1, isolation="none") as pool:
        with pytest.raises(InvalidRequest) as error:
            pool.acquire(network=False)
        assert error.value.field == "network"
        with pool.slot(network=True) as s, pytest.raises(InvalidRequest, match="require_sandbox"):
            pool.execute(s, "bash", {"command": "true", "require_sandbox": True})
        assert pool.acquired_slots == 0
