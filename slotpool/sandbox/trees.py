"""Remove directory trees that untrusted code has made. Standard library alone."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Iterable, Iterator

_DIRECTORY = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_PENDING = 10_000  # directories that are known and not removed yet
_MOST_ENTRIES = 20_000  # looked at in a shared directory


def remove_tree(path: str) -> None:
    """Remove the directory ``path`` and everything in it, whatever it holds.

    Works in constant stack, descriptors and path length for any depth, and in constant memory for any number of entries: a
    directory found inside is first moved up to the top, so nothing is ever addressed deeper than two levels. Links are removed,
    never followed, even if somebody changes the tree meanwhile. A missing ``path`` is no error; safe to repeat.

    :raises OSError: if something can't be removed.
    """
    directory, name = os.path.split(path.rstrip("/"))
    with _opened(directory or ".") as parent:
        if parent is not None:
            _remove(name, parent)


def empty_trees(directory: str, names: Iterable[str]) -> None:
    """The same for these directories in ``directory``, but they stay themselves, maybe with another mode. Seen to be empty when
    this returns, those that are there.

    Where there is nothing it takes a tenth of the time: to remove a directory is much work for a file system, ext4 say.

    :raises OSError: if something can't be removed.
    """
    with _opened(directory) as parent:
        if parent is not None:
            for name in names:
                if not _is_empty(name, parent):
                    _empty(name, parent)


@contextlib.contextmanager
def _opened(directory: str) -> Iterator[int | None]:
    """None if it is not there."""
    try:
        fd = os.open(directory, os.O_RDONLY | _DIRECTORY & ~os.O_NOFOLLOW)
    except FileNotFoundError:
        yield None
        return
    try:
        yield fd
    finally:
        os.close(fd)


def _is_empty(name: str, parent: int) -> bool:
    """Whether that is so for certain, which includes that it is not there."""
    try:
        directory = os.open(name, os.O_RDONLY | _DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        return True
    except PermissionError:
        return False
    try:
        with os.scandir(directory) as entries:
            return next(entries, None) is None
    finally:
        os.close(directory)


def _remove(name: str, parent: int) -> None:
    if _empty(name, parent):
        os.rmdir(name, dir_fd=parent)


def _empty(name: str, parent: int) -> bool:
    """Whether there is such a directory."""
    try:
        top = _open(name, parent)
    except FileNotFoundError:
        return False
    try:
        # Names for what is moved to the top: a slot can't have made one without reading this process's memory.
        names = (f".{os.urandom(8).hex()}-{n}" for n in itertools.count())
        while pending := _clear(top):
            while pending:
                inner_name = pending.pop()
                inner = _open(inner_name, top)
                try:
                    _move_up(_clear(inner), inner, top, names)
                finally:
                    os.close(inner)
                _is_removed(inner_name, top)  # else some are left in it, and it comes up again
    finally:
        os.close(top)
    return True


def _open(name: str, parent: int) -> int:
    """Open a directory and make it the owner's alone, whatever its mode was."""
    try:
        fd = os.open(name, os.O_RDONLY | _DIRECTORY, dir_fd=parent)
    except PermissionError:
        handle = os.open(name, os.O_PATH | _DIRECTORY, dir_fd=parent)
        try:
            os.chmod(f"/proc/self/fd/{handle}", 0o700)
        finally:
            os.close(handle)
        fd = os.open(name, os.O_RDONLY | _DIRECTORY, dir_fd=parent)
    try:
        os.fchmod(fd, 0o700)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _clear(directory: int) -> list[str]:
    """Remove every file and empty directory of ``directory``; the names of what else is in it, or some of them if they are
    many.
    """
    inner: list[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.name, dir_fd=directory)
            elif not _is_removed(entry.name, directory):
                inner.append(entry.name)
                if len(inner) == _MOST_PENDING:
                    break
    return inner


def _is_removed(name: str, parent: int) -> bool:
    try:
        os.rmdir(name, dir_fd=parent)
    except OSError as e:
        if e.errno != errno.ENOTEMPTY:
            raise
        return False
    return True


def _move_up(inner: list[str], directory: int, top: int, names: Iterator[str]) -> None:
    for name in inner:
        os.close(_open(name, directory))  # moving a directory writes to it, as its `..` changes
        os.rename(name, next(names), src_dir_fd=directory, dst_dir_fd=top)


def remove_owned(directory: str, uid: int) -> None:
    """Remove what user ``uid`` owns in the shared ``directory`` (``/tmp``, ``/dev/shm``), and in the directories in it that
    everybody may write to.

    Others may use the directory meanwhile. Gives up quietly after ``_MOST_ENTRIES``: what is left then belongs to a user
    that no lease has for a long time.
    """
    pending: list[int] = []
    budget = _MOST_ENTRIES
    try:
        pending.append(os.open(directory, os.O_RDONLY | _DIRECTORY & ~os.O_NOFOLLOW))  # it may be a link itself, /var/tmp say
        while pending:
            fd = pending.pop()
            try:
                budget -= _remove_owned_entries(fd, uid, pending, budget)
            finally:
                os.close(fd)
    except FileNotFoundError:
        pass
    finally:
        for fd in pending:
            os.close(fd)


def _remove_owned_entries(directory: int, uid: int, pending: list[int], budget: int) -> int:
    seen = 0
    with os.scandir(directory) as entries:
        for entry in itertools.islice(entries, max(0, budget)):
            seen += 1
            try:
                info = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(info.st_mode):
                    if info.st_uid == uid:
                        _remove(entry.name, directory)
                    elif info.st_mode & stat.S_IWOTH and len(pending) < 500:
                        pending.append(os.open(entry.name, os.O_RDONLY | _DIRECTORY, dir_fd=directory))
                elif info.st_uid == uid:
                    os.unlink(entry.name, dir_fd=directory)
            except (FileNotFoundError, PermissionError, NotADirectoryError):  # its owner was quicker
                continue
    return seen
