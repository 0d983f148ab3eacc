"""Talk to one sandbox server, see :mod:`.protocol`: what to repeat, for how long, and what to raise in the end."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any, Callable, TypeVar

from ..errors import ContainerLost, ContainerRefused, FileError, SlotBroken, SlotError, SlotPoolError
from . import logs, protocol
from .protocol import LEASE_HEADER, CallRequest, LeaseAnswer, RenewAnswer, Result
from .transport import Broken, Cut, NotSent, Transport

log = logging.getLogger(__name__)

_HOLD = 20.0  # seconds that one request waits for a result, so that a server that has vanished is noticed
_SLACK = 10.0  # seconds more than its work takes that a server may be silent
_ENDING = 3.0  # seconds that a server takes at most to end a command whose time is up
_PAUSES = (0.05, 0.2, 0.5)  # before each repetition, in seconds
_MOST_CALLS = 1000  # of a batch that go in one request
_RETRIES = 2  # of a command that certainly has not run
_TRIED_AGAIN = ("slot_broken", "overloaded")  # and no result_gone, with which a call answers that was cancelled before it came
_LEAST = 0.2  # seconds between two requests for the same result
_CANCEL_TIMEOUT = 3.0
_FILE_TIMEOUT = 330.0

T = TypeVar("T")


class SandboxClient:
    """One container's server. Thread-safe.

    :param address: ``http://host:port``, ``https://host:port`` or ``unix:///path``.
    :param token: the server's bearer token.
    :param connections: how many to keep open.
    :param cacert: file of the certificates by which an ``https`` server's is checked, instead of the system's.
    """

    def __init__(self, address: str, token: str | None = None, connections: int = 10, cacert: str | None = None) -> None:
        self.address = address
        self._http = Transport(address, token, connections, cacert)

    def close(self) -> None:
        self._http.close()

    def health(self, timeout: float = _SLACK, repeat: bool = True) -> dict[str, Any]:
        """``GET /health``. Safe to repeat.

        :param repeat: try again if there is no answer.
        :raises ContainerLost: if there is none.
        """

        def ask() -> tuple[int, Any]:
            return self._http.json("GET", "/health", None, timeout)

        return self._dict(self._repeat(ask) if repeat else self._once(ask))

    def lease(self, owner: str, ttl: float, take: int, release: Sequence[str] = (), wait: float = 0.0) -> LeaseAnswer:
        """``POST /v1/leases``: give leases back, then take up to ``take``. Not repeated once it may have been sent: leases
        whose grant is lost on the way end by themselves after ``ttl`` seconds.
        """
        body = {"owner": owner, "ttl": ttl, "take": take, "release": list(release), "wait": wait}
        answer: Any = self._dict(
            self._repeat(lambda: self._http.json("POST", "/v1/leases", body, wait + _SLACK), once_sent=False)
        )
        return answer  # type: ignore[no-any-return]

    def renew(self, tokens: Sequence[str], timeout: float = _SLACK) -> RenewAnswer:
        """``POST /v1/leases/renew``. Not repeated."""
        renewed: Any = self._dict(
            self._once(lambda: self._http.json("POST", "/v1/leases/renew", {"tokens": list(tokens)}, timeout))
        )
        return renewed  # type: ignore[no-any-return]

    def cordon(self, owner: str, ttl: float, release: Sequence[str] = ()) -> bool:
        """``POST /v1/cordon``; whether it is so. Safe to repeat."""
        body = {"owner": owner, "ttl": ttl, "release": list(release)}
        return bool(self._dict(self._repeat(lambda: self._http.json("POST", "/v1/cordon", body, _SLACK)))["cordoned"])

    def execute(
        self,
        slot: str,
        lease: str,
        tool: str,
        args: Mapping[str, Any],
        timeout: float,
        execution_id: str | None = None,
    ) -> Result:
        """Run a tool, at most once, and wait for its result.

        The request carries an id, so that it is repeated after a broken connection without being run again. An interrupt
        (Ctrl-C) ends the command before it is raised on.

        What certainly has not run is tried twice more, under another id, unless one is given.

        :param timeout: seconds until the command is killed; the request's own limits follow from it.
        :raises SlotError: ``may_have_run`` tells whether a repetition by the caller could run it twice.
        :raises InvalidRequest: nothing was run.
        """
        for _ in range(_RETRIES):
            try:
                return self._execute(slot, lease, tool, args, timeout, execution_id or new_execution_id())
            except SlotBroken as e:
                if e.may_have_run or execution_id is not None:
                    raise
        return self._execute(slot, lease, tool, args, timeout, execution_id or new_execution_id())

    def _execute(self, slot: str, lease: str, tool: str, args: Mapping[str, Any], timeout: float, execution_id: str) -> Result:
        request = {"execution_id": execution_id, "tool": tool, "args": args, "timeout": timeout}
        call = {**request, "slot": slot, "lease": lease}
        path, headers = f"/v1/slots/{slot}/execute", {LEASE_HEADER: lease}
        begun = time.monotonic()
        deadline = begun + timeout + _ENDING + _SLACK
        pause: _Pause | None = None
        runs = False
        logs.execution(log, call, None, self.address)

        def ask() -> tuple[int, Any]:
            left = deadline - _SLACK - time.monotonic()
            request["wait"] = wait = _HOLD if left > _HOLD else max(0.0, left)
            return self._http.json("POST", path, request, wait + _SLACK, headers)

        try:
            while True:
                status, body, repeated = self._repeat(ask, runs=runs)
                if status != 202:
                    # Of what runs, slot_broken tells itself whether it has begun; the others tell of the request.
                    runs = runs and status != protocol.STATUS["slot_broken"]
                    result: Any = self._dict((status, body, repeated or runs))
                    logs.execution(log, call, result, self.address)
                    return result  # type: ignore[no-any-return]
                runs = True
                if time.monotonic() > deadline:
                    raise self._lost(f"the command should have ended {_ENDING + _SLACK:.0f} s ago", True)
                pause = pause or _Pause(begun)
                pause()
        except SlotPoolError as e:
            logs.execution(log, call, e, self.address)
            raise
        except BaseException as e:  # an interrupt, or what a signal's handler raises
            if self.cancel_quietly(slot, lease, execution_id):
                self._wait_quietly(path, {**request, "wait": _CANCEL_TIMEOUT}, headers)
            logs.execution(log, call, e, self.address)
            raise

    def batch(self, calls: Sequence[CallRequest], cancelled: threading.Event | None = None) -> list[object]:
        """Run many calls of this container's slots side by side, each at most once; for each, in order, its result or the
        exception that :meth:`execute` would have raised.

        As there, what certainly has not run is tried twice more; such a call's ``execution_id`` is replaced. Of more than a
        thousand calls, each thousand begins when the one before it has ended.

        :param cancelled: if another thread sets it, and then cancels the calls by their ids, none is tried again.
        """
        if len(calls) > _MOST_CALLS:
            return self.batch(calls[:_MOST_CALLS], cancelled) + self.batch(calls[_MOST_CALLS:], cancelled)
        retries = [_RETRIES] * len(calls)
        deadline = time.monotonic() + max(call["timeout"] for call in calls) + _ENDING + _SLACK
        found: list[Any] = [None] * len(calls)
        open_: list[int] = list(range(len(calls)))
        running: set[int] = set()  # of them, as the server told last
        for call in calls:
            logs.execution(log, call, None, self.address)

        pause = _Pause(time.monotonic())

        def ask() -> tuple[int, Any]:
            wait = max(0.0, min(_HOLD, deadline - _SLACK - time.monotonic()))
            return self._http.json("POST", "/v1/batch", {"calls": [calls[i] for i in open_], "wait": wait}, wait + _SLACK)

        try:
            while open_:
                if time.monotonic() > deadline:
                    raise self._lost(f"the commands should have ended {_ENDING + _SLACK:.0f} s ago", True)
                status, body, repeated = self._repeat(ask, runs=bool(running))
                answers = self._dict((status, body, repeated or bool(running)))["results"]
                anew = False
                for i, answer in zip(open_, answers):
                    if isinstance(answer.get("error"), dict):  # a result's own "error" is a string
                        code = answer["error"].get("code")
                        runs = i in running and code != "slot_broken"  # see _execute()
                        failure = found[i] = protocol.to_exception(0, answer, repeated or runs)
                        if code in _TRIED_AGAIN and not _may_have_run(failure) and retries[i]:
                            retries[i] -= 1
                            logs.execution(log, calls[i], failure, self.address)
                            calls[i]["execution_id"] = new_execution_id()
                            if cancelled is None or not cancelled.is_set():
                                logs.execution(log, calls[i], None, self.address)
                                found[i] = None
                                anew = True
                                deadline = max(deadline, time.monotonic() + calls[i]["timeout"] + _ENDING + _SLACK)
                    elif "running" not in answer:
                        found[i] = answer
                running = {i for i, answer in zip(open_, answers) if "running" in answer}
                open_ = [i for i in open_ if found[i] is None]
                if open_ and not anew:
                    pause()
        except SlotPoolError as e:
            for i in open_:
                found[i] = e
                if time.monotonic() > deadline:
                    self.cancel_quietly(calls[i]["slot"], calls[i]["lease"], calls[i]["execution_id"])
        except BaseException as e:
            open_calls = [calls[i] for i in open_]
            known = [one for one in open_calls if self.cancel_quietly(one["slot"], one["lease"], one["execution_id"])]
            if known:
                self._wait_quietly("/v1/batch", {"calls": known, "wait": _CANCEL_TIMEOUT})
            for one in open_calls:
                logs.execution(log, one, e, self.address)
            raise
        for call, end in zip(calls, found):
            logs.execution(log, call, end, self.address)
        return found

    def cancel_quietly(self, slot: str, lease: str, execution_id: str) -> bool:
        """Kill an execution if it runs, and don't wait for its end; whether the server has been told, and so knows the id.

        A failure is logged, not raised: the lease's end kills it anyway.
        """
        path, headers = f"/v1/slots/{slot}/cancel", {LEASE_HEADER: lease}
        try:
            status, _ = self._http.json("POST", path, {"execution_id": execution_id}, _CANCEL_TIMEOUT, headers)
        except (NotSent, Broken) as e:
            log.warning("could not cancel execution %s in %s of %s: %s", execution_id, slot, self.address, e)
            return False
        return status == 200

    def _wait_quietly(self, path: str, body: dict[str, Any], headers: Mapping[str, str] | None = None) -> None:
        """Wait for the end of what has been cancelled, so that it does not run beside what comes next. As its id is known,
        this does not start it.
        """
        try:
            self._http.json("POST", path, body, 2 * _CANCEL_TIMEOUT, headers)
        except (NotSent, Broken) as e:
            log.warning("could not wait for the end of what was cancelled in %s: %s", self.address, e)

    def reset(self, slot: str, lease: str, network: bool | None = None) -> bool:
        """Empty the slot and kill its processes, keeping the lease; whether it has network. Safe to repeat."""
        path, headers = f"/v1/slots/{slot}/reset", {LEASE_HEADER: lease}
        answer = self._repeat(lambda: self._http.json("POST", path, {"network": network}, 3 * _SLACK, headers))
        return bool(self._dict(answer)["network"])

    def read_file(self, slot: str, lease: str, path: str) -> bytes:
        """The content of a file. Safe to repeat.

        :raises FileError: as the slot's own processes would see it.
        """
        headers = {LEASE_HEADER: lease}
        try:
            status, content, repeated = self._repeat(
                lambda: self._http.request("GET", _file(slot, path), None, _FILE_TIMEOUT, headers)
            )
        except ContainerLost as e:
            if isinstance(e.__cause__, Cut):  # the server answers, and can't send what it has promised
                raise FileError(errno.EIO, "each try to read it ended early; it changes, or its slot prevents it", path) from e
            raise
        if status != 200:
            raise self._refused(status, content, repeated)
        return content

    def write_file(self, slot: str, lease: str, path: str, content: bytes) -> None:
        """Replace a file, as a whole or not at all; directories on the way are made. Safe to repeat.

        :raises FileError: as the slot's own processes would see it.
        """
        headers = {LEASE_HEADER: lease, "Content-Type": "application/octet-stream"}
        status, answer, repeated = self._repeat(
            lambda: self._http.request("PUT", _file(slot, path), content, _FILE_TIMEOUT, headers)
        )
        if status != 204:
            raise self._refused(status, answer, repeated)

    def _once(self, ask: Callable[[], tuple[int, T]]) -> tuple[int, T, bool]:
        """Ask, and don't repeat it.

        :raises ContainerLost:
        """
        try:
            return (*ask(), False)
        except (NotSent, Broken) as e:
            raise self._lost(str(e), False) from e

    def _repeat(self, ask: Callable[[], tuple[int, T]], once_sent: bool = True, runs: bool = False) -> tuple[int, T, bool]:
        """Ask until there is an answer; the answer, and whether an earlier try may have reached the server.

        :param once_sent: also ask again after a try that may have reached it.
        :param runs: what is asked for has begun, as an earlier answer told.
        :raises ContainerLost: after the last try.
        """
        sent = False
        for pause in (*_PAUSES, None):
            try:
                return (*ask(), sent)
            except NotSent as e:
                failure: Exception = e
            except Broken as e:
                failure, sent = e, True
                if not once_sent:
                    break
            if pause is None or self._http.closed:
                break
            log.info("asking %s again: %s", self.address, failure)
            time.sleep(pause)
        raise self._lost(str(failure), sent or runs) from failure

    def _lost(self, why: str, may_have_run: bool) -> ContainerLost:
        return ContainerLost(f"no answer from the container at {self.address}: {why}", may_have_run)

    def _dict(self, answer: tuple[int, Any, bool]) -> dict[str, Any]:
        status, body, repeated = answer
        if status != 200:
            raise protocol.to_exception(status, body, repeated)
        if not isinstance(body, dict):
            raise ContainerRefused(
                f"{self.address} answered with something else than a JSON object; is it a sandbox server?", True
            )
        return body

    @staticmethod
    def _refused(status: int, content: bytes, repeated: bool) -> SlotPoolError:
        try:
            body = protocol.parse(content)
        except ValueError:
            body = None
        return protocol.to_exception(status, body, repeated)


def new_execution_id() -> str:
    return os.urandom(16).hex()


def _may_have_run(failure: Exception) -> bool:
    return not isinstance(failure, SlotError) or failure.may_have_run


class _Pause:
    """Between two requests for the same result: none, if the server has held the first one; it need not."""

    def __init__(self, begun: float) -> None:
        """:param begun: when the first one was sent, on the monotonic clock."""
        self._last = begun

    def __call__(self) -> None:
        time.sleep(max(0.0, self._last + _LEAST - time.monotonic()))
        self._last = time.monotonic()


def _file(slot: str, path: str) -> str:
    quoted = urllib.parse.quote(path.encode("utf-8", "surrogateescape"), safe="")
    return f"/v1/slots/{slot}/file?path={quoted}"
