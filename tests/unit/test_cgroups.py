"""Whose control groups are whose, in a directory that stands for a hierarchy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slotpool.sandbox import cgroups

ROOT = str(Path(cgroups.__file__).resolve().parents[2])


@pytest.fixture
def hierarchy(tmp_path: Path) -> str:
    return str(tmp_path)


def groups(hierarchy: str) -> cgroups.Groups:
    return cgroups.Groups(1, [hierarchy], None, None)


def test_a_server_that_starts_leaves_the_groups_of_others_alone(hierarchy: str) -> None:
    first = groups(hierarchy)
    second = groups(hierarchy)
    first.make("sandbox")
    assert sorted(os.listdir(hierarchy)) == sorted(os.path.basename(root) for one in (first, second) for root in one.roots)
    for one in (first, second):
        one.close()
    assert os.listdir(hierarchy) == []


def test_it_removes_those_of_servers_that_were_killed(hierarchy: str) -> None:
    code = "import os, sys; from slotpool.sandbox import cgroups; cgroups.Groups(1, [sys.argv[1]], None, None); os._exit(0)"
    subprocess.run([sys.executable, "-c", code, hierarchy], check=True, env={**os.environ, "PYTHONPATH": ROOT})
    (left,) = os.listdir(hierarchy)
    one = groups(hierarchy)
    assert left not in os.listdir(hierarchy)
    one.close()


def test_not_while_a_process_has_inherited_their_lock(hierarchy: str) -> None:
    one = groups(hierarchy)
    inherited = os.dup(one.locks[0])
    os.close(one.locks.pop())
    other = groups(hierarchy)
    assert len(os.listdir(hierarchy)) == 2
    other.close()
    os.close(inherited)
    groups(hierarchy).close()
    assert os.listdir(hierarchy) == []


def test_one_that_something_is_in_still_goes_with_a_later_one(hierarchy: str) -> None:
    one = groups(hierarchy)
    (root,) = one.roots
    names = [f"sandbox-{i}" for i in range(12)]
    for name in names:
        one.make(name)
        Path(root, name, "still").touch()  # as a process that nobody has waited for yet
        one.remove(name)
    assert sorted(os.listdir(root)) == sorted(names)
    for name in names:
        Path(root, name, "still").unlink()
    for name in ("a", "b", "c", "d"):
        one.make(name)
        one.remove(name)
    assert os.listdir(root) == []
    one.close()


def place(monkeypatch: pytest.MonkeyPatch, memberships: str, mounts: str) -> None:
    """Let /proc tell that of this process."""
    told = {"/proc/self/cgroup": memberships, "/proc/self/mountinfo": mounts}
    read = cgroups._read
    monkeypatch.setattr(cgroups, "_read", lambda path: told[path] if path in told else read(path))


def group(directory: Path, files: dict[str, str]) -> None:
    directory.mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)


def test_the_memory_of_the_group_that_may_have_least_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "top").mkdir()
    files = {"memory.max": "1000000\n", "memory.stat": "file 3\nanon 700\nanon_thp 2\n", "memory.current": "720\n"}
    group(tmp_path / "top" / "service", files)
    group(tmp_path / "top" / "service" / "slotpool", {"memory.max": "max\n", "memory.stat": "anon 5\nfile 1\n"})
    mounts = f"30 20 0:26 / {tmp_path}/top rw,nosuid - cgroup2 cgroup2 rw\n"
    place(monkeypatch, "1:name=systemd:/elsewhere\n0::/service/slotpool\n", mounts)
    memory = cgroups.limited_memory()
    assert memory is not None
    assert (memory.limit(), memory.used(), memory.held([], 1)) == (1_000_000, 720, 700)


def test_so_it_does_of_version_1_in_a_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stat = "cache 9\nrss 1\ntotal_cache 9\ntotal_rss 800\ntotal_rss_huge 0\n"
    files = {"memory.limit_in_bytes": "2000000\n", "memory.stat": stat, "memory.usage_in_bytes": "820\n"}
    group(tmp_path / "memory", files)
    (tmp_path / "unified").mkdir()
    mounts = (
        f"30 20 0:26 /docker/x {tmp_path}/memory ro - cgroup cgroup rw,memory\n"
        f"31 20 0:27 /docker/x {tmp_path}/unified ro - cgroup2 cgroup2 rw\n"
    )
    place(monkeypatch, "4:memory:/docker/x\n0::/docker/x\n", mounts)
    memory = cgroups.limited_memory()
    assert memory is not None
    assert (memory.limit(), memory.used(), memory.held([], 1)) == (2_000_000, 820, 800)


def test_large_groups_within_are_asked_first_as_what_is_told_of_an_outer_one_may_be_old(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def told(used: int, held: int) -> dict[str, str]:
        return {"memory.current": f"{used}\n", "memory.stat": f"anon {held}\n"}

    service = tmp_path / "service"
    own, server = service / "own", service / "own" / "server"
    group(service, {"memory.max": "1000\n", **told(980, 100)})
    group(own, {"memory.max": "max\n", **told(970, 110)})
    group(server, told(960, 120))
    for name, files in (("large", told(600, 500)), ("other", told(300, 250)), ("small", told(99, 90))):
        group(server / name, files)
    group(tmp_path / "elsewhere", told(800, 800))
    place(monkeypatch, "0::/service/own\n", f"30 20 0:26 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    memory = cgroups.limited_memory()
    assert memory is not None
    assert memory.held([], 100) == 110  # the way up is known
    joined = [f"{directory}/cgroup.procs" for directory in (server / "small", server / "gone", tmp_path / "elsewhere")]
    assert memory.held(joined, 100) == 120
    joined += [f"{server}/{name}/cgroup.procs" for name in ("other", "large")]
    assert memory.held(joined, 100) == 750
    (service / "memory.current").write_text("740\n")  # what is told may be old also in that all of that has been given back
    assert memory.held(joined, 100) == 740


@pytest.mark.parametrize("limit", ["max", str(1 << 62)])
def test_none_is_limited_that_may_have_the_whole_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str) -> None:
    group(tmp_path / "own", {"memory.max": limit, "memory.stat": "anon 5\n"})
    place(monkeypatch, "0::/own\n", f"30 20 0:26 / {tmp_path} rw - cgroup2 cgroup2 rw\n")
    assert cgroups.limited_memory() is None
    place(monkeypatch, "", "")
    assert cgroups.limited_memory() is None


def test_who_is_in_a_group_is_told_or_nothing(tmp_path: Path) -> None:
    file = str(tmp_path / "tasks")
    with pytest.raises(FileNotFoundError):
        cgroups.members(file)
    (tmp_path / "cgroup.procs").write_text("")
    assert cgroups.members(file) == set()
    (tmp_path / "cgroup.procs").write_text("17\n4\n")
    assert cgroups.members(file) == {4, 17}
    (tmp_path / "cgroup.procs").write_text("0\n17\n")
    with pytest.raises(OSError, match="another PID namespace"):
        cgroups.members(file)
