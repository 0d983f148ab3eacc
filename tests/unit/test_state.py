"""The directories of servers that start and end side by side."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from slotpool.sandbox.state import StateDirectory


def test_servers_that_start_at_once_leave_each_other_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path = tempfile.mkdtemp()  # a shorter path than pytest's
    monkeypatch.setattr(tempfile, "tempdir", tmp_path)

    def live(_: int) -> bool:
        state = StateDirectory()
        os.mkdir(os.path.join(state.path, "slots"))
        kept = os.path.exists(os.path.join(state.path, "lock"))
        state.release()
        state.tidy()
        return kept

    with ThreadPoolExecutor(16) as servers:
        assert all(servers.map(live, range(400)))
    os.rmdir(tmp_path)  # it is empty
