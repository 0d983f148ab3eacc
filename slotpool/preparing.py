"""A slot's setup: the steps that make it ready for its task, once for each clean workspace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Callable, Union

from .errors import CommandFailed, InvalidRequest, SetupFailed, shown

if TYPE_CHECKING:
    from .slot import Slot

# A bash command, or something that is called with the slot.
Step = Union[str, Callable[["Slot"], Any]]
Steps = Union[Step, Sequence[Step]]


def as_steps(given: Any) -> Any:
    """One step, many or none, as a tuple; what is none of these, as it is."""
    if given is None:
        return ()
    if isinstance(given, str) or callable(given):
        return (given,)
    return tuple(given) if isinstance(given, (list, tuple)) else given


def are_steps(value: Any) -> bool:
    return isinstance(value, tuple) and all((isinstance(step, str) and step.strip()) or callable(step) for step in value)


def steps_of(given: Any) -> tuple[Step, ...]:
    """
    :raises InvalidRequest: they are none.
    """
    steps = as_steps(given)
    if not are_steps(steps):
        raise InvalidRequest("setup", "bash commands, or functions of a slot", shown(given))
    found: tuple[Step, ...] = steps
    return found


def prepare(slot: Slot, steps: tuple[Step, ...], timeout: float) -> None:
    """Carry out those that have not been since the workspace was clean, one after the other.

    :param timeout: seconds for each command.
    :raises SetupFailed: with the step; those after it have not been carried out.
    """
    tenure = slot._tenure
    done = tenure.prepared
    for number, step in enumerate(steps, 1):
        if step in done:
            continue
        try:
            if isinstance(step, str):
                slot.bash(step, timeout=timeout, check=True)
            else:
                step(slot)
        except Exception as e:
            result = e.result if isinstance(step, str) and isinstance(e, CommandFailed) else None
            raise SetupFailed(number, len(steps), _name(step), str(e) or type(e).__name__, result) from e
        tenure.prepared += (step,)


def cause_of(error: BaseException) -> BaseException | None:
    """What a step has raised, if it is a setup that failed; else the error itself."""
    return error.__cause__ if isinstance(error, SetupFailed) else error


def _name(step: Step) -> str:
    if not isinstance(step, str):
        return str(getattr(step, "__qualname__", None) or shown(step))
    lines = step.strip().splitlines()
    return shown(lines[0] if len(lines) == 1 else f"{lines[0]} ...")
