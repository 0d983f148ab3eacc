"""Directories of this machine that slots see, and can't change."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ISOLATED, StartServer, why_not

from slotpool import SlotPool
from slotpool.errors import IsolationUnavailable


@pytest.fixture
def shown() -> Iterator[Path]:
    """A directory with a file, which all users see. Not where every slot may write."""
    with tempfile.TemporaryDirectory(dir="/srv" if os.geteuid() == 0 else None) as directory:
        os.chmod(directory, 0o755)
        file = Path(directory, "file")
        file.write_text("as it was\n")
        yield Path(directory)


@pytest.mark.parametrize("mode", ISOLATED)
def test_it_is_read_and_stays_as_it_is(shown: Path, start_server: StartServer, mode: str) -> None:
    server = start_server(mode, readonly_paths=[str(shown)])
    # Whatever its modes are, except where nothing else is to keep slots from writing there.
    if mode != "user" or server.client.health()["landlock"]:
        shown.chmod(0o777)
        (shown / "file").chmod(0o666)
    (lease,) = server.lease()
    assert server.bash(lease, f"ls {shown}; cat {shown}/file")["stdout"] == "file\nas it was\n"
    for change in ("echo more >>file", ": >file", "chmod 600 file", "touch new", "mkdir new", "rm file", "mv file new"):
        changed = server.bash(lease, f"cd {shown} && {change}")
        assert changed["exit_code"] != 0, change
        assert changed["stderr"], change
    assert [(path.name, path.read_text()) for path in shown.iterdir()] == [("file", "as it was\n")]


@pytest.mark.parametrize("path", ["/tmp", "/var/tmp/venv", "/dev/shm/../shm/venv"])
def test_what_slots_may_write_to_is_refused(path: str) -> None:
    if why_not("user"):
        pytest.skip(why_not("user"))
    with pytest.raises(IsolationUnavailable, match="readonly_paths: slots may write to what is below /tmp"):
        SlotPool(isolation="user", readonly_paths=path).start()
