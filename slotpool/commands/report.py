"""What a job and its containers are like now. Looks only; changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import attr

from ..config import SlotPoolConfig
from ..container import Container
from ..errors import NomadDenied, NomadError, SlotPoolError
from ..fleet import Member
from ..fleet.nomad import diagnosis
from ..fleet.nomad.client import NomadClient
from ..fleet.nomad.job import GROUP, PORT, TASK, count_of, token_path
from ..fleet.nomad.types import Allocation, AllocationStatus, Job, address_of
from ..sandbox.client import SandboxClient

_LIMIT = 5.0  # seconds for a server to answer
_BRIEFLY = 1.0  # for one that may be being set up, and is asked again
_AT_ONCE = 16
_REACHABLE = (AllocationStatus.PENDING, AllocationStatus.RUNNING)  # Nomad tells late that one has come to run
_ALIVE = (*_REACHABLE, AllocationStatus.UNKNOWN)


def alive(allocation: Allocation) -> bool:
    """Whether it has not ended, as far as Nomad knows."""
    return allocation.status in _ALIVE


@attr.s(auto_attribs=True, frozen=True)
class ContainerReport:
    """One container.

    :ivar counted: it is one of those that the job wants, and not about to end.
    :ivar trouble: why its server does not answer; empty if it does, or could not be asked.
    :ivar info: what its server tells; little without the token.
    """

    allocation: Allocation
    address: str | None
    answers: bool = False
    trouble: str = ""
    info: Mapping[str, Any] = attr.ib(factory=dict)

    @property
    def counted(self) -> bool:
        return self.allocation.may_answer

    @property
    def status(self) -> str:
        ending = alive(self.allocation) and self.allocation.desired != "run"
        return f"{self.allocation.status.value}, ending" if ending else self.allocation.status.value

    def as_dict(self) -> dict[str, Any]:
        counts = self.info.get("counts")
        return {
            "index": self.allocation.index,
            "allocation": self.allocation.id,
            "node": self.allocation.node,
            "status": self.allocation.status.value,
            "desired": self.allocation.desired,
            "address": self.address,
            "answers": self.answers,
            "trouble": self.trouble or None,
            "version": self.info.get("version"),
            "isolation": self.info.get("isolation"),
            "slots": self.info.get("slots"),
            "counts": counts,
            "quarantined": counts.get("quarantined") if counts is not None else None,
        }


@attr.s(auto_attribs=True, frozen=True)
class JobReport:
    """A job.

    :ivar notes: what could not be found out, and why.
    :ivar failure: what keeps containers from coming.
    """

    job: Job
    nomad: str
    namespace: str
    count: int
    containers: Sequence[ContainerReport]
    failure: Exception | None
    notes: Sequence[str]

    @property
    def answering(self) -> int:
        return sum(one.counted and one.answers for one in self.containers)

    @property
    def complete(self) -> bool:
        """Whether all containers that there are to be answer."""
        return not self.job.stopped and self.answering >= self.count

    def as_dict(self) -> dict[str, Any]:
        failure = self.failure
        return {
            "job": self.job.id,
            "nomad": self.nomad,
            "namespace": self.namespace,
            "status": self.job.status,
            "stopped": self.job.stopped,
            "count": self.count,
            "answering": self.answering,
            "complete": self.complete,
            "containers": [one.as_dict() for one in self.containers],
            "failure": {"kind": type(failure).__name__, "message": str(failure)} if failure is not None else None,
            "notes": list(self.notes),
        }

    def as_text(self) -> str:
        status = f"{self.job.status}, stopped" if self.job.stopped else self.job.status
        lines = [f"job {self.job.id} at {self.nomad}: {status}; {self.answering} of {self.count} container(s) answer"]
        rows = [("INDEX", "ALLOCATION", "NODE", "STATUS", "ADDRESS", "ISOLATION", "SLOTS"), *map(_row, self.containers)]
        widths = [max(map(len, column)) for column in zip(*rows)]
        if self.containers:
            lines += ["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip() for row in rows]
        lines += self.notes
        if self.failure is not None:
            lines.append(f"{type(self.failure).__name__}: {self.failure}")
        return "\n".join(lines)


def _row(container: ContainerReport) -> tuple[str, ...]:
    one, info = container.allocation, container.info
    if container.answers:
        states = ", ".join(f"{n} {state}" for state, n in (info.get("counts") or {}).items() if n)
        slots = f"{info['slots']}: {states}" if "slots" in info else "it answers"
    else:
        slots = container.trouble
    isolation = str(info.get("isolation", "?" if container.answers else "-"))
    return str(one.index), one.id[:8], one.node, container.status, container.address or "-", isolation, slots or "-"


def look(client: NomadClient, config: SlotPoolConfig) -> JobReport:
    """
    :raises SlotPoolError: there is no such job, it isn't slotpool's, or Nomad does not tell.
    """
    job = client.job(config.job_id)
    connection = client.connection
    namespace = connection.namespace or "default"
    if job is None:
        raise SlotPoolError(
            f"there is no job {config.job_id} in the namespace {namespace} of Nomad at {connection.address}; "
            "`slotpool up` deploys one"
        )
    count = count_of(job)
    described = client.allocations_with_resources(job.id)
    allocations = [Allocation.parse(one) for one in described]
    addresses = {str(one["ID"]): address_of(one, PORT) for one in described}
    notes: list[str] = []
    failure: Exception | None = None
    if job.stopped:
        notes.append("the job is stopped; `slotpool up` starts it again, `slotpool down --purge` forgets it")
    else:
        failure = _diagnose(client, job, count, allocations, notes)
    current = {one.id for one in diagnosis.latest(allocations) if one.desired == "run"}
    listed = [one for one in allocations if one.id in current or alive(one)]
    token = _token(client, config, notes) if any(one.status in _REACHABLE for one in listed) else None

    def ask(allocation: Allocation) -> ContainerReport:
        return _ask(allocation, addresses[allocation.id], token)

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        containers = list(threads.map(ask, sorted(listed, key=lambda one: (one.index, one.create_index))))
    return JobReport(job, connection.address, namespace, count, containers, failure, notes)


def _token(client: NomadClient, config: SlotPoolConfig, notes: list[str]) -> str | None:
    if config.token is not None:
        return config.token
    path = token_path(config.job_id)
    try:
        kept = (client.variable(path) or {}).get("token")
        why = f"there is no token in Nomad's variable {path}"
    except NomadDenied as e:
        kept, why = None, str(e)
    if kept is None:
        notes.append(f"without the servers' token their slots can't be shown; SLOTPOOL_TOKEN can give it: {why}")
    return kept


def _diagnose(
    client: NomadClient, job: Job, count: int, allocations: Sequence[Allocation], notes: list[str]
) -> Exception | None:
    driver, image = _driver_and_image(job)
    said: dict[str, str] = {}
    for one in diagnosis.latest(allocations):
        if one.desired == "run" and diagnosis.has_given_up(one):
            try:
                said[one.id] = client.last_output(one.id, TASK)
            except NomadError as e:
                notes.append(f"what the server of {one.id[:8]} said can't be read: {e}")
            break
    failure = diagnosis.of_allocations(allocations, image, driver, said)
    if failure is not None:
        return failure
    placed = sum(one.may_answer for one in allocations)
    evaluations, _ = client.evaluations(job.id)
    return diagnosis.of_evaluations(evaluations, count - placed)


def _driver_and_image(job: Job) -> tuple[str, str]:
    for group in job.body.get("TaskGroups") or ():
        for task in (group.get("Tasks") or ()) if group.get("Name") == GROUP else ():
            if task.get("Name") == TASK:
                return str(task.get("Driver")), str((task.get("Config") or {}).get("image", "?"))
    return "?", "?"


def _ask(allocation: Allocation, address: str | None, token: str | None) -> ContainerReport:
    if allocation.status not in _REACHABLE or address is None:
        return ContainerReport(allocation, address)
    pending = allocation.status is AllocationStatus.PENDING
    member = Member(allocation.id, allocation.index, f"http://{address}", token, allocation.id)
    try:
        info = _health(member, _BRIEFLY if pending else _LIMIT)
    except SlotPoolError as e:
        return ContainerReport(allocation, address, trouble=str(getattr(e, "message", e)))
    return ContainerReport(allocation, address, answers=True, info=info)


def _health(member: Member, limit: float) -> dict[str, Any]:
    """
    :raises SlotPoolError: it does not answer, or is not the one that was meant.
    """
    with contextlib.closing(SandboxClient(member.address, member.token, cacert=member.cacert)) as client:
        info = client.health(limit, repeat=False)
    if member.token is not None:  # without it a server does not tell who it is
        Container(member, 0).introduce(info)
    return info


def answering(members: Sequence[Member]) -> set[str]:
    """The ids of those whose servers answer."""

    def answers(member: Member) -> bool:
        try:
            _health(member, _BRIEFLY)
        except SlotPoolError:
            return False
        return True

    with ThreadPoolExecutor(_AT_ONCE) as threads:
        return {member.id for member, good in zip(members, threads.map(answers, members)) if good}
