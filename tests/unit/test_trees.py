"""Removing what untrusted code has left: any depth, any mode, any name, and nothing outside."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import stat
import tempfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from slotpool.sandbox import trees
from slotpool.sandbox.trees import empty_trees, remove_owned, remove_tree

ROOT = os.geteuid() == 0
NOBODY = 65534


@contextlib.contextmanager
def ordinary_user() -> Iterator[None]:
    """Be a user whom modes stop; root is not."""
    if not ROOT:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that the ordinary user can reach and write to, which pytest's own are not."""
    directory = tempfile.mkdtemp(prefix="test-slotpool-trees-")
    if ROOT:
        os.chown(directory, NOBODY, NOBODY)
    yield Path(directory)
    shutil.rmtree(directory)


def nest(path: Path, depth: int, name: str) -> None:
    """Directories in directories, deeper than a path can be long."""
    path.mkdir()
    at = os.open(path, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(name, dir_fd=at)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=at))
        inner = os.open(name, os.O_RDONLY, dir_fd=at)
        os.close(at)
        at = inner
    os.close(at)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_files_and_directories_are_removed_with_the_tree(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / "tree" / f"d{i % 4}" / f"e{i}").mkdir(parents=True)
        (tmp_path / "tree" / f"d{i % 4}" / f"e{i}" / "file").write_text("x")
    (tmp_path / "beside").write_text("x")
    remove_tree(str(tmp_path / "tree"))
    assert os.listdir(tmp_path) == ["beside"]


def test_a_tree_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    remove_tree(str(tmp_path / "none"))
    (tmp_path / "tree").mkdir()
    remove_tree(str(tmp_path / "tree"))
    remove_tree(str(tmp_path / "tree"))


