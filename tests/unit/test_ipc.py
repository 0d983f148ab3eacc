"""What users have left of System V IPC."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import PACKAGE, ROOT

# In an IPC namespace of its own: many objects of one user, few of another. What is left after each removal.
MANY = """
import ctypes, os
from slotpool.sandbox.ipc import IpcObjects

libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x08000000) == 0  # CLONE_NEWIPC

def make(uid, count):
    os.seteuid(uid)
    for _ in range(count):
        assert libc.msgget(0, 0o1600) >= 0 and libc.semget(0, 1, 0o1600) >= 0 and libc.shmget(0, 4096, 0o1600) >= 0
    os.seteuid(0)

def left():
    return [len(open(f"/proc/sysvipc/{kind}").readlines()) - 1 for kind in ("msg", "sem", "shm")]

objects = IpcObjects()
objects.remove(3_000_001)
make(3_000_001, 150)
make(3_000_002, 2)
make(3_000_001, 50)
print(left())
for uid in (3_000_003, 3_000_001, 3_000_002):
    objects.remove(uid)
    print(left())
make(3_000_001, 1)
objects.remove(3_000_001)
print(left())
"""


@pytest.mark.skipif(not ROOT, reason="only root may be another user")
def test_those_of_one_user_are_removed_however_many_there_are() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MANY], env={**os.environ, "PYTHONPATH": PACKAGE}, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.splitlines() == [str([n] * 3) for n in (202, 202, 2, 0, 0)], done.stderr
