"""Whether a user has left something in a shared directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Callable

import pytest
from conftest import ROOT, wait_until

from slotpool.sandbox import scratch
from slotpool.sandbox.scratch import Scratch

US, OTHER = os.geteuid(), 70_000


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_SETTLED", 0.1)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories that are listed."""
    listed: list[str] = []
    scandir = os.scandir

    def counted(path: str | int) -> object:
        if isinstance(path, str):  # else it is to be removed
            listed.append(os.path.basename(path.rstrip("/")))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counted)
    return listed


def settle(shared: Scratch, looks: list[str]) -> None:
    """Until it need not be listed any more."""

    def is_known() -> bool:
        looks.clear()
        shared.may_have(OTHER)
        return not looks

    assert wait_until(is_known)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "top"
    for directory, mode in ((top, 0o1777), (top / "open", 0o777), (top / "closed", 0o755), (top / "open" / "inner", 0o755)):
        directory.mkdir()
        directory.chmod(mode)
    return top


def test_what_does_not_change_is_not_listed_again(tree: Path, looks: list[str]) -> None:
    shared = Scratch(str(tree))
    assert not shared.may_have(OTHER)
    assert sorted(looks) == ["open", "top"]
    settle(shared, looks)
    assert shared.may_have(US)
    assert not shared.may_have(OTHER)
    assert looks == []


def _make(tree: Path) -> None:
    (tree / "file").touch()
    os.chown(tree / "file", OTHER, OTHER)


def _make_within(tree: Path) -> None:
    (tree / "open" / "file").touch()
    os.chown(tree / "open" / "file", OTHER, OTHER)


def _move(tree: Path) -> None:
    (tree.parent / "file").touch()
    os.chown(tree.parent / "file", OTHER, OTHER)
    (tree.parent / "file").rename(tree / "moved")


def _link(tree: Path) -> None:
    (tree.parent / "file").touch()
    os.chown(tree.parent / "file", OTHER, OTHER)
    os.link(tree.parent / "file", tree / "open" / "linked")


def _open(tree: Path) -> None:
    (tree / "closed" / "file").touch()
    os.chown(tree / "closed" / "file", OTHER, OTHER)
    (tree / "closed").chmod(0o777)


def _open_within(tree: Path) -> None:
    (tree / "open" / "inner" / "file").touch()
    os.chown(tree / "open" / "inner" / "file", OTHER, OTHER)
    (tree / "open" / "inner").chmod(0o777)


def _replace(tree: Path) -> None:
    (tree / "closed").rmdir()
    (tree / "closed").mkdir()
    os.chown(tree / "closed", OTHER, OTHER)


def _set_back(tree: Path) -> None:
    before = os.stat(tree)
    _make(tree)
    os.utime(tree, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.skipif(not ROOT, reason="only root can make files that are another's")
@pytest.mark.parametrize("change", [_make, _make_within, _move, _link, _open, _open_within, _replace, _set_back])
def test_a_change_is_seen(tree: Path, looks: list[str], change: Callable[[Path], None]) -> None:
    shared = Scratch(str(tree))
    settle(shared, looks)
    change(tree)
    assert shared.may_have(OTHER)
    shutil.rmtree(tree)
    tree.mkdir()
    assert not shared.may_have(OTHER)


@pytest.mark.skipif(not ROOT, reason="only root can make files that are another's")
def test_what_comes_at_the_moment_of_a_look_is_seen(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tick = 80_000_000  # newer kernels tell changes within one apart, on most file systems
    monkeypatch.setattr(scratch, "_stamp", lambda info: (info.st_dev, info.st_ino, info.st_ctime_ns // tick * tick))
    for i in range(100):
        shared = Scratch(str(tree))
        (tree / "ours").touch()  # so that the directory has the time of this tick
        for _ in range(3):
            assert not shared.may_have(OTHER)
        _make(tree)
        assert shared.may_have(OTHER), i
        (tree / "file").unlink()
        (tree / "ours").unlink()


def test_where_there_is_much_it_is_not_certain(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_FEW_ENTRIES", 10)
    shared = Scratch(str(tree))
    assert not shared.may_have(OTHER)
    for i in range(10):
        (tree / str(i)).touch()
    assert shared.may_have(OTHER)
    (tree / "1").unlink()
    for i in range(2, 10):
        (tree / str(i)).unlink()
    assert not shared.may_have(OTHER)


@pytest.mark.skipif(not ROOT, reason="only root can make files that are another's")
def test_a_link_to_a_directory_is_followed(tree: Path, looks: list[str]) -> None:
    (tree.parent / "link").symlink_to(tree)
    shared = Scratch(str(tree.parent / "link"))
    settle(shared, looks)
    _make(tree)
    assert shared.may_have(OTHER)


def test_a_directory_that_is_not_there_has_nothing(tmp_path: Path) -> None:
    assert not Scratch(str(tmp_path / "none")).may_have(OTHER)
