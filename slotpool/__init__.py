"""Isolated slots for code you don't trust: leased from a pool, many to a container, from this machine or a cluster.

from slotpool import SlotPool

with SlotPool() as pool:
    with pool.slot() as s:
        print(s.bash("echo hello").stdout)
"""

from __future__ import annotations

import importlib

from ._version import __version__

TYPE_CHECKING = False  # which type checkers know; the process that makes sandboxes needs nothing else of `typing`
if TYPE_CHECKING:
    from typing import Any

    from .config import SlotPoolConfig as SlotPoolConfig
    from .errors import AcquireTimeout as AcquireTimeout
    from .errors import CommandFailed as CommandFailed
    from .errors import ContainerLost as ContainerLost
    from .errors import InvalidRequest as InvalidRequest
    from .errors import LeaseLost as LeaseLost
    from .errors import SlotPoolError as SlotPoolError
    from .pool import SlotPool as SlotPool
    from .slot import ExecutionResult as ExecutionResult
    from .slot import Slot as Slot
    from .slot import SlotState as SlotState

# Imported when they are first asked for: the process that makes sandboxes imports this package too, and needs to stay small.
_HOMES = {
    "SlotPool": "pool",
    "SlotPoolConfig": "config",
    "Slot": "slot",
    "SlotState": "slot",
    "ExecutionResult": "slot",
    "SlotPoolError": "errors",
    "AcquireTimeout": "errors",
    "CommandFailed": "errors",
    "ContainerLost": "errors",
    "InvalidRequest": "errors",
    "LeaseLost": "errors",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_ipython_extension(ipython: Any) -> None:
    """For ``%load_ext slotpool``, which gives a notebook ``%%slot``."""
    from .notebook import load

    load(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """For ``%unload_ext slotpool``."""
    from .notebook import unload

    unload(ipython)
