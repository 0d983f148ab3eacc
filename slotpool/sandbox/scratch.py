"""What users have left in shared directories, such as ``/tmp``. Standard library alone."""

from __future__ import annotations

import os
import stat
import time

_FEW_ENTRIES = 500
_SETTLED = 100_000_000  # nanoseconds after which a change has another time than the one before; the clock may tick at 100 Hz


class Scratch:
    """A shared directory, and what was seen in it and in the directories in it that everybody may write to.

    It is looked through again only if one of the directories there has changed since: what is made in one, moved or linked
    there changes its ctime, which nobody can set back.
    """

    def __init__(self, directory: str) -> None:
        self._top = f"{directory}/"  # so that it is followed if it is a link itself
        self._directories: dict[str, tuple[int, ...]] = {}  # each with what tells a change; none if that is not certain
        self._owners: set[int] = set()

    def may_have(self, uid: int) -> bool:
        """Whether something of that user may be there; False only if that is certain."""
        try:
            known = self._is_known() or self._look()
        except FileNotFoundError:  # while it was looked through, unless it is the directory itself
            return os.path.exists(self._top)
        except OSError:
            return True
        return not known or uid in self._owners

    def _is_known(self) -> bool:
        try:
            return bool(self._directories) and all(_stamp(os.lstat(path)) == seen for path, seen in self._directories.items())
        except FileNotFoundError:
            return False

    def _look(self) -> bool:
        """Whether it could be seen whole at little cost."""
        began = time.time_ns()
        self._directories = {}
        self._owners = set()
        directories = {self._top: _stamp(os.lstat(self._top))}
        pending = [self._top]
        entries_left = _FEW_ENTRIES
        while pending:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    entries_left -= 1
                    if entries_left <= 0:
                        return False
                    info = entry.stat(follow_symlinks=False)
                    self._owners.add(info.st_uid)
                    if stat.S_ISDIR(info.st_mode):
                        directories[entry.path] = _stamp(info)
                        if info.st_mode & stat.S_IWOTH:
                            pending.append(entry.path)
        if all(changed < began - _SETTLED for *_, changed in directories.values()):
            self._directories = directories
        return True


def _stamp(info: os.stat_result) -> tuple[int, ...]:
    return info.st_dev, info.st_ino, info.st_ctime_ns
