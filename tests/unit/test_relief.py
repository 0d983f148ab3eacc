"""When a server looks at its memory again."""

from __future__ import annotations

import os
from pathlib import Path

import attr
import pytest

from slotpool.sandbox.cgroups import Memory
from slotpool.sandbox.relief import Relief

LIMIT = 4 << 30
USUAL = 0.1  # seconds


@attr.s(auto_attribs=True)
class Group:
    """A control group of version 2, or what it tells."""

    directory: Path

    def tell(self, used: int, held: int) -> None:
        (self.directory / "memory.max").write_text(f"{LIMIT}\n")
        (self.directory / "memory.current").write_text(f"{used}\n")
        (self.directory / "memory.stat").write_text(f"anon {held}\n")


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Group:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    return Group(tmp_path)


@pytest.fixture
def relief(group: Group) -> Relief:
    return Relief(Memory([str(group.directory)], "memory.max", "memory.current", b"anon"))


def test_a_look_comes_the_sooner_the_less_room_there_is(group: Group, relief: Relief) -> None:
    group.tell(used=1 << 30, held=1 << 30)
    assert relief.look([]) == USUAL
    group.tell(used=LIMIT - (300 << 20), held=LIMIT - (300 << 20))
    nearer = relief.look([])
    assert nearer < USUAL
    group.tell(used=LIMIT - (110 << 20), held=LIMIT - (110 << 20))
    assert relief.look([]) < nearer


@pytest.mark.parametrize("room", [0, 50 << 20, 100 << 20, 200 << 20])
def test_memory_that_files_have_is_room(group: Group, relief: Relief, room: int) -> None:
    group.tell(used=LIMIT - room, held=1 << 30)
    assert relief.look([]) == USUAL


def test_a_group_that_is_full_of_what_no_slot_has_is_looked_at_as_usual(group: Group, relief: Relief) -> None:
    group.tell(used=LIMIT, held=LIMIT)
    assert relief.look([]) == USUAL
