"""How a slot's files are read and written, from within, as the slot's own user. Standard library alone.

A descriptor, or the path that leads to it, may be whatever the slot has made it: none of this may block or follow more than the
slot's own code could.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

_CHUNK = 1 << 18
SIZE = struct.Struct("!Q")


def _require_regular(fd: int) -> os.stat_result:
    info = os.fstat(fd)
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return info


def read_file(path: str, limit: int, sized: bool) -> None:
    """To standard output; if it is to be ``sized``, after its size."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    size = _require_regular(fd).st_size
    begun = b"" if size else _read_all(fd, limit + 1)  # in /proc they have no size, and a content all the same
    size = size or len(begun)
    if size > limit:
        raise OSError(errno.EFBIG, f"{size} bytes, and the limit is {limit}")
    _write(1, memoryview(SIZE.pack(size) + begun if sized else begun))
    # Copied, as sendfile(2) would put pages into the pipe that others may still change.
    chunk = memoryview(bytearray(_CHUNK))
    left = size - len(begun)
    while left:
        count = os.readv(fd, [chunk[:left]])
        if not count:
            raise OSError(errno.EIO, f"it became {left} bytes shorter while it was read")
        left -= count
        _write(1, chunk[:count])


def _read_all(fd: int, most: int) -> bytes:
    parts = []
    while part := os.read(fd, min(_CHUNK, most)):
        parts.append(part)
        most -= len(part)
    return b"".join(parts)


def _write(fd: int, view: memoryview) -> None:
    while view:
        view = view[os.write(fd, view) :]


def write_file(path: str, size: int) -> None:
    target = os.path.realpath(path)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    mode = 0o666 & ~_umask()
    try:
        info = os.stat(target)
    except FileNotFoundError:
        pass
    else:
        if stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if not stat.S_ISREG(info.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        mode = stat.S_IMODE(info.st_mode)
    # Beside the target and renamed when whole: a full disk or a broken connection loses nothing.
    partial = os.path.join(os.path.dirname(target), f".slotpool-{os.urandom(8).hex()}")
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        _take_room(fd, size)
        _copy_exactly(0, fd, size)
        os.fchmod(fd, mode)
        os.rename(partial, target)
    except BaseException:
        os.unlink(partial)
        raise


def _take_room(fd: int, size: int) -> None:
    """A full disk is noticed before anything is moved. And ext4 writes a file that has no blocks yet to the disk when it
    replaces another (the mount option auto_da_alloc), which for 1 MiB takes longer than all else here.
    """
    if size:
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # else this file system, or this kernel, can't
                raise


def _copy_exactly(source: int, target: int, size: int) -> None:
    left = size
    while left:
        chunk = os.read(source, min(left, _CHUNK))
        if not chunk:
            raise OSError(errno.EPIPE, f"the content ended {left} bytes early")
        left -= len(chunk)
        _write(target, memoryview(chunk))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
