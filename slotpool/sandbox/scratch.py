"""What users have left in shared directories, such as ``/tmp``. Standard library alone."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence

from .arrivals import Arrivals

_FEW_ENTRIES = 500
_FEW_DIRECTORIES = 50  # to look into
_MOST_WATCHES = 100  # that were begun, before one begins anew: they are of what all of root's programs may have together


class Scratch:
    """Shared directories, and whose things are in them and in the directories in them that everybody may write to.

    They are looked through again only if something may have come since, or if that can't be told. What another user moves
    amid a look, from a directory that was not looked through yet to one that was, is seen by the next.
    """

    def __init__(self, directories: Sequence[str]) -> None:
        self._directories = [f"{directory}/" for directory in directories]  # so that each is followed if it is a link itself
        self._identities: list[tuple[int, int] | None] = []  # of those that were looked through; None for what is not there
        self._owners: list[set[int] | None] = []  # of what is in each; None if that is not certain
        self._arrivals: Arrivals | None = None
        self._is_watched = False  # everything there, from before it was looked through
        self._is_known = False  # nothing has come since

    def may_have(self, uid: int) -> list[str]:
        """Those in which something of that user may be; the others have certainly nothing."""
        if not self._is_unchanged():
            self._look()
        pairs = zip(self._directories, self._owners)
        return [directory for directory, owners in pairs if owners is None or uid in owners]

    def _is_unchanged(self) -> bool:
        if self._has_come():
            self._is_known = False
        return self._is_known and self._identities == self._identify()

    def _has_come(self) -> bool:
        return self._arrivals is not None and self._arrivals.any()

    def _identify(self) -> list[tuple[int, int] | None]:
        return [_identity(directory) for directory in self._directories]

    def _look(self) -> None:
        if self._arrivals is not None and self._arrivals.begun > _MOST_WATCHES:
            self._arrivals.close()
            self._arrivals = None
        if self._arrivals is None:
            with contextlib.suppress(OSError):
                self._arrivals = Arrivals()
        self._is_watched = self._arrivals is not None
        self._identities = self._identify()
        self._owners = [self._owners_in(directory) for directory in self._directories]
        self._is_known = self._is_watched and None not in self._owners and not self._has_come()

    def _owners_in(self, top: str) -> set[int] | None:
        """None if that can't be seen, or not at little cost."""
        owners: set[int] = set()
        pending = [top]
        entries_left, directories_left = _FEW_ENTRIES, _FEW_DIRECTORIES
        while pending:
            directory = pending.pop()
            self._watch(directory)
            try:
                with os.scandir(directory) as entries:
                    for entry in entries:
                        entries_left -= 1
                        if entries_left <= 0:
                            return None
                        with contextlib.suppress(FileNotFoundError):
                            info = entry.stat(follow_symlinks=False)
                            owners.add(info.st_uid)
                            if stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_IWOTH:
                                directories_left -= 1
                                if directories_left <= 0:
                                    return None
                                pending.append(entry.path)
            except FileNotFoundError:
                pass
            except OSError:
                return None
        return owners

    def _watch(self, directory: str) -> None:
        try:
            if self._arrivals is not None:
                self._arrivals.watch(directory)
        except FileNotFoundError:
            pass
        except OSError:
            self._is_watched = False


def _identity(directory: str) -> tuple[int, int] | None:
    try:
        info = os.stat(directory)
    except OSError:
        return None
    return info.st_dev, info.st_ino
