"""What a sandbox shall be: the words of the server's order to the process that makes sandboxes. For type checkers alone, so
that neither it nor a zygote has the 170 pages of :mod:`typing`, which each of these would have to give back as it dies.
"""

from __future__ import annotations

from typing import TypedDict


class Landlock(TypedDict):
    """The arguments of :func:`slotpool.sandbox.landlock.restrict`."""

    read: list[str]
    write: list[str]
    scratch: list[str]
    devices: list[str]


class Order(TypedDict):
    """What a sandbox shall be: the server's order to the nursery."""

    mode: str
    bwrap: list[str]  # mode bwrap: bubblewrap's command line, up to the payload
    uid: int  # the user that the sandbox's processes have, seen from outside
    gid: int
    inner_uid: int  # and seen from inside; another one in mode bwrap only
    inner_gid: int
    workspace: str  # the working directory, seen from inside
    env: dict[str, str]
    umask: int
    limits: dict[str, int]  # by the names of resource.RLIMIT_*
    landlock: Landlock | None
    killer: int  # mode user: whom the nursery is when it kills that user's processes, see confine.kill_user
    groups: list[str]  # control groups to be in, see cgroups.join()
    scratch: list[str]  # mode user: shared directories to clear of the user's files at the end