def test_a_path_that_ends_with_a_slash_is_the_same_tree(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    remove_tree(f"{tmp_path}/tree/")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", [0o700, 0o000, 0o1777])
def test_an_emptied_directory_stays(tmp_path: Path, mode: int) -> None:
    tree = tmp_path / "tree"
    (tree / "d" / "e").mkdir(parents=True)
    (tree / "d" / "file").touch()
    (tree / "link").symlink_to(tmp_path)
    before = descriptors()
    for _ in range(2):  # the second time there is nothing to be removed
        tree.chmod(mode)
        empty_trees(str(tmp_path), ("other", "tree"))
        tree.chmod(0o700)
        assert os.listdir(tree) == []
    assert os.listdir(tmp_path) == ["tree"]
    assert descriptors() == before


def test_to_empty_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    empty_trees(str(tmp_path), ["none"])
    empty_trees(str(tmp_path / "none"), ["within"])
    assert os.listdir(tmp_path) == []


def test_a_link_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(NotADirectoryError):
        empty_trees(str(tmp_path), ["link"])
    assert os.listdir(tmp_path / "real") == ["file"]


def test_depth_costs_no_stack_no_descriptors_and_no_path_length(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    nest(tree, 1600, "a-name-so-long-that-the-path-is-far-beyond-what-a-system-call-takes")
    before = descriptors()
    remove_tree(str(tree))
    assert not tree.exists()
    assert descriptors() == before


def test_width_is_no_matter(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for i in range(300):
        (tree / "inner" / f"d{i}" / "e").mkdir(parents=True)
        (tree / "inner" / f"f{i}").touch()
    remove_tree(str(tree))
    assert not tree.exists()


def test_width_costs_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "_MOST_PENDING", 20)
    for at in (tmp_path / "tree", tmp_path / "tree" / "inner"):
        for i in range(1500):
            (at / f"{i:0200}").mkdir(parents=True)
            (at / f"{i:0200}" / "file").touch()
    tracemalloc.start()
    try:
        remove_tree(str(tmp_path / "tree"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert os.listdir(tmp_path) == []
    assert peak < 100_000


@pytest.mark.parametrize("mode", [0o000, 0o100, 0o400, 0o500, 0o300, 0o7000])
def test_modes_keep_nobody_from_removing_what_is_theirs(place: Path, mode: int) -> None:
    with ordinary_user():
        inner = place / "tree" / "a" / "b"
        inner.mkdir(parents=True)
        (inner / "file").write_text("x")
        (inner / "file").chmod(0o000)
        for path in (inner, inner.parent, place / "tree"):
            path.chmod(mode)
        if not mode & 0o400:
            with pytest.raises(PermissionError):  # else this user would prove nothing
                os.listdir(place / "tree")
        remove_tree(str(place / "tree"))
        assert os.listdir(place) == []


def test_links_are_removed_and_never_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "d").mkdir(parents=True)
    (outside / "d" / "file").write_text("x")
    outside.chmod(0o755)
    (outside / "d").chmod(0o751)
    tree = tmp_path / "tree"
    (tree / "inner").mkdir(parents=True)
    for at in (tree, tree / "inner"):
        (at / "to-directory").symlink_to(outside / "d")
        (at / "to-file").symlink_to(outside / "d" / "file")
        (at / "to-root").symlink_to("/")
        (at / "to-nothing").symlink_to("nowhere")
        (at / "to-itself").symlink_to("to-itself")
        (at / "up").symlink_to("..")
    remove_tree(str(tree))
    assert not tree.exists()
    assert (outside / "d" / "file").read_text() == "x"
    assert stat.S_IMODE((outside / "d").stat().st_mode) == 0o751


def test_a_tree_that_is_a_link_leaves_what_it_leads_to_as_it_was(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").touch()
    outside.chmod(0o751)
    (tmp_path / "tree").symlink_to(outside)
    with contextlib.suppress(OSError):  # refused or removed, either is fine
        remove_tree(str(tmp_path / "tree"))
    assert os.listdir(outside) == ["file"]
    assert stat.S_IMODE(outside.stat().st_mode) == 0o751


def test_a_hard_link_leaves_the_other_name(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "kept").write_text("x")
    os.link(tmp_path / "kept", tmp_path / "tree" / "linked")
    remove_tree(str(tmp_path / "tree"))
    assert (tmp_path / "kept").read_text() == "x"


def test_sockets_and_pipes_are_removed_without_being_opened(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    os.mkfifo(tree / "fifo")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tree / "sock"))
        remove_tree(str(tree))
    assert not tree.exists()


@pytest.mark.parametrize(
    "name",
    [
        b"\xff\xfe",
        b"a\nb",
        b" ",
        b"-rf",
        b"*",
        b"'\"$(x)",
        b"\x01\x7f",
        b"x" * 255,
        ("\u00e9" * 127).encode(),
        b"...",
        b".0-0",
        b"\\",
    ],
)
def test_odd_names_are_names_like_others(tmp_path: Path, name: bytes) -> None:
    tree = os.fsencode(tmp_path / "tree")
    os.makedirs(os.path.join(tree, name, name, name))
    with open(os.path.join(tree, name, name, b"f"), "w"):
        pass
    remove_tree(os.fsdecode(tree))
    assert os.listdir(tmp_path) == []


def test_what_cannot_be_removed_is_an_error_and_not_passed_over(place: Path) -> None:
    if not ROOT:
        pytest.skip("needs root, to make something that the user may not remove")
    theirs = place / "tree" / "theirs"
    theirs.mkdir(parents=True)
    (theirs / "file").touch()
    os.chown(place / "tree", NOBODY, NOBODY)
    before = descriptors()
    with ordinary_user(), pytest.raises(PermissionError):
        remove_tree(str(place / "tree"))
    assert descriptors() == before
    remove_tree(str(place / "tree"))  # safe to repeat, by who may
    assert os.listdir(place) == []


def test_of_a_shared_directory_only_one_users_things_are_removed(tmp_path: Path) -> None:
    if not ROOT:
        pytest.skip("needs root, to make files of several users")
    for uid in (1001, 1002):
        (tmp_path / f"{uid}" / "inner").mkdir(parents=True)
        (tmp_path / f"{uid}" / "inner" / "file").touch()
        (tmp_path / f"{uid}" / "inner").chmod(0o000)
        (tmp_path / f"{uid}.file").touch()
        (tmp_path / f"{uid}.link").symlink_to(tmp_path / "root")
        os.mkfifo(tmp_path / f"{uid}.fifo")
        for name in (f"{uid}", f"{uid}.file", f"{uid}.link", f"{uid}.fifo"):
            os.chown(tmp_path / name, uid, uid, follow_symlinks=False)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "file").touch()
    remove_owned(str(tmp_path), 1001)
    assert sorted(os.listdir(tmp_path)) == ["1002", "1002.fifo", "1002.file", "1002.link", "root"]
    assert (tmp_path / "1002" / "inner" / "file").exists()
    assert (tmp_path / "root" / "file").exists()


def test_what_a_user_has_put_into_another_ones_open_directory_goes_too(tmp_path: Path) -> None:
    if not ROOT:
        pytest.skip("needs root, to make files of several users")
    (tmp_path / "open" / "theirs" / "inner").mkdir(parents=True)
    (tmp_path / "open" / "kept").touch()
    os.chown(tmp_path / "open" / "theirs", 1001, 1001)
    (tmp_path / "open").chmod(0o1777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    remove_owned(str(tmp_path), 1001)
    assert os.listdir(tmp_path / "open") == ["kept"]
    assert sorted(os.listdir(tmp_path)) == ["link", "open"]


def test_a_shared_directory_itself_stays(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    remove_owned(str(tmp_path), os.geteuid())
    assert tmp_path.is_dir()
    assert os.listdir(tmp_path) == []


def test_a_shared_directory_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "shared")
    remove_owned(str(tmp_path / "link"), os.geteuid())
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_shared_directory_that_is_not_there_is_no_error(tmp_path: Path) -> None:
    remove_owned(str(tmp_path / "none"), 1001)


def test_what_has_gone_with_its_parent_directory_is_no_error(place: Path) -> None:
    remove_tree(str(place / "gone" / "a"))
    assert list(place.iterdir()) == []
