"""Remove directory trees that untrusted code has made. Standard library alone."""

from __future__ import annotations

import errno
import itertools
import os
import stat
from collections.abc import Iterator

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: str) -> None:
    """Remove the directory ``path`` and everything in it, whatever it holds.

    Works in constant stack, descriptors and path length for any depth: a directory found inside is first moved
    up to the top, so nothing is ever addressed deeper than two levels. Links are removed, never followed. No process
    that could write to the tree may be alive. A missing ``path`` is no error; safe to repeat.

    :raises OSError: if something can't be removed.
    """
    try:
        os.chmod(path, 0o700)
        top = os.open(path, _OPEN)
    except FileNotFoundError:
        return
    try:
        # Names for what is moved to the top: a slot can't have made one without reading this process's memory.
        names = (f".{os.urandom(8).hex()}-{n}" for n in itertools.count())
        pending = _clear(top)
        while pending:
            name = pending.pop()
            os.chmod(name, 0o700, dir_fd=top)
            inner = os.open(name, _OPEN, dir_fd=top)
            try:
                pending.extend(_move_up(_clear(inner), inner, top, names))
            finally:
                os.close(inner)
            _remove_dir(name, top, pending)
    finally:
        os.close(top)
    os.rmdir(path)


def _clear(directory: int) -> list[str]:
    """Unlink every file of ``directory``; the names of the directories in it."""
    inner = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                inner.append(entry.name)
            else:
                os.unlink(entry.name, dir_fd=directory)
    return inner


def _move_up(inner: list[str], directory: int, top: int, names: Iterator[str]) -> list[str]:
    moved = []
    for name in inner:
        os.chmod(name, 0o700, dir_fd=directory)  # moving a directory writes to it, as its `..` changes
        target = next(names)
        os.rename(name, target, src_dir_fd=directory, dst_dir_fd=top)
        moved.append(target)
    return moved


def _remove_dir(name: str, top: int, pending: list[str]) -> None:
    try:
        os.rmdir(name, dir_fd=top)
    except OSError as e:
        if e.errno != errno.ENOTEMPTY:
            raise
        pending.append(name)  # some file systems skip entries while others are unlinked: read it again


def remove_owned(directory: str, uid: int) -> None:
    """Remove what user ``uid`` owns directly in the shared ``directory`` (``/tmp``, ``/dev/shm``)."""
    try:
        entries = os.scandir(directory)
    except FileNotFoundError:
        return
    with entries:
        for entry in entries:
            try:
                info = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if info.st_uid != uid:
                continue
            if stat.S_ISDIR(info.st_mode):
                remove_tree(entry.path)
            else:
                os.unlink(entry.path)
