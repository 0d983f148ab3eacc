"""A root that may not do all that root may: the strongest isolation that works there is found, and slots end clean."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest
from conftest import ROOT

CLONE_NEWUSER = 0x10000000  # unshare(2)

USE = """
from slotpool import SlotPool
with SlotPool(slots_per_container=2, max_containers=1) as pool:
    for _ in range(3):  # the later ones are made beside others, and once one has ended
        with pool.slot() as s:
            result = s.bash("sleep 60 & echo here")
            print(result.output.strip(), result.metadata["isolation"], flush=True)
"""
# It is told when its ids are mapped; and then is root of what it has put itself into.
IN_NAMESPACE = f"""
import ctypes
assert ctypes.CDLL(None).unshare({CLONE_NEWUSER}) == 0
print("there", flush=True)
input()
{USE}
"""


@pytest.mark.skipif(not ROOT, reason="root's own rights are taken away")
def test_root_that_is_no_administrator_makes_do_with_users() -> None:
    command = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", sys.executable, "-c", USE]
    used = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert used.stdout.splitlines() == ["here user"] * 3, used.stderr


@pytest.mark.skipif(not ROOT, reason="maps ids of root's")
def test_root_of_a_user_namespace_that_has_no_pid_namespace_of_its_own_has_bwrap() -> None:
    command = [sys.executable, "-c", IN_NAMESPACE]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True) as used:
        try:
            assert used.stdout is not None
            assert used.stdout.readline() == "there\n"
            for name in ("uid_map", "gid_map"):
                _, _, count = Path(f"/proc/self/{name}").read_text().split()[:3]
                Path(f"/proc/{used.pid}/{name}").write_text(f"0 0 {count}\n")
            out, err = used.communicate("\n", timeout=60)
        finally:
            used.kill()
    assert out.splitlines() == ["here bwrap"] * 3, err
