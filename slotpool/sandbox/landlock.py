"""Landlock: confine this process, and all it will start, to some paths. Standard library alone.

After the kernel's ``Documentation/userspace-api/landlock.rst``. The kernel says which version of the interface it
has; what an older one lacks is left out, and :func:`abi` tells which it is.
"""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable

from . import linux

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_TRUNCATE = 1 << 14
_IOCTL_DEV = 1 << 15
# How many access rights, from bit 0 on, each version of the interface knows.
_RIGHTS_BY_ABI = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}

_SCOPE_ABSTRACT_UNIX_SOCKET, _SCOPE_SIGNAL = 1 << 0, 1 << 1

_FOR_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV
READ = _EXECUTE | _READ_FILE | _READ_DIR
DEVICE = _READ_FILE | _WRITE_FILE | _TRUNCATE | _IOCTL_DEV


class _RulesetAttr(ctypes.Structure):
    _fields_ = [
        ("handled_access_fs", ctypes.c_uint64),
        ("handled_access_net", ctypes.c_uint64),
        ("scoped", ctypes.c_uint64),
    ]


class _PathBeneathAttr(ctypes.Structure):
    _pack_ = 1
    _fields_ = [("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32)]


def abi() -> int:
    """The version of Landlock that this kernel has; 0 for none."""
    try:
        return linux.syscall(linux.SYS_landlock_create_ruleset, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return 0


def _all_rights(version: int) -> int:
    return (1 << _RIGHTS_BY_ABI[min(version, max(_RIGHTS_BY_ABI))]) - 1


def restrict(read: Iterable[str], write: Iterable[str], scratch: Iterable[str], devices: Iterable[str]) -> None:
    """Confine the calling thread, for good, to these paths. Paths that don't exist are passed over.

    :param read: may be read and executed from, with everything below.
    :param write: everything is allowed below.
    :param scratch: everything but listing: the directories that all users share, such as ``/tmp``.
    :param devices: may be read and written.
    :raises OSError: if the kernel refuses; nothing is confined then.
    """
    version = abi()
    everything = _all_rights(version)
    attr = _RulesetAttr(everything, 0, _SCOPE_ABSTRACT_UNIX_SOCKET | _SCOPE_SIGNAL if version >= 6 else 0)
    # A kernel refuses a structure longer than the one it knows, unless the rest is zero; it is, where it must be.
    ruleset = linux.syscall(
        linux.SYS_landlock_create_ruleset, ctypes.byref(attr), ctypes.c_size_t(ctypes.sizeof(attr)), ctypes.c_uint32(0)
    )
    try:
        for paths, rights in (
            (read, READ),
            (write, everything),
            (scratch, everything & ~_READ_DIR),
            (devices, DEVICE),
        ):
            for path in paths:
                _allow(ruleset, path, rights & everything)
        linux.set_no_new_privs()
        linux.syscall(linux.SYS_landlock_restrict_self, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    finally:
        os.close(ruleset)


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not there, or this user can't reach it: nothing to allow
        return
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            rights &= _FOR_FILES
        rule = _PathBeneathAttr(rights, fd)
        linux.syscall(
            linux.SYS_landlock_add_rule, ctypes.c_int(ruleset), ctypes.c_int(1), ctypes.byref(rule), ctypes.c_uint32(0)
        )
    finally:
        os.close(fd)
