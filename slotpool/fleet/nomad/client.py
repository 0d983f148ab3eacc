"""Nomad's HTTP API, as far as a pool needs it. https://developer.hashicorp.com/nomad/api-docs"""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import NomadError
from .connection import Connection
from .http import NomadHTTP
from .types import Allocation, Evaluation, Job, known_form, listed

_READ = "the namespace capability read-job"
_SUBMIT = "the namespace capability submit-job"
_CAS_FAILED = 409


class NomadClient:
    """Thread-safe. Every method raises :class:`~slotpool.errors.NomadError`; what is repeated, see :class:`.http.NomadHTTP`.

    :param connection: default: what the environment says (``NOMAD_ADDR``, ``NOMAD_TOKEN`` …).
    """

    def __init__(self, connection: Connection | None = None) -> None:
        self.connection = connection if connection is not None else Connection.of({})
        self._http = NomadHTTP(self.connection)

    def close(self) -> None:
        self._http.close()

    def interrupt(self) -> None:
        """Break off the blocking queries that other threads wait for; they fail. It can be used on."""
        self._http.interrupt()

    # Status

    def leader(self) -> str:
        """``GET /v1/status/leader``: the leader's address. Needs no token."""
        leader, _ = self._http.get("/v1/status/leader", "no capability")
        if not leader:
            raise NomadError("Nomad has no leader; `nomad server members` shows its servers", None)
        return str(leader)

    # Jobs

    def job(self, job_id: str) -> Job | None:
        """``GET /v1/job/ID``."""
        told, _ = self._http.get(_job(job_id), _READ)
        return _parsed(told)

    def watch_job(self, job_id: str, index: int, wait: float) -> tuple[Job | None, int]:
        """The same as a blocking query: once it has changed since ``index``, or after ``wait`` seconds."""
        told, index = self._http.get(_job(job_id), _READ, index=index, wait=wait)
        return _parsed(told), index

    def submit(self, body: Mapping[str, Any], *, if_unchanged_since: int | None = None) -> int:
        """``POST /v1/jobs``: register or update a job; its new ``modify_index``. Repeating it does no harm.

        :param if_unchanged_since: only if the job has this ``modify_index``; 0: only if there is none.
        """
        request: dict[str, Any] = {"Job": body}
        if if_unchanged_since is not None:
            request.update(EnforceIndex=True, JobModifyIndex=if_unchanged_since)
        told = self._http.write("POST", "/v1/jobs", _SUBMIT, request)
        with known_form("a job's registration"):
            return int(told.get("JobModifyIndex", 0))

    def plan(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """``POST /v1/job/ID/plan``: what :meth:`submit` would change (``Diff``) and fail to place. Changes nothing."""
        planned = self._http.write("POST", _job(str(body["ID"]), "/plan"), _SUBMIT, {"Job": body, "Diff": True})
        with known_form("a plan"):
            return dict(planned)

    def stop(self, job_id: str, *, purge: bool = False) -> None:
        """``DELETE /v1/job/ID``: end its allocations; with ``purge`` forget it. Nothing if there is none. Repeatable."""
        params = {"purge": "true"} if purge else {}
        self._http.write("DELETE", _job(job_id), _SUBMIT, params=params, missing_ok=True)

    def scale(self, job_id: str, group: str, count: int, message: str, *, if_unchanged_since: int = 0) -> int:
        """``POST /v1/job/ID/scale``; the job's new ``modify_index``. Repeatable.

        :param if_unchanged_since: only if the job has this ``modify_index``; 0: in any case.
        """
        body = {"Count": count, "Target": {"Group": group}, "Message": message, "JobModifyIndex": if_unchanged_since}
        told = self._http.write("POST", _job(job_id, "/scale"), "the namespace capability scale-job", body)
        with known_form("a scaling"):
            return int(told.get("JobModifyIndex", 0))

    # Allocations

    def allocations(
        self, job_id: str, index: int = 0, wait: float = 0.0, known: Mapping[str, Allocation] | None = None
    ) -> tuple[list[Allocation], int]:
        """``GET /v1/job/ID/allocations``; with ``wait`` a blocking query. Ports are not in it.

        :param known: by id; those that have not changed are returned as they are.
        """
        told, index = self._http.get(_job(job_id, "/allocations"), _READ, index=index, wait=wait)
        found = []
        with known_form("a job's allocations"):
            for one in listed(told):
                before = known.get(one["ID"]) if known else None
                same = before is not None and before.modify_index == one.get("ModifyIndex")
                found.append(before if same and before is not None else Allocation.parse(one))
        return found, index

    def allocation(self, allocation_id: str) -> dict[str, Any] | None:
        """``GET /v1/allocation/ID``: all of it, with its ports; see :func:`.types.address_of`."""
        told, _ = self._http.get(f"/v1/allocation/{allocation_id}", _READ)
        with known_form("an allocation"):
            return dict(told) if told is not None else None

    def allocations_with_resources(self, job_id: str) -> list[dict[str, Any]]:
        """``GET /v1/allocations`` of one job with their ports, in one request."""
        quoted = job_id.replace("\\", "\\\\").replace('"', '\\"')
        told, _ = self._http.get("/v1/allocations", _READ, {"resources": "true", "filter": f'JobID == "{quoted}"'})
        with known_form("allocations"):
            return [dict(one) for one in listed(told)]

    def stop_allocation(self, allocation_id: str) -> None:
        """``POST /v1/allocation/ID/stop``: end it; its job gets another in its place."""
        self._http.write("POST", f"/v1/allocation/{allocation_id}/stop", "the namespace capability alloc-lifecycle")

    def last_output(self, allocation_id: str, task: str, size: int = 2000) -> str:
        """``GET /v1/client/fs/logs/ID``: the last bytes that the task wrote to its standard error."""
        params = {"task": task, "type": "stderr", "origin": "end", "offset": str(size), "plain": "true"}
        return self._http.get_text(f"/v1/client/fs/logs/{allocation_id}", "the namespace capability read-logs", params)

    # Evaluations and deployments

    def evaluations(self, job_id: str, index: int = 0, wait: float = 0.0) -> tuple[list[Evaluation], int]:
        """``GET /v1/job/ID/evaluations``, the newest last; with ``wait`` a blocking query."""
        told, index = self._http.get(_job(job_id, "/evaluations"), _READ, index=index, wait=wait)
        with known_form("a job's evaluations"):
            return sorted(map(Evaluation.parse, listed(told)), key=lambda one: one.create_index), index

    def latest_deployment(self, job_id: str) -> dict[str, Any] | None:
        """``GET /v1/job/ID/deployment``."""
        told, _ = self._http.get(_job(job_id, "/deployment"), _READ)
        with known_form("a deployment"):
            return dict(told) if told else None

    # Variables

    def variable(self, path: str) -> dict[str, str] | None:
        """``GET /v1/var/PATH``: the items of a variable, which Nomad keeps encrypted; None if there is none."""
        told, _ = self._http.get(f"/v1/var/{urllib.parse.quote(path)}", f'the variables capability read for "{path}"')
        with known_form("a variable"):
            return dict(told["Items"]) if told is not None else None

    def create_variable(self, path: str, items: Mapping[str, str]) -> bool:
        """``PUT /v1/var/PATH?cas=0``: make it; False if there is one already."""
        needs = f'the variables capability write for "{path}"'
        body = {"Path": path, "Items": dict(items)}
        try:
            self._http.write("PUT", f"/v1/var/{urllib.parse.quote(path)}", needs, body, {"cas": "0"})
        except NomadError as e:
            if e.status != _CAS_FAILED:
                raise
            return False
        return True

    def delete_variable(self, path: str) -> None:
        """``DELETE /v1/var/PATH``. Nothing if there is none."""
        needs = f'the variables capability destroy for "{path}"'
        self._http.write("DELETE", f"/v1/var/{urllib.parse.quote(path)}", needs, missing_ok=True)

    # Nodes

    def nodes(self) -> Sequence[dict[str, Any]]:
        """``GET /v1/nodes``."""
        told, _ = self._http.get("/v1/nodes", "the capability node:read")
        with known_form("nodes"):
            return [dict(one) for one in listed(told)]


def _parsed(told: Any) -> Job | None:
    with known_form("a job"):
        if told is None:
            return None
        job = Job.parse(told)
        job.count("")  # its groups too
        return job


def _job(job_id: str, rest: str = "") -> str:
    return f"/v1/job/{urllib.parse.quote(job_id, safe='')}{rest}"
