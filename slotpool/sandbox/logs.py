"""What a pool and its servers log of leases and executions, alike on both sides, at level DEBUG.

Each record has ``slot``, ``lease`` and, of an execution, ``execution_id`` as attributes, for filters and formatters.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from typing import Any


def lease_id(token: str) -> str:
    """What logs call the lease of that token: a digest, with which nobody can use the lease."""
    return hashlib.sha256(token.encode()).hexdigest()[:12]


def lease(log: logging.Logger, slot: str, token: str, what: str, *args: object) -> None:
    """Something has become of a lease.

    :param what: in words, with a ``%s`` or the like for each of ``args``.
    """
    if log.isEnabledFor(logging.DEBUG):
        ids = {"slot": slot, "lease": lease_id(token)}
        log.debug("%s, lease %s: " + what, slot, ids["lease"], *args, extra=ids)


def execution(
    log: logging.Logger, call: Mapping[str, Any], end: Mapping[str, Any] | BaseException | str | None, server: str = ""
) -> None:
    """One begins, or has ended. What it runs is not told, as that may hold secrets.

    :param call: as in a batch.
    :param end: its result, or what it failed with; None if it begins.
    :param server: its address, if it is another process.
    """
    if not log.isEnabledFor(logging.DEBUG):
        return
    if end is None:
        what = "begins"
    elif isinstance(end, (BaseException, str)):
        what = f"failed: {end if isinstance(end, str) else type(end).__name__}"
    else:
        how = "timed out" if end["timed_out"] else f"ended with exit code {end['exit_code']}"
        what = f"{how} after {end['duration']:.3f} s"
    ids = {"slot": call["slot"], "lease": lease_id(call["lease"]), "execution_id": call["execution_id"]}
    where = f" at {server}" if server else ""
    log.debug("%s, lease %s: execution %s (%s) %s%s", *ids.values(), call["tool"], what, where, extra=ids)
