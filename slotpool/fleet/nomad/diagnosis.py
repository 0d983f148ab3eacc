"""Why containers don't come: what allocations' events and evaluations say, in words that tell what to do. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...errors import CrashLoop, ImageUnavailable, PlacementFailed, StartFailed
from .job import GROUP, TASK
from .types import Allocation, AllocationStatus, Evaluation, Placement

_PULL_FAILURES = ("failed to pull", "pull access denied", "manifest unknown", "no such image", "repository does not exist")
_USER_REFUSED = "is disallowed"  # of a task's user, by the client
_GIVEN_UP = "exceeded allowed attempts"
_LAST_EVENTS = 6
_MOST_LISTED = 10


def latest(allocations: Sequence[Allocation]) -> list[Allocation]:
    """Of each index the newest: what stands for that container now."""
    newest: dict[int, Allocation] = {}
    for allocation in sorted(allocations, key=lambda one: one.create_index):
        newest[allocation.index] = allocation
    return [newest[index] for index in sorted(newest)]


def of_allocations(allocations: Sequence[Allocation], image: str, driver: str, said: Mapping[str, str]) -> StartFailed | None:
    """What keeps the newest allocations from running, if that will not pass by itself.

    :param said: the last that servers wrote to their standard error, by allocation.
    """
    for allocation in latest(allocations):
        if allocation.desired != "run" or allocation.runs:
            continue
        failure = _of_allocation(allocation, image, driver, said)
        if failure is not None:
            return failure
    return None


def _of_allocation(allocation: Allocation, image: str, driver: str, said: Mapping[str, str]) -> StartFailed | None:
    where = f"allocation {allocation.id[:8]} on node {allocation.node}"
    for event in reversed(allocation.events):
        told = event.message.lower()
        if any(words in told for words in _PULL_FAILURES):
            hint = (
                f"`slotpool build --image {image}` builds it on this machine; every node that runs it needs it"
                if image.endswith(":local")
                else "check its name, and that the nodes may pull it"
            )
            return ImageUnavailable(f"the image {image} is not to be had for {where}: {event.message}; {hint}")
        if _USER_REFUSED in told:
            hint = f"choose another `driver`, or have Nomad's clients let {driver} do so by their option user.denylist"
            return CrashLoop(f"{where} was refused by its node: {event.message}; {hint}\n{_events(allocation)}")
        if event.type == "Driver Failure":
            return CrashLoop(f"the driver {driver} could not start {where}: {event.message}\n{_events(allocation)}")
    if has_given_up(allocation):
        last = said.get(allocation.id, "").strip()
        killed = any(word in event.message for event in allocation.events for word in ("OOM", "Signal: 9", "Exit Code: 137"))
        return CrashLoop(
            f"the sandbox server of {where} ends each time it is started; `nomad alloc logs -stderr {allocation.id} {TASK}` "
            f"shows what it says{'; it was killed, perhaps as `memory` is too little for it' if killed else ''}"
            f"\n{_events(allocation)}" + (f"\nits last words:\n{last}" if last else "")
        )
    return None


def has_given_up(allocation: Allocation) -> bool:
    """Whether its server has ended too often."""
    return allocation.status is AllocationStatus.FAILED or any(
        _GIVEN_UP in event.message.lower() for event in allocation.events
    )


def _events(allocation: Allocation) -> str:
    last = allocation.events[-_LAST_EVENTS:]
    return "\n".join(f"  {event.type}: {event.message}" for event in last) or "  no events"


def of_evaluations(evaluations: Sequence[Evaluation], missing: int) -> StartFailed | None:
    """Why the newest decision of the scheduler did not place containers, if ``missing`` of them still are not there."""
    if missing <= 0:
        return None
    for evaluation in reversed(evaluations):
        if evaluation.status == "pending":  # what an earlier one says may be out of date
            return None
        if evaluation.status in ("complete", "failed", "blocked") and (evaluation.failed or evaluation.status == "complete"):
            placement = evaluation.failed.get(GROUP)
            return PlacementFailed(_unplaced(placement, missing)) if placement is not None else None
    return None


def _unplaced(placement: Placement, missing: int) -> str:
    reasons: list[str] = []
    hint = "`nomad node status` shows the nodes"
    if not placement.nodes_evaluated and not any(placement.nodes_available.values()):
        where = ", ".join(placement.nodes_available) or "the datacenters asked for"
        reasons.append(f"no node is ready in {where}")
        hint += "; `datacenter` and `node_pool` choose among them"
    drivers = [constraint for constraint in placement.constraints if "missing drivers" in constraint.lower()]
    if drivers:
        reasons.append(f"the driver is missing on {placement.constraints[drivers[0]]} node(s)")
        hint = "`nomad node status -verbose NODE` shows a node's drivers; `driver` chooses another"
    reasons += [
        f"{constraint} rules out {n} node(s)" for constraint, n in placement.constraints.items() if constraint not in drivers
    ]
    if placement.dimensions:
        reasons += [f"{dimension} is used up on {n} node(s)" for dimension, n in placement.dimensions.items()]
        hint = (
            "lower `cpu` or `memory`, or max_containers; or add nodes. `nomad node status -self -stats` shows what a node has"
        )
    reasons += [f"the quota is used up: {quota}" for quota in placement.quota]
    return f"{missing} container(s) find no node: {'; '.join(reasons) or 'Nomad does not say why'}; {hint}"


def describe(job_id: str, count: int, allocations: Sequence[Allocation], addresses: Mapping[str, str]) -> str:
    """The containers' states, for the message of a wait that has run out."""
    now = [allocation for allocation in latest(allocations) if allocation.desired == "run"]
    states = ", ".join(f"{n} {status.value}" for status in AllocationStatus if (n := sum(one.status is status for one in now)))
    lines = [f"job {job_id} with a count of {count}: {states or 'no allocation'}"]
    for allocation in [one for one in now if not one.runs or one.id not in addresses][:_MOST_LISTED]:
        last = allocation.events[-1].message if allocation.events else "no events"
        address = addresses.get(allocation.id, "no address")
        lines.append(f"  {allocation.id[:8]} on {allocation.node}: {allocation.status.value}, {address}, last event: {last}")
    return "\n".join(lines)
