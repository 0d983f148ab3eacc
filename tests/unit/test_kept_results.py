"""How much is kept of what has run in a lease, for who asks again."""

from __future__ import annotations

from typing import cast

import pytest

from slotpool.sandbox.executions import Executions
from slotpool.sandbox.protocol import RequestFailed, Result

REQUEST = ("bash", {"command": "cat long"}, 5.0)
KEPT = 16 << 20  # characters
HALF = "x" * (KEPT // 32)


def run(executions: Executions, execution_id: str, stdout: str, stderr: str) -> None:
    execution, _ = executions.begin(execution_id, REQUEST)
    execution.result = cast("Result", {"stdout": stdout, "stderr": stderr})
    executions.finish(execution_id, execution)


def kept(executions: Executions, execution_id: str) -> bool:
    """Whether its result is; that it has run is known in any case."""
    execution, is_new = executions.begin(execution_id, REQUEST)
    assert not is_new
    try:
        execution.answer()
    except RequestFailed as e:
        return e.body["code"] != "result_gone"
    return True


@pytest.mark.parametrize(("stdout", "stderr"), [(HALF, HALF), (HALF * 2, ""), ("", HALF * 2)], ids=["both", "stdout", "stderr"])
def test_results_are_kept_up_to_a_number_of_characters(stdout: str, stderr: str) -> None:
    executions = Executions()
    for number in range(16):
        run(executions, str(number), stdout, stderr)
    assert all(kept(executions, str(number)) for number in range(16))
    run(executions, "one more", "x", "")
    assert [kept(executions, str(number)) for number in range(16)] == [False] + [True] * 15
    run(executions, "as many again", stdout, stderr)  # what is gone counts no more
    assert [kept(executions, str(number)) for number in range(16)] == [False] * 2 + [True] * 14


def test_the_last_result_is_kept_however_long_it_is() -> None:
    executions = Executions()
    for execution_id in ("first", "last"):
        run(executions, execution_id, HALF * 33, "")
    assert (kept(executions, "first"), kept(executions, "last")) == (False, True)
