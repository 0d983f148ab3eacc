"""A container in the pool's hands: its server, and how many of its slots this pool holds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from .errors import ContainerRefused, IsolationUnavailable
from .fleet import Member
from .sandbox.client import SandboxClient
from .tenure import Tenure


class Container:
    """Plain data and a client; the pool's lock guards all but the client."""

    def __init__(self, member: Member, size: int) -> None:
        self.member = member
        self.id = member.id
        self.address = member.address
        self.size = size  # slots that it has
        self.capacity = size  # of them, those that are not quarantined
        self.client = SandboxClient(member.address, member.token, 2 * size + 4, member.cacert)
        self.tenures: dict[str, Tenure] = {}  # the leases that this pool holds in it, by token
        self.position = 0  # among the pool's containers, lowest first
        self.outbox: list[str] = []  # tokens to give back
        self.asking = 0  # leases asked for, not yet answered
        self.hoping = 0  # the same, when it was known to have none free
        self.exchanges = 0  # requests under way that give back and take
        self.exhausted = False  # the last time, it had none for us
        self.retry_at = 0.0  # on the monotonic clock: not asked for leases before, as it has just failed
        self.checking = False  # a renewal is under way
        self.closed_until = 0.0  # on the monotonic clock: to be ended, so nothing is leased before
        self.answered_at = time.monotonic()
        self.leased_by_others = 0  # slots that other pools have leased, as far as is known
        self.info: dict[str, Any] = {}

    def introduce(self, info: dict[str, Any], isolation: str = "auto") -> None:
        """Take in what its server says of itself.

        :param isolation: what its slots must have; any will do if that is ``auto``.
        :raises ContainerRefused: it is not the one that was meant.
        :raises IsolationUnavailable: it has another isolation.
        """
        if self.member.name and info.get("name") != self.member.name:
            who = repr(info.get("name"))
            raise ContainerRefused(f"expected {self.member.name} at {self.address}, got {who}; has its port another owner now?")
        self.info = info
        self.size = self.capacity = int(info.get("slots", 0))
        if self.size < 1:
            raise ContainerRefused(f"{self.address} did not tell how many slots it has; is the token right?")
        if isolation not in ("auto", info.get("isolation")):
            raise IsolationUnavailable(f"isolation: expected {isolation}, got {info.get('isolation')} at {self.address}")

    def told(self, answer: Mapping[str, Any]) -> bool:
        """Take in what comes with an answer; whether it is news. The pool's lock is held."""
        known = self.capacity, self.leased_by_others
        self.capacity = int(answer.get("usable", self.capacity))
        if not self.exchanges:  # else it isn't known which of them are ours
            self.leased_by_others = max(0, int(answer.get("leased", 0)) - len(self.tenures) - len(self.outbox))
        return known != (self.capacity, self.leased_by_others)

    @property
    def cordoned(self) -> bool:
        """Whether it is closed to new leases. If it has not been ended by then, it can be used again."""
        return time.monotonic() < self.closed_until

    @property
    def room(self) -> int:
        """Leases that this pool could still ask for."""
        return 0 if self.cordoned else self.capacity - len(self.tenures) - self.asking - self.hoping
