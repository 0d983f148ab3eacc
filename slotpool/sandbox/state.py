"""A server's directory on this machine: made, locked while it is in use, and swept up if its owners are gone."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import stat
import tempfile
from collections.abc import Iterator

from ..errors import StartFailed
from . import trees

log = logging.getLogger(__name__)

_LOCK = "lock"
_PREFIX = "s-"
_TRIES = 50
_LONGEST = 107 - len("/s-12345678/http.sock")  # sun_path in unix(7), less what comes below


class StateDirectory:
    """A fresh directory below ``parent``, default ``slotpool-UID`` in the system's directory for temporary files.

    Its lock is held by every process that has :attr:`lock` open; a directory that nobody holds is removed by the next
    server of the same user.
    """

    def __init__(self, parent: str | None = None) -> None:
        # Slots of their own users must be able to pass through to their workspaces, but not to list what is there.
        mode = 0o711 if os.geteuid() == 0 else 0o700
        self._shared = parent is None
        parent = parent or os.path.join(tempfile.gettempdir(), f"slotpool-{os.geteuid()}")
        for _ in range(_TRIES):
            try:
                self._make(parent, mode)
                return
            except FileNotFoundError:  # the last server of before has just removed the parent directory
                continue
        raise StartFailed(f"{parent} is removed again and again while a server starts; what does that?")

    def _make(self, parent: str, mode: int) -> None:
        try:
            os.makedirs(parent, mode, exist_ok=True)
        except OSError as e:
            if isinstance(e, FileExistsError) and stat.S_ISDIR(os.stat(parent).st_mode):
                raise FileNotFoundError(errno.ENOENT, "it was removed, and made anew, just then", parent) from e
            raise StartFailed(f"the directory for workspaces can't be made: {e}") from e
        info = os.lstat(parent)
        if self._shared:
            if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
                raise StartFailed(
                    f"{parent} is not a directory of user {os.geteuid()}; remove it or set TMPDIR to another place"
                )
            os.chmod(parent, mode)
        if len(os.fsencode(parent)) > _LONGEST:
            raise StartFailed(f"the path of the directory for workspaces is too long for a Unix socket in it: {parent}")
        self._parent = parent
        _sweep(parent)
        with _settled(parent) as fd:
            name = f"{_PREFIX}{secrets.token_hex(4)}"
            os.mkdir(name, 0o700, dir_fd=fd)  # not by its path, which may be another directory's again by now
            self.path = os.path.join(parent, name)
            os.chmod(self.path, mode)
            self.lock = _lock(self.path, os.O_CREAT)

    def release(self) -> None:
        """Let go of the lock. The nursery, which has it too, removes the directory."""
        os.close(self.lock)

    def tidy(self) -> None:
        """Remove what is left if the nursery was killed, and the parent directory, if it is the default one and empty then."""
        try:
            trees.remove_tree(self.path)
        except OSError as e:
            log.warning("%s can't be removed: %s", self.path, e)
        if not self._shared:
            return
        try:
            os.rmdir(self._parent)
        except OSError:
            pass


@contextlib.contextmanager
def _settled(parent: str) -> Iterator[int]:
    """Let no other server make a directory, or take one that is just being made for a left one; a descriptor of the parent.

    :raises FileNotFoundError: the parent directory was removed.
    """
    fd = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        if not os.path.samestat(os.stat(parent), os.fstat(fd)):
            raise FileNotFoundError(errno.ENOENT, "it was removed and made anew", parent)
        yield fd
    finally:
        os.close(fd)


def _lock(directory: str, flags: int = 0) -> int:
    fd = os.open(os.path.join(directory, _LOCK), os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _sweep(parent: str) -> None:
    for name in os.listdir(parent):
        directory = os.path.join(parent, name)
        try:
            if not name.startswith(_PREFIX) or os.lstat(directory).st_uid != os.geteuid():
                continue
            with _settled(parent):
                fd = _lock(directory, os.O_CREAT)  # one without a lock was left half made, or half removed
        except OSError:  # in use, or removed
            continue
        try:
            trees.remove_tree(directory)
        except OSError as e:
            log.warning("what a server has left in %s can't be removed: %s", directory, e)
        finally:
            os.close(fd)
