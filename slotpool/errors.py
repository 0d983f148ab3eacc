"""Every exception that slotpool raises, below one root, :class:`SlotPoolError`. All can be pickled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .slot import ExecutionResult


class SlotPoolError(Exception):
    """Root of all errors of this library."""


class _FieldError(SlotPoolError, ValueError):
    """A value that can't be used.

    :ivar field: its name.
    :ivar expected: what it should have been, in words.
    :ivar got: what it was, as ``repr`` shows it, cut short.
    """

    def __init__(self, field: str, expected: str, got: str) -> None:
        super().__init__(field, expected, got)
        self.field = field
        self.expected = expected
        self.got = got

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, got {self.got}"


class ConfigError(_FieldError):
    """A setting is out of range, of the wrong type or unknown. Nothing was started."""


class InvalidRequest(_FieldError):
    """An argument of a call can't be used. Nothing was done; the lease and the slot are as before."""


def shown(value: object) -> str:
    """``repr`` of ``value``, cut short, for the ``got`` of an error."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


class PoolClosed(SlotPoolError, RuntimeError):
    """The pool is not started, has been stopped, or belongs to the process that this one was forked from."""


class AcquireTimeout(SlotPoolError, TimeoutError):
    """No slot became free in time; the message says what the pool was waiting for. Safe to try again."""


class StartFailed(SlotPoolError):
    """A pool or a sandbox server could not start; what it had started is ended again."""


class IsolationUnavailable(StartFailed):
    """The isolation asked for does not work on this machine, and the message says what to install; or a container that stood
    already has another.
    """


class ImageUnavailable(StartFailed):
    """The containers' image is not there and can't be pulled."""


class ImageBuildFailed(ImageUnavailable):
    """The containers' image is not there and could not be built; the message ends with the build's last lines."""


class CrashLoop(StartFailed):
    """The server in a container does not start, or ends each time; the message has the last events."""


class PlacementFailed(StartFailed):
    """No node of the cluster can take a container; the message says what is lacking."""


class JobDiffers(StartFailed):
    """A job of that id stands, and is not what the configuration describes; the message lists each difference."""


class SandboxStartFailed(StartFailed):
    """One slot's sandbox could not be made."""


class NomadError(SlotPoolError):
    """Nomad refused a request, in its own words.

    :ivar status: of the answer; None if there was none, or none that could be read.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message, status)
        self.message = message
        self.status = status

    def __str__(self) -> str:
        return self.message


class NomadUnreachable(NomadError):
    """There is no answer from Nomad. Safe to try again, but that a change which was asked for may have been made."""


class NomadDenied(NomadError):
    """The ACL token does not allow it; the message names the capability that is missing."""


class SlotError(SlotPoolError):
    """A call into a slot failed in a way that is not the command's own doing.

    :ivar may_have_run: whether the command (or the write) may have been carried out. If False, it is safe to try again.
    """

    def __init__(self, message: str, may_have_run: bool = False) -> None:
        super().__init__(message, may_have_run)
        self.message = message
        self.may_have_run = may_have_run

    def __str__(self) -> str:
        return f"{self.message} ({'it may have run' if self.may_have_run else 'it has not run'})"


class LeaseLost(SlotError):
    """The slot is no longer this caller's: the lease was released, expired, or the container has restarted.

    Whatever was in the workspace is gone, and every process of the lease is dead. Acquire another slot.
    """


class SlotBroken(SlotError):
    """The slot's processes were lost during the call (killed from inside, or out of memory).

    The lease and the workspace stand; background processes are gone; the next call works.
    """


class ContainerLost(SlotError):
    """The container does not answer. Its slots are lost to this pool unless it answers again before they expire."""


class ContainerRefused(SlotError):
    """The container refused the request as a whole: a wrong bearer token, or an answer that is not slotpool's."""


class CommandFailed(SlotPoolError):
    """Raised by :meth:`ExecutionResult.check` and ``check=True``: a non-zero exit, a signal or a time-out.

    :ivar result: the whole :class:`ExecutionResult`.
    """

    def __init__(self, result: ExecutionResult) -> None:
        super().__init__(result)
        self.result = result

    def __str__(self) -> str:
        result = self.result
        how = (
            "timed out"
            if result.timed_out
            else f"was killed by signal {result.signal}"
            if result.signal
            else f"exited with {result.exit_code}"
        )
        last = result.stderr.strip() or result.stdout.strip()
        return f"the command {how}" + (f": {last[-500:]}" if last else "")


class SetupFailed(SlotPoolError):
    """A step of a slot's setup failed; what it raised is the ``__cause__``.

    :ivar number: of the step, from 1.
    :ivar steps: how many there are.
    :ivar step: what it was: the command's first line, or the function's name.
    :ivar why: what went wrong with it, in words.
    :ivar result: the command's whole :class:`ExecutionResult`; None if the step was a function, or was not run to its end.
    """

    def __init__(self, number: int, steps: int, step: str, why: str, result: ExecutionResult | None = None) -> None:
        super().__init__(number, steps, step, why, result)
        self.number = number
        self.steps = steps
        self.step = step
        self.why = why
        self.result = result

    def __str__(self) -> str:
        return f"setup, step {self.number} of {self.steps}, {self.step}: {self.why}"


class FileError(SlotPoolError, OSError):
    """A file in a slot could not be read or written; ``errno`` and ``filename`` are set. An earlier content is unharmed."""

    def __init__(self, errno: int, strerror: str, filename: str) -> None:
        super().__init__(errno, strerror, filename)

    def __reduce__(self) -> Any:
        return type(self), (self.errno, self.strerror, self.filename)
