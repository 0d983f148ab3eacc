"""One execution as one request sees it."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import time
from typing import TYPE_CHECKING, Union

from . import logs, tools
from .capture import Job, Outcome
from .executions import Execution
from .protocol import CallRequest, RequestFailed, Result

if TYPE_CHECKING:
    from .host import Host

log = logging.getLogger(__name__)

# An execution's result, what it failed with, or None if it still runs.
Answer = Union[Result, RequestFailed, None]


def _internal(e: Exception) -> RequestFailed:
    return RequestFailed("internal", f"{type(e).__name__}: {e}")


def _told(call: CallRequest) -> str:
    """What tells this request from others; kept for as long as the id is, so a digest if it is long."""
    told = repr((call["tool"], call["args"], call["timeout"]))
    return told if len(told) <= 256 else hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()


class Run:
    """One execution as one request sees it: started by it, or joined."""

    def __init__(self, host: Host, call: CallRequest) -> None:
        self._host = host
        self._call = call
        self.job: Job | None = None
        self._failure: RequestFailed | None = None
        self._execution: Execution | None = None
        self._answer: Answer = None
        try:
            self._begin()
        except RequestFailed as e:
            self._failure = e
        except Exception as e:  # whatever it is, other calls of the request may have begun
            log.exception("an execution could not be begun", extra=self._ids())
            self._failure = _internal(e)

    def _begin(self) -> None:
        call = self._call
        self.tenancy = tenancy = self._host.tenancy(call["slot"], call["lease"])
        self._tool = tools.parse(call["tool"], call["args"], tenancy.setting)
        self._execution, is_new = tenancy.executions.begin(call["execution_id"], (_told(call),))
        if not is_new:
            return
        logs.execution(log, call, None)
        try:
            self.job = self._host.start(tenancy, self._tool, call["timeout"], self._finish)
        except Exception as e:
            if not isinstance(e, RequestFailed):
                log.exception("an execution could not be started", extra=self._ids())
            self._execution.failure = e if isinstance(e, RequestFailed) else _internal(e)
            self._host.tally.execution_began()
            self._host.tally.execution_ended(call["tool"], None)
            logs.execution(log, call, self._execution.failure.body["code"])
            tenancy.executions.finish(call["execution_id"], self._execution)
            return
        self._host.tally.execution_began()
        tenancy.executions.started(self._execution, self.job.call.cancel)

    def _finish(self) -> None:
        assert self.job is not None
        assert self._execution is not None
        try:
            restarted = self._host.check(self.job, self.tenancy, self._call["slot"], self._call["lease"])
            self._execution.result = self._result(self.job.outcome, restarted)
        except RequestFailed as e:
            self._execution.failure = e
        except Exception as e:  # whatever it is, the callers must not wait for ever
            log.exception("an execution could not be finished", extra=self._ids())
            self._execution.failure = _internal(e)
        self._answer = self._execution.result or self._execution.failure
        self._host.tally.execution_ended(self._call["tool"], self._execution.result)
        logs.execution(log, self._call, self._answer.body["code"] if isinstance(self._answer, RequestFailed) else self._answer)
        self.tenancy.executions.finish(self._call["execution_id"], self._execution)

    def _ids(self) -> dict[str, str]:
        """What tells log records of this execution from others'."""
        call = self._call
        return {"slot": call["slot"], "lease": logs.lease_id(call["lease"]), "execution_id": call["execution_id"]}

    def _result(self, outcome: Outcome, restarted: bool) -> Result:
        error, stderr = "", outcome.stderr.text()
        try:
            error = self._tool.error(outcome)
        except RequestFailed as e:
            if e.body["code"] != "file_error":
                raise
            error, stderr = f"{e.body['path']}: {e}", ""  # which was for the server to read
        status = outcome.status
        signum = os.WTERMSIG(status) if status is not None and os.WIFSIGNALED(status) else None
        if status is None or (outcome.timed_out and signum is None):
            signum = signal.SIGKILL
        return {
            "execution_id": self._call["execution_id"],
            "stdout": outcome.stdout.text(),
            "stderr": stderr,
            "exit_code": 128 + signum if signum else os.WEXITSTATUS(status or 0),
            "signal": signum,
            "timed_out": outcome.timed_out,
            "cancelled": outcome.cancelled,
            "stdout_truncated": outcome.stdout.truncated,
            "stderr_truncated": outcome.stderr.truncated,
            "error": error,
            "duration": outcome.duration,
            "isolation": self.tenancy.setting.isolation,
            "network": self.tenancy.setting.network,
            "restarted": restarted,
        }

    def answer(self, deadline: float) -> Answer:
        """The result, waited for until ``deadline``; the failure; or None."""
        if self._execution is None:
            return self._failure
        if self._answer is not None:  # what this run has found itself, which is sure to be kept
            return self._answer
        if not self.tenancy.executions.wait(self._execution, max(0.0, deadline - time.monotonic())):
            return None
        try:
            return self._execution.answer()
        except RequestFailed as e:
            return e.with_traceback(None)  # it is kept, and would keep this with it
