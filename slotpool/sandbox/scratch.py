"""What users have left in shared directories, such as ``/tmp``. Standard library alone."""

from __future__ import annotations

import os
import stat
import time

_FEW_ENTRIES = 500
# Seconds after which a change has another time than one before, whoever's clock it is taken from, and however coarse: ext4 may
# keep whole seconds, others two.
_SETTLED = 2.5


class Scratch:
    """A shared directory, and what was seen in it and in the directories in it that everybody may write to.

    It is looked through again only if one of the directories there has changed since: what is made in one, moved or linked
    there changes its ctime, which nobody can set back. That is relied on once it was seen to be the same for a while, as a
    change amid a look, or right after one, may have the same time as one before.
    """

    def __init__(self, directory: str) -> None:
        self._top = f"{directory}/"  # so that it is followed if it is a link itself
        self._directories: dict[str, tuple[int, ...]] = {}  # each with what tells a change; none if that is not certain
        self._owners: set[int] = set()
        self._seen: dict[str, tuple[int, ...]] = {}  # the same, when it was looked through last
        self._since = 0.0  # that moment, or an earlier one at which it was seen like that

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
        began = time.monotonic()
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
        if directories != self._seen:
            self._seen, self._since = directories, time.monotonic()
        elif began - self._since > _SETTLED:
            self._directories = directories
        return True


def _stamp(info: os.stat_result) -> tuple[int, ...]:
    return info.st_dev, info.st_ino, info.st_ctime_ns
