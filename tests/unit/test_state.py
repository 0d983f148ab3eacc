"""The directories of servers that start and end side by side."""

from __future__ import annotations

import fcntl
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from slotpool.sandbox import state
from slotpool.sandbox.state import StateDirectory


def test_servers_that_start_at_once_leave_each_other_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path = tempfile.mkdtemp()  # a shorter path than pytest's
    monkeypatch.setattr(tempfile, "tempdir", tmp_path)

    def live(_: int) -> bool:
        one = StateDirectory()
        os.mkdir(os.path.join(one.path, "slots"))
        kept = os.path.exists(os.path.join(one.path, "lock"))
        one.release()
        one.tidy()
        return kept

    with ThreadPoolExecutor(16) as servers:
        assert all(servers.map(live, range(400)))
    os.rmdir(tmp_path)  # it is empty


def test_no_directory_is_made_in_a_parent_that_others_may_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path = tempfile.mkdtemp()
    monkeypatch.setattr(tempfile, "tempdir", tmp_path)
    samestat, lock = os.path.samestat, state._lock
    replaced: list[str] = []
    locked: list[str] = []

    def replace_once(one: os.stat_result, other: os.stat_result) -> bool:
        same = samestat(one, other)
        if not replaced:
            replaced.append(os.path.join(tmp_path, os.listdir(tmp_path)[0]))
            os.rmdir(replaced[0])
            os.mkdir(replaced[0])
        return same

    def looked_at(directory: str, flags: int = 0) -> int:
        fd = os.open(replaced[0], os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
        locked.append(directory)
        return lock(directory, flags)

    monkeypatch.setattr(os.path, "samestat", replace_once)
    monkeypatch.setattr(state, "_lock", looked_at)
    made = StateDirectory()
    assert locked == [made.path]
    made.release()
    made.tidy()
    os.rmdir(tmp_path)
