"""What a pool, or ``slotpool serve``, is told to limit is limited in its slots, to that size."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from arena import serving
from conftest import why_not

from slotpool import SlotPool
from slotpool.errors import FileError
from slotpool.sandbox import cgroups

MIB = 1 << 20
LIMITS: dict[str, Any] = {
    "max_output": 1000,
    "max_file_size": 3000,
    "max_processes": 30,
    "max_memory": 64,
    "max_written": 5 * MIB,
    "max_disk": 7,
}


def groups() -> str:
    """Which control groups a server can have here, in a pool's words; empty for none."""
    try:
        found = cgroups.find(None, None)
    except OSError:
        return ""
    found.close()
    return f"cgroup v{found.version}"


@pytest.fixture
def shown() -> Iterator[str]:
    """A directory with a file."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        Path(directory, "shown").touch()
        yield directory


@contextlib.contextmanager
def server_and_settings(kind: str, shown: str, limits: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings of a pool of one slot with those limits: of its own server's, or of a standing one's."""
    if kind == "local":
        own = {"slots_per_container": 1, "max_containers": 1, "isolation": "bwrap", "readonly_paths": shown}
        yield {**own, **limits}
        return
    options = [f"--{name.replace('_', '-')}={value}" for name, value in limits.items()]
    with serving("bwrap", "--slots=1", f"--readonly-path={shown}", *options) as server:
        yield {"servers": server.address, "token": server.token}


@pytest.mark.parametrize("kind", ["local", "serve"])
def test_every_limit_arrives(shown: str, kind: str) -> None:
    if why_not("bwrap"):
        pytest.skip(why_not("bwrap"))
    limits = {**LIMITS, "max_cpus": 0.2} if groups() else LIMITS
    with server_and_settings(kind, shown, limits) as settings, SlotPool(**settings) as pool, pool.slot() as s:
        assert pool.get_stats()["limits"] == {
            "processes": ["rlimit"],
            "open_files": ["rlimit"],
            "memory": [groups() or "rlimit"],
            "cpu": [groups() or "none"],
            "cpu_share": [groups() or "SCHED_IDLE"],
            "file_size": ["rlimit"],
            "disk": ["tmpfs"],
            "wall_time": ["timeout"],
        }
        assert s.bash(f"ls {shown}").stdout == "shown\n"
        assert s.bash("ulimit -u; ulimit -f; df --output=size -B1 . | tail -1").stdout.split() == ["30", "5120", str(7 * MIB)]
        printed = s.bash("seq 1000")
        assert printed.truncated
        assert 1000 <= len(printed.stdout) < 1100  # with the line that says how much is left out
        s.bash("head -c 3000 /dev/zero >fits; head -c 3001 /dev/zero >large")
        assert s.read_bytes("fits") == bytes(3000)
        with pytest.raises(FileError, match="limit"):
            s.read_bytes("large")
        allocations = [s.bash(f"python3 -c \"b'x' * ({size} << 20)\"").success for size in (32, 96)]
        assert allocations == [True, False]
        if groups():
            busy = "import time; end = time.monotonic() + 1\nwhile time.monotonic() < end: pass\nprint(time.process_time())"
            assert float(s.bash("python3 -", stdin=busy).stdout) < 0.5


def test_a_command_has_the_pools_timeout_if_it_is_given_none() -> None:
    with SlotPool(slots_per_container=1, max_containers=1, command_timeout=0.3) as pool, pool.slot() as s:
        assert s.bash("sleep 20").timed_out
        assert [result.timed_out for result in pool.execute_batch([(s, "bash", {"command": "sleep 20"})])] == [True]
        assert not s.bash("sleep 0.5", timeout=20).timed_out
