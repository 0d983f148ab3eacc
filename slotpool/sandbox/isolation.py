"""Which isolation a server uses, found by trying it, and what each mode's sandboxes are made of."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import shutil
import stat
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Callable

import attr

from ..errors import IsolationUnavailable, SandboxStartFailed
from . import landlock

if TYPE_CHECKING:
    from .order import Landlock, Order

_MAX_FILES = 16_384  # open at once, for each process of a slot
INNER_WORKSPACE = "/workspace"
INNER_UID = 1000
INNER_USER = "slot"

# What of the machine a slot sees, read-only. Of /etc only what programs need to run: the rest is full of other people's
# secrets.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt")
_ETC = (
    "alternatives bash.bashrc ca-certificates ca-certificates.conf debian_version fonts gai.conf host.conf hosts "
    "ld.so.cache ld.so.conf ld.so.conf.d localtime magic mime.types nsswitch.conf os-release pki profile profile.d protocols "
    "resolv.conf services ssl terminfo timezone"
).split()
_MANY = 16  # entries of a directory
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty", "/dev/ptmx", "/dev/pts")
_SCRATCH = ("/tmp", "/var/tmp", "/dev/shm")

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_HOW_TO_GET = (
    "bwrap needs bubblewrap (apt-get install bubblewrap) and user namespaces "
    "(sysctl kernel.unprivileged_userns_clone=1; in a Docker container --security-opt seccomp=unconfined "
    "--security-opt systempaths=unconfined); user needs root. "
    'Without either, isolation="none" runs commands unprotected, as the server\'s own user.'
)


@attr.s(slots=True, auto_attribs=True, frozen=True)
class Place:
    """What one sandbox is made for."""

    own = ("workspace", "tmp")  # names in `directory` of what is the slot's; in mode bwrap there is no `tmp`

    directory: str  # of the lease, on this machine
    etc: Sequence[tuple[str, str]]  # what a bwrap slot sees below /etc, see make_etc
    uid: int
    gid: int
    killer: int  # see Order
    network: bool
    groups: tuple[str, ...] = ()  # see Order

    @property
    def workspace(self) -> str:
        return os.path.join(self.directory, self.own[0])

    @property
    def tmp(self) -> str:
        return os.path.join(self.directory, self.own[1])


@attr.s(slots=True, auto_attribs=True, frozen=True)
class Limits:
    """What keeps a slot within bounds, beside control groups."""

    max_processes: int
    max_disk: int | None  # bytes of its workspace, and of each other place where it can write
    asked_for: Mapping[str, int]  # of each process, by the names of resource.RLIMIT_*


@attr.s(slots=True, auto_attribs=True, frozen=True)
class Isolation:
    """A mode that works here."""

    mode: str
    landlock: int  # version of Landlock's interface in use, 0 for none
    own_users: bool  # each lease has a Unix user of its own
    limits: Limits
    readonly_paths: Sequence[str]

    @property
    def default_network(self) -> bool:
        """What a lease gets that doesn't ask: no network, where that can be had."""
        return self.mode != "bwrap"

    def refuses_network(self, network: bool) -> str | None:
        """Why ``network`` can't be had in this mode, if so."""
        if self.mode == "bwrap" or network:
            return None
        return f'network=None or True, as isolation "{self.mode}" can\'t keep a slot off the network'

    def workspace(self, place: Place) -> str:
        """The workspace as the slot sees it."""
        return INNER_WORKSPACE if self.mode == "bwrap" else place.workspace

    @property
    def rlimits(self) -> dict[str, int]:
        """Of each process, by the names of ``resource.RLIMIT_*``."""
        if self.mode == "none":
            return dict(self.limits.asked_for)
        limits = {"RLIMIT_CORE": 0, "RLIMIT_MSGQUEUE": 0, "RLIMIT_NOFILE": self._max_files(), **self.limits.asked_for}
        limits |= {"RLIMIT_NICE": 0, "RLIMIT_RTPRIO": 0}  # else it could take back SCHED_IDLE, or a processor from all others
        if self.own_users or _processes_counted_by_namespace():
            limits["RLIMIT_NPROC"] = self.limits.max_processes
        return limits

    def _max_files(self) -> int:
        """Where slots have the server's own user, fewer than it may have: what is on its way between processes is counted by
        user, and compared with the sender's limit, see unix(7), ETOOMANYREFS.
        """
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        return _MAX_FILES if self.own_users or most == resource.RLIM_INFINITY else min(_MAX_FILES, most // 4)

    def order(self, place: Place) -> Order:
        inner = INNER_UID if self.mode == "bwrap" else place.uid
        workspace = self.workspace(place)
        return {
            "mode": self.mode,
            "bwrap": self._bwrap(place) if self.mode == "bwrap" else [],
            "uid": place.uid,
            "gid": place.gid,
            "inner_uid": inner,
            "inner_gid": inner if self.mode == "bwrap" else place.gid,
            "workspace": workspace,
            "env": {
                "PATH": _PATH,
                "HOME": workspace,
                "USER": INNER_USER,
                "LOGNAME": INNER_USER,
                "SHELL": "/bin/bash",
                "LC_CTYPE": "C.UTF-8",  # and not LANG, as each shell would read a dozen files more when it starts
                "TERM": "dumb",
                "TMPDIR": "/tmp" if self.mode == "bwrap" else place.tmp,
            },
            "umask": 0o022 if self.mode == "bwrap" else 0o077,
            "limits": self.rlimits,
            "landlock": self._landlock(place) if self.landlock else None,
            "killer": place.killer,
            "groups": list(place.groups),
            "scratch": list(_SCRATCH) if self.mode == "user" else [],
        }

    def _bwrap(self, place: Place) -> list[str]:
        args = [shutil.which("bwrap") or "bwrap"]
        args += "--unshare-user --unshare-pid --unshare-ipc --unshare-uts --unshare-cgroup-try --as-pid-1".split()
        args += ["--hostname", "slot", "--uid", str(INNER_UID), "--gid", str(INNER_UID)]
        if not place.network:
            args.append("--unshare-net")
        for path in _SYSTEM:
            if os.path.islink(path):
                args += ["--symlink", os.readlink(path), path]
            elif os.path.isdir(path):
                args += ["--ro-bind", path, path]
        for source, target in place.etc:  # the machine's own directories may have gone since
            args += ["--ro-bind" if target == "/etc" else "--ro-bind-try", source, target]
        disk = self.limits.max_disk
        size = ["--size", str(disk)] if disk is not None else []
        args += ["--proc", "/proc", "--dev", "/dev", "--dir", "/run"]
        for path in ("/tmp", "/var/tmp") if disk is None else ("/tmp", "/var/tmp", "/dev/shm"):
            args += ["--perms", "1777", *size, "--tmpfs", path]
        for path in self.readonly_paths:
            args += ["--ro-bind", path, path]
        if disk is None:
            args += ["--bind", place.workspace, INNER_WORKSPACE]
        else:
            args += ["--perms", "0700", *size, "--tmpfs", INNER_WORKSPACE]
        return [*args, "--remount-ro", "/", "--chdir", INNER_WORKSPACE]

    def _landlock(self, place: Place) -> Landlock:
        etc = [f"/etc/{name}" for name in (*_ETC, "passwd", "group")]
        return {
            "read": [*_SYSTEM, *etc, "/proc", "/run/systemd/resolve", *self.readonly_paths],
            "write": [place.workspace, place.tmp],
            "scratch": list(_SCRATCH),
            "devices": list(_DEVICES),
        }


def _processes_counted_by_namespace() -> bool:
    """Whether RLIMIT_NPROC counts a user's processes in each user namespace by themselves, as of Linux 5.14."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(itertools.takewhile(str.isdigit, minor)))) >= (5, 14)


def make_etc(directory: str, machine: str = "/etc") -> list[tuple[str, str]]:
    """Make the ``/etc`` of bwrap's slots: the harmless part, and a user for the slot.

    :param directory: is made, for what has to be copied.
    :param machine: whose it is a part of.
    :return: what to show there, and where, in that order.
    """
    shown = [(directory, "/etc")]
    os.mkdir(directory, 0o755)
    for name in _ETC:
        source, target = os.path.join(machine, name), os.path.join(directory, name)
        with contextlib.suppress(FileNotFoundError, PermissionError):
            info = os.stat(source)
            if not _is_public(info):
                continue
            if stat.S_ISDIR(info.st_mode):
                shown += _copy_public(source, target, f"/etc/{name}")
            else:
                shutil.copyfile(source, target)
                os.chmod(target, 0o644)
    for name, text in (
        ("passwd", f"root:x:0:0:root:/root:/bin/sh\n{INNER_USER}:x:{INNER_UID}:{INNER_UID}::{INNER_WORKSPACE}:/bin/bash\n"),
        ("group", f"root:x:0:\n{INNER_USER}:x:{INNER_UID}:\n"),
    ):
        with open(os.path.join(directory, name), "w", encoding="utf-8") as f:
            f.write(text)
    return shown


def _copy_public(source: str, target: str, inner: str) -> list[tuple[str, str]]:
    """Copy what is for everybody to read: not private keys below /etc/ssl, say. Their directories are 0700.

    A large directory, of certificates, say, with nothing else below it is shown as it is: copying it would take a server longer
    than all the rest of its start. What is put there later shows too, as far as the slot's user may read it.

    :param inner: where a slot sees it.
    """
    os.mkdir(target, 0o755)
    entries, all_public = _below(source)
    if entries > _MANY and all_public:
        return [(source, inner)]
    shown = []
    with os.scandir(source) as found:
        for entry in found:
            copy = os.path.join(target, entry.name)
            if not _is_public_entry(entry):
                continue
            if entry.is_dir(follow_symlinks=False):
                shown += _copy_public(entry.path, copy, f"{inner}/{entry.name}")
            else:
                shutil.copyfile(entry.path, copy, follow_symlinks=False)
    return shown


def _below(directory: str) -> tuple[int, bool]:
    """How much there is, and whether all is for everybody to read."""
    count, public = 0, True
    with os.scandir(directory) as found:
        for entry in found:
            count += 1
            public = public and _is_public_entry(entry)
            if public and entry.is_dir(follow_symlinks=False):
                more, public = _below(entry.path)
                count += more
    return count, public


def _is_public_entry(entry: os.DirEntry[str]) -> bool:
    return entry.is_symlink() or _is_public(entry.stat())


def _is_public(info: os.stat_result) -> bool:
    """Whether everybody may read a file, or a directory and what is in it."""
    needed = 0o005 if stat.S_ISDIR(info.st_mode) else 0o004
    return info.st_mode & needed == needed


def _below_scratch(paths: Sequence[str]) -> list[str]:
    """Those where a slot of mode ``user`` may write what file modes let it, as Landlock's rules for a path add up."""
    tops = [os.path.realpath(top) for top in _SCRATCH]
    return [path for path in paths if any(os.path.commonpath([top, os.path.realpath(path)]) == top for top in tops)]


def choose(
    requested: str,
    try_out: Callable[[Isolation], None],
    limits: Limits,
    readonly_paths: Sequence[str],
) -> Isolation:
    """The isolation to use.

    :param requested: a mode, or ``auto`` for the strongest that works; ``auto`` never means ``none``.
    :param try_out: makes a sandbox in the given isolation and ends it; raises :class:`SandboxStartFailed`.
    :raises IsolationUnavailable: if none of them works, with the reasons and what to install.
    """
    root = os.geteuid() == 0
    reasons: dict[str, str] = {}
    for mode in ("bwrap", "user") if requested == "auto" else (requested,):
        if mode == "bwrap" and shutil.which("bwrap") is None:
            reasons[mode] = "bubblewrap is not installed"
            continue
        if mode == "user" and not root:
            reasons[mode] = "the server does not run as root"
            continue
        if mode != "bwrap" and limits.max_disk is not None:
            reasons[mode] = "it can't keep max_disk"
            continue
        writable = _below_scratch(readonly_paths) if mode == "user" else ()
        if writable:
            reasons[mode] = f"readonly_paths: slots may write to what is below {', '.join(_SCRATCH)}, as {', '.join(writable)}"
            continue
        version = landlock.abi() if mode == "user" else 0
        isolation = Isolation(mode, version, root and mode != "none", limits, tuple(readonly_paths))
        try:
            try_out(isolation)
        except SandboxStartFailed as e:
            reasons[mode] = str(e)
            continue
        return isolation
    why = "; ".join(f"{mode}: {reason}" for mode, reason in reasons.items())
    raise IsolationUnavailable(f'isolation="{requested}" does not work here ({why}). {_HOW_TO_GET}')
