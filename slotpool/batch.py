"""Many calls at once: one request a container, the containers side by side."""

from __future__ import annotations

import contextlib
import functools
import secrets
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from . import abreast
from .container import Container
from .errors import LeaseLost, SlotPoolError
from .slot import ExecutionResult, Slot

if TYPE_CHECKING:
    from .sandbox.protocol import CallRequest

    Entry = tuple[Slot, CallRequest]


def entry(slot: Slot, tool: str, args: Mapping[str, Any], timeout: float) -> Entry:
    """One call, to be given to :func:`run`."""
    return slot, {
        "slot": slot.slot_id,
        "lease": slot._tenure.token,
        "execution_id": secrets.token_hex(16),
        "tool": tool,
        "args": dict(args),
        "timeout": timeout,
    }


def run(entries: Sequence[Entry]) -> list[ExecutionResult]:
    """The results, in order; what goes wrong with one call, or one container, is in its results only."""
    groups: dict[Container, list[int]] = {}
    for i, (slot, _) in enumerate(entries):
        groups.setdefault(slot._tenure.container, []).append(i)
    found: dict[int, ExecutionResult] = {}
    cancelled = threading.Event()

    def run_group(container: Container, numbers: Sequence[int]) -> None:
        found.update(zip(numbers, _run_in(container, [entries[i] for i in numbers], cancelled)))

    def cancel() -> None:
        cancelled.set()
        for slot, call in entries:
            slot._tenure.container.client.cancel_quietly(call["slot"], call["lease"], call["execution_id"])

    if len(groups) == 1:
        run_group(*next(iter(groups.items())))
    else:  # not in the pool's own threads: callers that wait for long commands must not keep it from renewing leases
        abreast.run([functools.partial(run_group, *group) for group in groups.items()], len(groups), cancel)
    return [found[i] for i in range(len(entries))]


def _run_in(container: Container, part: Sequence[Entry], cancelled: threading.Event) -> list[ExecutionResult]:
    answers: list[Any] = [None] * len(part)
    with contextlib.ExitStack() as stack:
        usable = []
        for i, (slot, _) in enumerate(part):
            try:
                stack.enter_context(slot._tenure.use())
                usable.append(i)
            except SlotPoolError as e:
                answers[i] = e
        if usable:
            for i, answer in zip(usable, container.client.batch([part[i][1] for i in usable], cancelled)):
                answers[i] = answer
    results = []
    for (slot, request), answer in zip(part, answers):
        if isinstance(answer, LeaseLost):
            slot._tenure.lose(answer.message)
        if isinstance(answer, Exception):
            results.append(ExecutionResult.failed(answer, request["execution_id"], slot.slot_id))
        else:
            results.append(ExecutionResult.of(answer, slot.slot_id))
    return results
