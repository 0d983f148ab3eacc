"""Whether a user has left something in a shared directory."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
from pathlib import Path
from typing import Callable

import pytest
from conftest import ROOT

from slotpool.sandbox import linux, scratch
from slotpool.sandbox.scratch import Scratch

US, OTHER = os.geteuid(), 70_000


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


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    top = tmp_path / "top"
    for directory, mode in ((top, 0o1777), (top / "open", 0o777), (top / "closed", 0o755), (top / "open" / "inner", 0o755)):
        directory.mkdir()
        directory.chmod(mode)
    return top


@pytest.fixture
def shared(tree: Path, looks: list[str]) -> Scratch:
    """What is known of ``tree``, which was looked through already."""
    known = Scratch([str(tree)])
    known.may_have(OTHER)
    looks.clear()
    return known


def test_what_does_not_change_is_listed_once(tree: Path, looks: list[str]) -> None:
    shared = Scratch([str(tree)])
    assert not shared.may_have(OTHER)
    assert sorted(looks) == ["open", "top"]
    assert shared.may_have(US)
    assert not shared.may_have(OTHER)
    assert sorted(looks) == ["open", "top"]


def test_what_only_goes_is_no_reason_to_look(tree: Path, shared: Scratch, looks: list[str]) -> None:
    (tree / "closed").rmdir()
    (tree / "open" / "inner").rmdir()
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


def _give_away(tree: Path) -> None:
    os.chown(tree / "closed", OTHER, OTHER)


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


def _replace_the_top(tree: Path) -> None:
    tree.rename(tree.with_name("old"))
    tree.mkdir()
    _make(tree)


def _make_very_many(tree: Path) -> None:
    for _ in range(20_000):  # more than the kernel tells of
        os.rename(tree / "open", tree / "opened")
        os.rename(tree / "opened", tree / "open")
    _make_within(tree)


@pytest.mark.skipif(not ROOT, reason="only root can make files that are another's")
@pytest.mark.parametrize(
    "change",
    [_make, _make_within, _move, _link, _give_away, _open, _open_within, _replace, _replace_the_top, _make_very_many],
)
def test_a_change_is_seen(tree: Path, shared: Scratch, change: Callable[[Path], None]) -> None:
    change(tree)
    assert shared.may_have(OTHER)
    shutil.rmtree(tree)
    tree.mkdir()
    assert not shared.may_have(OTHER)


@pytest.mark.skipif(not ROOT, reason="only root can mount")
def test_what_is_mounted_there_is_seen(tree: Path, shared: Scratch) -> None:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=777", "none", tree / "open"], capture_output=True)
    if mount.returncode:
        pytest.skip("this container's root may not mount")
    try:
        assert not shared.may_have(OTHER)
        _make_within(tree)
        assert shared.may_have(OTHER)
    finally:
        subprocess.run(["umount", tree / "open"], check=True)
    assert not shared.may_have(OTHER)


@pytest.mark.skipif(not ROOT, reason="only root can make files that are another's")
def test_what_comes_amid_a_look_is_seen_by_the_next(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Scratch([str(tree)])
    scandir = os.scandir

    def amid(path: str) -> object:
        entries = list(scandir(path))
        if path.endswith("open"):  # the other has been listed by then
            monkeypatch.undo()
            _make(tree)
        return contextlib.nullcontext(entries)

    monkeypatch.setattr(os, "scandir", amid)
    shared.may_have(OTHER)
    assert shared.may_have(OTHER)
    (tree / "file").unlink()
    (tree / "open" / "inner" / "file").touch()  # which is no reason to look
    assert shared.may_have(OTHER)


@pytest.mark.parametrize("kind", ["_FEW_ENTRIES", "_FEW_DIRECTORIES"])
def test_where_there_is_much_it_is_not_certain(tree: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(scratch, kind, 10)
    shared = Scratch([str(tree)])
    assert not shared.may_have(OTHER)
    for i in range(10):
        (tree / str(i)).mkdir()
        (tree / str(i)).chmod(0o777)
    assert shared.may_have(OTHER)
    for i in range(10):
        (tree / str(i)).rmdir()
    assert not shared.may_have(OTHER)


def _watches() -> int:
    found = 0
    for name in os.listdir("/proc/self/fdinfo"):
        with contextlib.suppress(FileNotFoundError):
            found += Path("/proc/self/fdinfo", name).read_text().count("inotify wd:")
    return found


def test_what_is_watched_is_bounded(tree: Path, tmp_path: Path) -> None:
    """Whoever moves what is watched away keeps its watch."""
    shared = Scratch([str(tree)])
    before = _watches()
    most = 0
    for i in range(20):
        for j in range(40):
            (tree / f"{i}-{j}").mkdir()
            (tree / f"{i}-{j}").chmod(0o777)
        shared.may_have(OTHER)
        most = max(most, _watches() - before)
        for j in range(40):
            (tree / f"{i}-{j}").rename(tmp_path / f"{i}-{j}")
    assert 40 < most <= scratch._MOST_WATCHES + scratch._FEW_DIRECTORIES


@pytest.mark.skipif(not ROOT, reason="only root can make files that are another's")
@pytest.mark.parametrize("missing", ["inotify_init", "inotify_add_watch"])
def test_where_nothing_can_be_watched_one_looks_each_time(tree: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    def refused(*_: object) -> int:
        raise OSError(errno.ENOSPC, "as many as may be")

    monkeypatch.setattr(linux, missing, refused)
    shared = Scratch([str(tree)])
    assert not shared.may_have(OTHER)
    _make(tree)
    assert shared.may_have(OTHER)
    (tree / "file").unlink()
    assert not shared.may_have(OTHER)
    monkeypatch.undo()  # there is room again
    assert not shared.may_have(OTHER)
    _make_within(tree)
    assert shared.may_have(OTHER)


@pytest.mark.skipif(not ROOT, reason="only root can make files that are another's")
def test_a_link_to_a_directory_is_followed(tree: Path) -> None:
    (tree.parent / "link").symlink_to(tree)
    shared = Scratch([str(tree.parent / "link")])
    assert not shared.may_have(OTHER)
    _make(tree)
    assert shared.may_have(OTHER)


@pytest.mark.skipif(not ROOT, reason="only root can make files that are another's")
def test_only_where_it_is_the_directory_is_named(tree: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    shared = Scratch([str(tree), str(other), str(tmp_path / "none")])
    assert shared.may_have(OTHER) == []
    _make(other)
    assert [Path(directory) for directory in shared.may_have(OTHER)] == [other]


@pytest.mark.skipif(not ROOT, reason="only root can make files that are another's")
def test_a_directory_that_is_not_there_has_nothing(tmp_path: Path) -> None:
    shared = Scratch([str(tmp_path / "none")])
    assert not shared.may_have(OTHER)
    (tmp_path / "none").mkdir()
    _make(tmp_path / "none")
    assert shared.may_have(OTHER)
