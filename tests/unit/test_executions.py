"""At most once: what is known of the executions of a lease."""

from __future__ import annotations

import threading

import pytest
from conftest import wait_until

from slotpool.errors import SlotPoolError
from slotpool.sandbox.executions import Execution, Executions
from slotpool.sandbox.protocol import RequestFailed, Result, to_exception

REQUEST = ("bash", {"command": "true"}, 5.0)
KEPT = 256  # results; as the protocol's 410 says, older ones are gone
MANY = 10_000


def result(stdout: str = "") -> Result:
    return {
        "execution_id": "an-id",
        "stdout": stdout,
        "stderr": "",
        "exit_code": 0,
        "signal": None,
        "timed_out": False,
        "cancelled": False,
        "stdout_truncated": False,
        "stderr_truncated": False,
        "error": "",
        "duration": 0.0,
        "isolation": "none",
        "network": True,
        "restarted": False,
    }


def begin(executions: Executions, execution_id: str) -> Execution:
    execution, is_new = executions.begin(execution_id, REQUEST)
    assert is_new
    return execution


def run(executions: Executions, execution_id: str) -> Execution:
    execution = begin(executions, execution_id)
    execution.result = result(execution_id)
    executions.finish(execution_id, execution)
    return execution


def refusal(execution: Execution) -> SlotPoolError:
    """What a client makes of an answer that is no result."""
    with pytest.raises(RequestFailed) as caught:
        execution.answer()
    return to_exception(caught.value.status, {"error": caught.value.body}, False)


def test_an_id_is_new_once_and_joined_from_then_on() -> None:
    executions = Executions()
    first = begin(executions, "x")
    again, is_new = executions.begin("x", REQUEST)
    assert (again is first, is_new) == (True, False)
    first.result = result("done")
    executions.finish("x", first)
    after, is_new = executions.begin("x", REQUEST)
    assert not is_new
    assert after.done
    assert after.answer()["stdout"] == "done"


def test_an_equal_request_is_the_same_request() -> None:
    executions = Executions()
    first = begin(executions, "x")
    again, is_new = executions.begin("x", ("bash", {"command": "".join(["tr", "ue"])}, 5.0))
    assert (again is first, is_new) == (True, False)


@pytest.mark.parametrize(
    "other", [("bash", {"command": "false"}, 5.0), ("bash", {"command": "true"}, 6.0), ("read_file", {"command": "true"}, 5.0)]
)
def test_an_id_that_was_used_for_another_request_is_refused(other: tuple[object, ...]) -> None:
    executions = Executions()
    run(executions, "x")
    with pytest.raises(RequestFailed) as caught:
        executions.begin("x", other)
    assert caught.value.body["code"] == "invalid_request"
    assert caught.value.body["field"] == "execution_id"
    assert executions.begin("x", REQUEST)[0].answer()["stdout"] == "x"


def test_of_many_threads_with_one_id_one_is_to_run_it() -> None:
    executions = Executions()
    barrier = threading.Barrier(8)
    found: list[tuple[Execution, bool]] = []

    def ask() -> None:
        barrier.wait()
        found.append(executions.begin("x", REQUEST))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(is_new for _, is_new in found) == [False] * 7 + [True]
    assert len({id(execution) for execution, _ in found}) == 1


def test_who_joins_is_woken_by_the_end() -> None:
    executions = Executions()
    execution = begin(executions, "x")
    answers: list[str] = []

    def join() -> None:
        joined, _ = executions.begin("x", REQUEST)
        assert executions.wait(joined, threading.TIMEOUT_MAX)
        answers.append(joined.answer()["stdout"])

    threads = [threading.Thread(target=join, daemon=True) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert wait_until(lambda: executions._waiting == 3)
    execution.result = result("done")
    executions.finish("x", execution)
    for thread in threads:
        thread.join()
    assert answers == ["done"] * 3


def test_a_failure_is_kept_like_a_result() -> None:
    executions = Executions()
    execution = begin(executions, "x")
    execution.failure = RequestFailed("slot_broken", "its processes were lost", may_have_run=True)
    executions.finish("x", execution)
    again, _ = executions.begin("x", REQUEST)
    assert again.done
    with pytest.raises(RequestFailed, match="its processes were lost"):
        again.answer()


def test_the_last_results_are_kept_and_older_ones_are_gone_but_not_run_again() -> None:
    executions = Executions()
    for i in range(KEPT + 1):
        run(executions, str(i))
    for i in range(1, KEPT + 1):
        assert executions.begin(str(i), REQUEST)[0].answer()["stdout"] == str(i)
    oldest, is_new = executions.begin("0", REQUEST)
    assert not is_new
    assert oldest.done
    with pytest.raises(RequestFailed) as caught:
        oldest.answer()
    assert caught.value.body["code"] == "result_gone"
    assert caught.value.status == 410
    assert to_exception(410, {"error": caught.value.body}, False).may_have_run  # type: ignore[attr-defined]


def test_an_old_failure_is_gone_like_a_result() -> None:
    executions = Executions()
    execution = begin(executions, "x")
    execution.failure = RequestFailed("internal", "oops")
    executions.finish("x", execution)
    for i in range(KEPT):
        run(executions, str(i))
    with pytest.raises(RequestFailed) as caught:
        executions.begin("x", REQUEST)[0].answer()
    assert caught.value.body["code"] == "result_gone"


def test_ids_stay_spent_long_after_their_results_are_gone() -> None:
    executions = Executions()
    for i in range(MANY):
        run(executions, str(i))
    assert not executions.begin("0", REQUEST)[1]


def test_a_running_execution_is_known_however_many_come_after_it() -> None:
    """Its client asks for it again and again until it ends; each time it must be joined, not run."""
    executions = Executions()
    long = begin(executions, "long")
    for i in range(MANY):
        run(executions, str(i))
    again, is_new = executions.begin("long", REQUEST)
    assert (again is long, is_new) == (True, False)
    assert executions.cancel("long")


def test_cancelling_calls_what_kills_it() -> None:
    executions = Executions()
    killed: list[str] = []
    execution = begin(executions, "x")
    executions.started(execution, lambda: killed.append("x"))
    assert executions.cancel("x")
    assert killed == ["x"]
    execution.result = result()
    executions.finish("x", execution)
    assert not executions.cancel("x")
    assert killed == ["x"]


def test_a_cancellation_while_it_starts_is_not_lost() -> None:
    executions = Executions()
    killed: list[str] = []
    execution = begin(executions, "x")
    assert executions.cancel("x")
    assert killed == []
    executions.started(execution, lambda: killed.append("x"))
    assert killed == ["x"]


def test_what_is_cancelled_before_it_comes_never_runs_and_nobody_waits_for_it() -> None:
    executions = Executions()
    assert not executions.cancel("x")
    execution, is_new = executions.begin("x", REQUEST)
    assert not is_new
    assert execution.done
    with pytest.raises(RequestFailed):
        execution.answer()


def test_what_is_cancelled_before_it_comes_is_not_said_to_have_run() -> None:
    executions = Executions()
    executions.cancel("x")
    error = refusal(executions.begin("x", REQUEST)[0])
    assert not error.may_have_run  # type: ignore[attr-defined]
    assert "has run" not in str(error)


def test_leases_do_not_know_each_others_executions() -> None:
    run(Executions(), "x")
    assert Executions().begin("x", REQUEST)[1]
