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
