"""How a slot's files are read and written, from within, as the slot's own user. Standard library alone.

A descriptor, or the path that leads to it, may be whatever the slot has made it: none of this may block or follow more than the
slot's own code could.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct

_CHUNK = 1 << 18
SIZE = struct.Struct("!Q")


def require_regular(info: os.stat_result) -> None:
    if stat.S_ISDIR(info.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if stat.S_ISLNK(info.st_mode):  # one that leads nowhere but to itself, as others were followed
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "not a regular file")


def read_file(path: str, limit: int, sized: bool) -> None:
    """To standard output; if it is to be ``sized``, after its size."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    info = os.fstat(fd)
    require_regular(info)
    size = info.st_size
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


class Replacement:
    """A new file that is to take the place of ``name``. Until it is whole it is beside that: a full disk or a broken connection
    loses nothing.

    :ivar fd: to write to.
    """

    def __init__(self, directory: int, name: str) -> None:
        """:param directory: a descriptor of the one that it is in; it is closed with this."""
        self._directory = directory
        self._name = name
        self._partial = f".slotpool-{os.urandom(8).hex()}"
        try:
            self._mode = self._mode_of_the_old()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self.fd = os.open(self._partial, flags, 0o600, dir_fd=directory)
        except BaseException:
            os.close(directory)
            raise

    def _mode_of_the_old(self) -> int:
        try:
            info = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return 0o666 & ~_umask()
        require_regular(info)
        return stat.S_IMODE(info.st_mode)

    def take_room(self, size: int) -> None:
        """A full disk is noticed before anything is moved. And ext4 writes a file that has no blocks yet to the disk when it
        replaces another (the mount option auto_da_alloc), which for 1 MiB takes longer than all else here.
        """
        if size:
            os.posix_fallocate(self.fd, 0, size)

    def put_in_place(self) -> None:
        os.fchmod(self.fd, self._mode)
        os.rename(self._partial, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._partial = ""

    def close(self) -> None:
        """Remove it, unless it was put in place."""
        try:
            if self._partial:
                os.unlink(self._partial, dir_fd=self._directory)
        except OSError:  # the slot has moved it, or keeps it: it is its own
            pass
        finally:
            os.close(self.fd)
            os.close(self._directory)


def write_file(path: str, size: int) -> None:
    """From standard input."""
    directory, name = os.path.split(os.path.realpath(path))
    os.makedirs(directory, exist_ok=True)
    with contextlib.closing(Replacement(os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC), name)) as replacement:
        try:
            replacement.take_room(size)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):  # else this file system, or this kernel, can't
                raise
        _copy_exactly(0, replacement.fd, size)
        replacement.put_in_place()


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
