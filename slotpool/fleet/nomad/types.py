"""What Nomad tells of jobs, allocations and evaluations, as far as a pool needs it. Parsed, never built by hand."""

from __future__ import annotations

import contextlib
import enum
import re
from collections.abc import Iterator, Mapping
from typing import Any

import attr

from ...errors import NomadError

_INDEX = re.compile(r"\[(\d+)\]\Z")


@contextlib.contextmanager
def known_form(what: str) -> Iterator[None]:
    """For reading what was told.

    :raises NomadError: it is JSON of another form.
    """
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise NomadError(
            f"expected {what} as Nomad tells it, got something else ({e!r}); is it Nomad that answers there?"
        ) from e


def listed(told: object) -> list[Any]:
    """The entries of a list; none if there is nothing.

    :raises TypeError: it is something else.
    """
    if not isinstance(told, (list, type(None))):
        raise TypeError(f"{type(told).__name__} instead of a list")
    return told or []


class AllocationStatus(enum.Enum):
    """``ClientStatus`` of an allocation."""

    PENDING = "pending"
    RUNNING = "running"
    COMPLETE = "complete"
    FAILED = "failed"
    LOST = "lost"
    UNKNOWN = "unknown"


@attr.s(slots=True, auto_attribs=True, frozen=True)
class Event:
    """One entry of a task's history."""

    type: str
    message: str
    time: int  # nanoseconds since 1970


@attr.s(slots=True, auto_attribs=True, frozen=True)
class Allocation:
    """One container, as Nomad sees it.

    :ivar index: the number in its name; a lower count ends the highest first.
    :ivar desired: ``run``, ``stop`` or ``evict``.
    """

    id: str
    name: str
    index: int
    status: AllocationStatus
    desired: str
    node: str
    create_index: int
    modify_index: int
    created: int
    events: tuple[Event, ...]

    @classmethod
    def parse(cls, told: Mapping[str, Any]) -> Allocation:
        found = _INDEX.search(str(told.get("Name", "")))
        try:
            status = AllocationStatus(told.get("ClientStatus"))
        except ValueError:
            status = AllocationStatus.UNKNOWN
        events = [
            Event(str(event.get("Type", "")), str(event.get("DisplayMessage") or ""), int(event.get("Time", 0)))
            for task in (told.get("TaskStates") or {}).values()
            for event in (task or {}).get("Events") or ()
        ]
        return cls(
            id=str(told["ID"]),
            name=str(told.get("Name", "")),
            index=int(found.group(1)) if found else 0,
            status=status,
            desired=str(told.get("DesiredStatus", "")),
            node=str(told.get("NodeName") or told.get("NodeID") or ""),
            create_index=int(told.get("CreateIndex", 0)),
            modify_index=int(told.get("ModifyIndex", 0)),
            created=int(told.get("CreateTime", 0)),
            events=tuple(sorted(events, key=lambda event: event.time)),
        )

    @property
    def may_answer(self) -> bool:
        """Whether its server may be up. Nomad tells that it runs up to a second later."""
        return self.status in (AllocationStatus.PENDING, AllocationStatus.RUNNING) and self.desired == "run"

    @property
    def runs(self) -> bool:
        """Whether it is there to be used."""
        return self.status is AllocationStatus.RUNNING and self.desired == "run"


def address_of(told: Mapping[str, Any], label: str) -> str | None:
    """``host:port`` of an allocation's port, from its whole description or a list with resources."""
    resources = told.get("AllocatedResources") or {}
    shared = resources.get("Shared") or {}
    ports = [*(shared.get("Ports") or ())]
    for network in shared.get("Networks") or ():
        for port in [*(network.get("DynamicPorts") or ()), *(network.get("ReservedPorts") or ())]:
            ports.append({**port, "HostIP": network.get("IP")})
    for port in ports:
        if port.get("Label") == label and port.get("HostIP") and port.get("Value"):
            host = str(port["HostIP"])
            return f"[{host}]:{port['Value']}" if ":" in host else f"{host}:{port['Value']}"
    return None


@attr.s(slots=True, auto_attribs=True, frozen=True)
class Placement:
    """Why an evaluation could not place a task group."""

    nodes_evaluated: int
    nodes_filtered: int
    nodes_exhausted: int
    nodes_available: Mapping[str, int]  # by datacenter
    constraints: Mapping[str, int]  # nodes that each one has filtered out
    dimensions: Mapping[str, int]  # nodes that lack each one
    quota: tuple[str, ...]
    coalesced: int

    @classmethod
    def parse(cls, told: Mapping[str, Any]) -> Placement:
        return cls(
            nodes_evaluated=int(told.get("NodesEvaluated") or 0),
            nodes_filtered=int(told.get("NodesFiltered") or 0),
            nodes_exhausted=int(told.get("NodesExhausted") or 0),
            nodes_available=told.get("NodesAvailable") or {},
            constraints=told.get("ConstraintFiltered") or {},
            dimensions=told.get("DimensionExhausted") or {},
            quota=tuple(told.get("QuotaExhausted") or ()),
            coalesced=int(told.get("CoalescedFailures") or 0),
        )


@attr.s(slots=True, auto_attribs=True, frozen=True)
class Evaluation:
    """One decision of the scheduler."""

    id: str
    status: str
    description: str
    create_index: int
    modify_index: int
    failed: Mapping[str, Placement]  # by task group

    @classmethod
    def parse(cls, told: Mapping[str, Any]) -> Evaluation:
        failed = told.get("FailedTGAllocs") or {}
        return cls(
            id=str(told["ID"]),
            status=str(told.get("Status", "")),
            description=str(told.get("StatusDescription") or ""),
            create_index=int(told.get("CreateIndex", 0)),
            modify_index=int(told.get("ModifyIndex", 0)),
            failed={str(group): Placement.parse(why) for group, why in failed.items()},
        )


@attr.s(slots=True, auto_attribs=True, frozen=True)
class Job:
    """A job that is registered.

    :ivar modify_index: for changes that shall only be made if nobody else has made one (``JobModifyIndex``).
    :ivar body: the whole of it, as Nomad has it.
    """

    id: str
    stopped: bool
    status: str
    version: int
    modify_index: int
    body: Mapping[str, Any]

    @classmethod
    def parse(cls, told: Mapping[str, Any]) -> Job:
        return cls(
            id=str(told["ID"]),
            stopped=bool(told.get("Stop")),
            status=str(told.get("Status", "")),
            version=int(told.get("Version", 0)),
            modify_index=int(told.get("JobModifyIndex", 0)),
            body=told,
        )

    def standing_count(self, group: str) -> int | None:
        """The same; None too if the job is stopped."""
        return None if self.stopped else self.count(group)

    def count(self, group: str) -> int | None:
        """How many allocations of ``group`` there are to be; None if it has no such group."""
        for one in self.body.get("TaskGroups") or ():
            if one.get("Name") == group:
                return int(one.get("Count") or 0)
        return None
