"""Standing servers at known addresses, perhaps shared with other pools."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Callable

from . import Member


class StaticFleet:
    """Those servers, no more and no fewer."""

    def __init__(self, addresses: Sequence[str], token: str | None, cacert: str | None) -> None:
        self._members = [Member(address, i, address, token, cacert=cacert) for i, address in enumerate(addresses)]

    def start(self, wanted: int, on_change: Callable[[], None]) -> None:
        on_change()

    def members(self) -> Sequence[Member]:
        return self._members

    def size(self) -> int:
        return len(self._members)

    def grow(self, wanted: int) -> None:
        pass

    def shrink(self, wanted: int, closed: Collection[str], before: float) -> bool:
        return False

    def replace(self, member: Member) -> None:
        pass  # somebody else's; it may come back

    def failure(self) -> Exception | None:
        return None

    def describe(self) -> str:
        return f"{len(self._members)} standing server(s)"

    def stop(self, purge: bool) -> None:
        pass
