"""When a server looks at its memory again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slotpool.sandbox.cgroups import Memory
from slotpool.sandbox.relief import Relief

LIMIT = 4 << 30
USUAL = 0.1  # seconds


@pytest.fixture
def relief(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Relief:
    """Of a control group of version 2, or what it tells."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    (tmp_path / "memory.max").write_text(f"{LIMIT}\n")
    return Relief(Memory([str(tmp_path)], "memory.max", "memory.current", b"anon"))


def tell(group: Path, used: int, held: int) -> None:
    (group / "memory.current").write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon {held}\n")


def test_a_look_comes_the_sooner_the_less_room_there_is(tmp_path: Path, relief: Relief) -> None:
    tell(tmp_path, used=1 << 30, held=1 << 30)
    assert relief.look([]) == USUAL
    tell(tmp_path, used=LIMIT - (300 << 20), held=LIMIT - (300 << 20))
    nearer = relief.look([])
    assert nearer < USUAL
    tell(tmp_path, used=LIMIT - (110 << 20), held=LIMIT - (110 << 20))
    assert relief.look([]) < nearer


@pytest.mark.parametrize("room", [0, 50 << 20, 100 << 20, 200 << 20])
def test_memory_that_files_have_is_room(tmp_path: Path, relief: Relief, room: int) -> None:
    tell(tmp_path, used=LIMIT - room, held=1 << 30)
    assert relief.look([]) == USUAL


def test_a_group_that_is_full_of_what_no_slot_has_is_looked_at_as_usual(tmp_path: Path, relief: Relief) -> None:
    tell(tmp_path, used=LIMIT, held=LIMIT)
    assert relief.look([]) == USUAL
