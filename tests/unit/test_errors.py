"""The exceptions: one root, the built-in kinds they also are, what they say, and that they travel between processes."""

from __future__ import annotations

import copy
import errno
import pickle
import signal
from typing import Callable

import pytest

from slotpool import ExecutionResult, errors
from slotpool.errors import SlotPoolError, shown

RESULT = ExecutionResult(success=False, exit_code=3, stdout="out\n", stderr="err\n", metadata={"isolation": "none"})
INSTANCES: list[SlotPoolError] = [
    errors.SlotPoolError("m"),
    errors.ConfigError("field", "an integer", "'x'"),
    errors.InvalidRequest("field", "an integer", "'x'"),
    errors.PoolClosed("m"),
    errors.AcquireTimeout("m"),
    errors.StartFailed("m"),
    errors.IsolationUnavailable("m"),
    errors.SandboxStartFailed("m"),
    errors.ImageUnavailable("m"),
    errors.ImageBuildFailed("m"),
    errors.CrashLoop("m"),
    errors.PlacementFailed("m"),
    errors.JobDiffers("m"),
    errors.NomadError("m", 500),
    errors.NomadUnreachable("m"),
    errors.NomadDenied("m", 403),
    errors.SlotError("m", True),
    errors.LeaseLost("m"),
    errors.SlotBroken("m", may_have_run=True),
    errors.ContainerLost("m", True),
    errors.ContainerRefused("m", False),
    errors.CommandFailed(RESULT),
    errors.SetupFailed(2, 3, "'make'", "the command exited with 2", RESULT),
    errors.FileError(errno.ENOENT, "No such file or directory", "a/b"),
]


def test_every_exception_is_among_the_instances_here() -> None:
    defined = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, BaseException)}
    assert {kind for kind in defined if not kind.__name__.startswith("_")} == {type(one) for one in INSTANCES}
    assert all(issubclass(kind, SlotPoolError) for kind in defined)


@pytest.mark.parametrize("error", INSTANCES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "travel", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy, copy.deepcopy], ids=["pickle", "copy", "deepcopy"]
)
def test_every_exception_can_be_pickled_and_copied(
    error: SlotPoolError, travel: Callable[[SlotPoolError], SlotPoolError]
) -> None:
    arrived = travel(error)
    assert type(arrived) is type(error)
    assert str(arrived) == str(error)
    assert arrived.args == error.args
    assert vars(arrived) == vars(error)
    for name in ("errno", "strerror", "filename"):
        assert getattr(arrived, name, None) == getattr(error, name, None)


@pytest.mark.parametrize(
    ("kind", "built_in"),
    [
        (errors.ConfigError, ValueError),
        (errors.InvalidRequest, ValueError),
        (errors.PoolClosed, RuntimeError),
        (errors.AcquireTimeout, TimeoutError),
        (errors.FileError, OSError),
    ],
)
def test_what_has_a_built_in_kind_is_caught_as_that(kind: type[SlotPoolError], built_in: type[Exception]) -> None:
    assert issubclass(kind, built_in)


@pytest.mark.parametrize("kind", [errors.ConfigError, errors.InvalidRequest])
def test_a_refused_value_is_named_with_what_was_expected_and_got(kind: type[errors.ConfigError]) -> None:
    error = kind("cpu", "an integer from 1 to 5", "'x'")
    assert (error.field, error.expected, error.got) == ("cpu", "an integer from 1 to 5", "'x'")
    assert str(error) == "cpu: expected an integer from 1 to 5, got 'x'"


def test_a_slot_error_says_whether_the_command_may_have_run() -> None:
    assert errors.LeaseLost("gone").may_have_run is False
    assert str(errors.LeaseLost("gone")) == "gone (it has not run)"
    assert str(errors.ContainerLost("gone", True)) == "gone (it may have run)"
    assert errors.ContainerLost("gone", True).message == "gone"


def test_a_file_error_is_an_os_error_with_its_fields() -> None:
    error = errors.FileError(errno.EACCES, "Permission denied", "a/b")
    assert (error.errno, error.strerror, error.filename) == (errno.EACCES, "Permission denied", "a/b")
    assert str(error) == f"[Errno {errno.EACCES}] Permission denied: 'a/b'"


def _failed(**fields: object) -> str:
    return str(errors.CommandFailed(ExecutionResult(success=False, **fields)))  # type: ignore[arg-type]


def test_a_failed_command_says_how_it_ended_and_what_it_printed_last() -> None:
    assert _failed(exit_code=3) == "the command exited with 3"
    assert _failed(exit_code=3, stdout="out\n", stderr="err\n") == "the command exited with 3: err"
    assert _failed(exit_code=3, stdout="out\n", stderr=" \n") == "the command exited with 3: out"
    assert _failed(exit_code=128 + signal.SIGKILL, signal=signal.SIGKILL) == "the command was killed by signal 9"
    assert _failed(exit_code=137, signal=9, timed_out=True) == "the command timed out"


def test_a_failed_command_that_printed_much_does_not_make_a_long_message() -> None:
    said = _failed(exit_code=1, stderr="x" * 100_000 + "the end")
    assert said.endswith("the end")
    assert len(said) < 1000


def test_check_raises_on_failure_and_returns_the_result_else() -> None:
    with pytest.raises(errors.CommandFailed) as caught:
        RESULT.check()
    assert caught.value.result is RESULT
    fine = ExecutionResult(success=True)
    assert fine.check() is fine


def test_shown_is_repr_and_cut_short() -> None:
    assert shown("it's") == repr("it's")
    assert shown("x" * 98) == repr("x" * 98)
    cut = shown("x" * 1000)
    assert len(cut) < 120
    assert cut.startswith("'xxx")
    assert "(1002 characters)" in cut
