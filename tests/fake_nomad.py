"""A stand-in for Nomad's HTTP API, whose allocations are real sandbox servers on the loopback.

Status codes, texts, headers and field names are those that Nomad 2.0.5 gives. What it leaves out is gzip, ACL tokens, drivers,
deployments and the restarting of agents; what it adds is being refused, cut off and lied to at will.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import heapq
import itertools
import json
import os
import random
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.parse
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Callable, NamedTuple

import attr

from slotpool.config import SlotPoolConfig
from slotpool.fleet.nomad.job import create_sandbox_job, token_path
from slotpool.sandbox.leases import LeaseTable

Json = dict[str, Any]
Key = tuple[str, str]  # namespace and id of a job

_SECOND = 1_000_000_000
_LATENCY = 0.01  # seconds that the scheduler, and a node, take for something
_END_LIMIT = 20.0  # seconds for servers to end when all is closed
_LOST = "alloc is lost since its node is down"
_CHECKOUT = str(Path(sys.modules["slotpool"].__file__ or "").resolve().parents[1])
_ATTRIBUTES = {"${attr.kernel.name}": "linux", "${node.datacenter}": "dc1", "${node.pool}": "default", "${node.class}": ""}


class Request(NamedTuple):
    """One that was answered; a ``status`` of 0: it was not."""

    method: str
    path: str
    status: int


class _Refusal(Exception):
    """Answered with a status and a plain text."""

    def __init__(self, status: int, text: str, index: int | None = None) -> None:
        super().__init__(text)
        self.answer = _Answer(status, text.encode(), index, "text/plain; charset=utf-8", index is not None)


@attr.s(auto_attribs=True, frozen=True)
class _Answer:
    status: int
    body: bytes
    index: int | None = None
    content_type: str | None = "application/json"
    read: bool = False


def _reading(value: object, index: int) -> _Answer:
    return _Answer(200, _dumps(value), index, read=True)


def _written(value: object, index: int, status: int = 200) -> _Answer:
    return _Answer(status, _dumps(value), index, "application/json" if status < 400 else None)


def _dumps(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _now() -> int:
    return time.time_ns()


def _rfc3339(nanoseconds: int) -> str | None:
    if not nanoseconds:
        return None
    whole = datetime.fromtimestamp(nanoseconds // _SECOND, timezone.utc)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{nanoseconds % _SECOND:09d}Z"


def _duration(nanoseconds: int) -> str:
    """As Go writes one: ``5m0s``, ``1.25s``."""
    minutes, rest = divmod(nanoseconds, 60 * _SECOND)
    seconds = f"{rest / _SECOND:.9f}".rstrip("0").rstrip(".") + "s"
    hours, minutes = divmod(minutes, 60)
    return (f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else "") + seconds


def _event(kind: str, message: str, **fields: Any) -> Json:
    event: Json = dict.fromkeys(_EVENT_TEXTS, "")
    event.update(dict.fromkeys(("DiskLimit", "ExitCode", "KillTimeout", "Signal", "StartDelay"), 0))
    event.update(Type=kind, DisplayMessage=message, Time=_now(), Details={}, FailsTask=False)
    event.update(fields)
    return event


_EVENT_TEXTS = (
    "DownloadError DriverError DriverMessage FailedSibling GenericSource KillError KillReason Message RestartReason SetupError "
    "TaskSignal TaskSignalReason ValidationError VaultError"
).split()


# Jobs: what Nomad fills in, and how two of them differ

_JOB: Json = {
    **dict.fromkeys(
        "Affinities Constraints Meta Multiregion ParameterizedJob Payload Periodic Spreads UI VersionTag".split(), None
    ),
    **dict.fromkeys(
        "ConsulNamespace DispatchIdempotencyToken NomadTokenID ParentID StatusDescription VaultNamespace".split(), ""
    ),
    "AllAtOnce": False,
    "Datacenters": ["*"],
    "Dispatched": False,
    "Namespace": "default",
    "NodePool": "default",
    "Priority": 50,
    "Region": "global",
    "Stable": False,
    "Status": "pending",
    "Stop": False,
    "Type": "service",
    "Update": {
        "AutoPromote": False,
        "AutoRevert": False,
        **dict.fromkeys("Canary HealthyDeadline MaxParallel MinHealthyTime ProgressDeadline Stagger".split(), 0),
        "HealthCheck": "",
    },
}
_GROUP: Json = {
    **dict.fromkeys(
        "Affinities Constraints Consul Disconnect MaxClientDisconnect MaxRunDuration Meta Networks Scaling Services "
        "ShutdownDelay Spreads StopAfterClientDisconnect Volumes".split(),
        None,
    ),
    "Count": 1,
    "PreventRescheduleOnLost": False,
    "EphemeralDisk": {"Migrate": False, "SizeMB": 300, "Sticky": False},
    "Migrate": {
        "HealthCheck": "checks",
        "HealthyDeadline": 300 * _SECOND,
        "MaxParallel": 1,
        "MinHealthyTime": 10 * _SECOND,
    },
    "ReschedulePolicy": {
        "Attempts": 0,
        "Delay": 30 * _SECOND,
        "DelayFunction": "exponential",
        "Interval": 0,
        "MaxDelay": 3600 * _SECOND,
        "Unlimited": True,
    },
    "RestartPolicy": {
        "Attempts": 2,
        "Delay": 15 * _SECOND,
        "Interval": 1800 * _SECOND,
        "Mode": "fail",
        "RenderTemplates": False,
    },
    "Update": {
        "AutoPromote": False,
        "AutoRevert": False,
        "Canary": 0,
        "HealthCheck": "checks",
        "HealthyDeadline": 300 * _SECOND,
        "MaxParallel": 1,
        "MinHealthyTime": 10 * _SECOND,
        "ProgressDeadline": 600 * _SECOND,
        "Stagger": 30 * _SECOND,
    },
}
_TASK: Json = {
    **dict.fromkeys(
        "Actions Affinities Artifacts CSIPluginConfig Config Constraints Consul DispatchPayload Env Identities Lifecycle Meta "
        "ScalingPolicies Schedule Secrets Services Templates Vault VolumeMounts".split(),
        None,
    ),
    "Identity": {
        **dict.fromkeys("ChangeMode ChangeSignal Filepath ServiceName".split(), ""),
        **dict.fromkeys("Env File".split(), False),
        "Audience": ["nomadproject.io"],
        "ExtraClaims": None,
        "Name": "default",
        "TTL": 0,
    },
    "KillSignal": "",
    "KillTimeout": 5 * _SECOND,
    "Kind": "",
    "Leader": False,
    "LogConfig": {"Disabled": False, "MaxFileSizeMB": 10, "MaxFiles": 10},
    "Resources": {
        **dict.fromkeys("Devices NUMA Networks".split(), None),
        **dict.fromkeys("Cores DiskMB IOPS MemoryMaxMB SecretsMB".split(), 0),
        "CPU": 100,
        "MemoryMB": 300,
    },
    "ShutdownDelay": 0,
    "User": "",
}
_TEMPLATE: Json = {
    **dict.fromkeys("ChangeScript Gid Uid Wait".split(), None),
    "ChangeMode": "restart",
    "ChangeSignal": "",
    "EmbeddedTmpl": "",
    "Envvars": False,
    "ErrMissingKey": False,
    "LeftDelim": "{{",
    "Once": False,
    "Perms": "0644",
    "RightDelim": "}}",
    "SourcePath": "",
    "Splay": 5 * _SECOND,
    "VaultGrace": 0,
}


def _filled(defaults: Json, given: Mapping[str, Any]) -> Json:
    filled = copy.deepcopy(defaults)
    for name, value in given.items():
        if isinstance(filled.get(name), dict) and isinstance(value, dict):
            filled[name] = _filled(filled[name], value)
        else:
            filled[name] = copy.deepcopy(value) if value not in ([], {}) else None
    return filled


def _canonical(given: Mapping[str, Any]) -> Json:
    """A job as Nomad keeps it."""
    job = _filled(_JOB, given)
    job["Name"] = job.get("Name") or job["ID"]
    job["TaskGroups"] = [_filled(_GROUP, group) for group in given.get("TaskGroups") or ()]
    for group in job["TaskGroups"]:
        for network in group["Networks"] or ():
            network["DynamicPorts"] = [
                {"HostNetwork": "default", **{name: value for name, value in port.items() if value}}
                for port in network.get("DynamicPorts") or ()
            ]
        group["Tasks"] = [_filled(_TASK, task) for task in group.get("Tasks") or ()]
        for task in group["Tasks"]:
            task["RestartPolicy"] = _filled(group["RestartPolicy"], task.get("RestartPolicy") or {})
            task["Templates"] = [_filled(_TEMPLATE, one) for one in task["Templates"] or ()] or None
    return job


def _text(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _flat(value: object, name: str) -> Iterator[tuple[str, str]]:
    """The fields below ``value`` as Nomad names them: ``args[0]``, ``auth[username]``."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}[{key}]" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _flat(inner, f"{name}[{i}]")
    elif value is not None:
        yield name, _text(value)


def _fields(old: Mapping[str, str], new: Mapping[str, str], all_of_them: bool) -> list[Json]:
    found = []
    for name in sorted({*old, *new}):
        was, is_ = old.get(name, ""), new.get(name, "")
        kind = "None" if was == is_ else "Added" if not was else "Deleted" if not is_ else "Edited"
        if kind != "None" or all_of_them:
            found.append({"Annotations": None, "Name": name, "Old": was, "New": is_, "Type": kind})
    return found


def _object(name: str, old: object, new: object, inner: Sequence[Json] = ()) -> Json | None:
    """How an object below a job differs; None if it doesn't. ``old`` or ``new`` of None: it was, or is, not there."""
    was, is_ = dict(_flat(old or {}, "")), dict(_flat(new or {}, ""))
    fields = _fields(was, is_, True)
    if not inner and all(field["Type"] == "None" for field in fields):
        return None
    kind = "Added" if not old else "Deleted" if not new else "Edited"
    return {"Name": name, "Type": kind, "Fields": fields or None, "Objects": list(inner) or None}


def _set(name: str, old: Sequence[str], new: Sequence[str]) -> Json | None:
    if set(old) == set(new):
        return None
    found = [("Added", "", one) for one in new if one not in old]
    found += [("Deleted", one, "") for one in old if one not in new]
    found += [("None", one, one) for one in new if one in old]
    fields = [{"Annotations": None, "Name": name, "Old": was, "New": is_, "Type": kind} for kind, was, is_ in found]
    kinds = {field["Type"] for field in fields} - {"None"}
    return {"Name": name, "Type": kinds.pop() if len(kinds) == 1 else "Edited", "Fields": fields, "Objects": None}


def _lists(name: str, old: Sequence[Json], new: Sequence[Json]) -> Iterator[Json]:
    """Objects that have no name: those that are gone and those that have come."""
    nothing: Json = {}
    pairs = [*((nothing, one) for one in new if one not in old), *((one, nothing) for one in old if one not in new)]
    for was, is_ in pairs:
        ports = [_object("Dynamic Port", {"To": 0, **port}, None) for port in was.get("DynamicPorts") or ()]
        ports += [_object("Dynamic Port", None, {"To": 0, **port}) for port in is_.get("DynamicPorts") or ()]
        bare = [{key: value for key, value in one.items() if key != "DynamicPorts"} for one in (was, is_)]
        found = _object(name, bare[0], bare[1], [port for port in ports if port])
        if found:
            yield {**found, "Type": "Deleted" if was else "Added"}


def _plain(of: Json, skipped: Iterable[str] = ()) -> dict[str, str]:
    return {name: _text(value) for name, value in of.items() if not isinstance(value, (dict, list)) and name not in skipped}


_NOT_COMPARED = (
    "ID Status StatusDescription Version CreateIndex ModifyIndex JobModifyIndex SubmitTime Stable NomadTokenID "
    "DispatchIdempotencyToken VersionTag UI Update"
).split()


def _kind(parts: Iterable[object], old: object, new: object) -> str:
    return "Added" if not old else "Deleted" if not new else "Edited" if any(parts) else "None"


def _task_diff(old: Json, new: Json) -> Json:
    def fields(task: Json) -> dict[str, str]:
        env = {f"Env[{name}]": _text(value) for name, value in (task.get("Env") or {}).items()}
        return {**_plain(task, ["Name"]), **env}

    objects = [_object(name, old.get(name), new.get(name)) for name in ("Config", "Resources", "LogConfig")]
    were, are = ({one["DestPath"]: one for one in task.get("Templates") or ()} for task in (old, new))
    objects += [_object("Template", were.get(path), are.get(path)) for path in sorted({*were, *are})]
    objects += _lists("Constraint", old.get("Constraints") or (), new.get("Constraints") or ())
    found = [one for one in objects if one]
    changed = _fields(fields(old), fields(new), False)
    # As Nomad: a restart policy, and how a task is logged or ended, are changed in place.
    kind = _kind([*changed, *found], old, new)
    destroys = [one for one in [*changed, *found] if one["Name"] not in ("LogConfig", "KillTimeout")]
    annotation = {"Added": "create", "Deleted": "destroy"}.get(kind, "create/destroy update" if destroys else "in-place update")
    return {
        "Name": (new or old)["Name"],
        "Type": kind,
        "Annotations": [f"forces {annotation}"] if kind != "None" else None,
        "Fields": changed or None,
        "Objects": found or None,
    }


def _group_diff(old: Json, new: Json) -> Json:
    names = ("RestartPolicy", "Migrate", "ReschedulePolicy", "EphemeralDisk", "Update")
    objects = [_object(name, old.get(name), new.get(name)) for name in names]
    for name in ("Network", "Constraint"):
        objects += _lists(name, old.get(f"{name}s") or (), new.get(f"{name}s") or ())
    found = [one for one in objects if one]
    tasks = [_task_diff(*pair) for pair in _by_name(old.get("Tasks"), new.get("Tasks"))]
    changed = _fields(_plain(old, ["Name"]), _plain(new, ["Name"]), False)
    kind = _kind([*changed, *found, *(task for task in tasks if task["Type"] != "None")], old, new)
    return {
        "Name": (new or old)["Name"],
        "Type": kind,
        "Fields": changed or None,
        "Objects": found or None,
        "Tasks": tasks,
        "Updates": {},
    }


def _by_name(old: Sequence[Json] | None, new: Sequence[Json] | None) -> Iterator[tuple[Json, Json]]:
    were, are = ({one["Name"]: one for one in many or ()} for many in (old, new))
    for name in sorted({*were, *are}):
        yield were.get(name, {}), are.get(name, {})


def job_diff(old: Json | None, new: Json) -> Json:
    """``Diff`` of a plan; both as :func:`_canonical` gives them."""
    before = old or {}
    objects = [_set("Datacenters", before.get("Datacenters") or (), new["Datacenters"] or ())]
    objects += _lists("Constraint", before.get("Constraints") or (), new.get("Constraints") or ())
    found = [one for one in objects if one]
    groups = [_group_diff(*pair) for pair in _by_name(before.get("TaskGroups"), new["TaskGroups"])]
    changed = _fields(_plain(before, _NOT_COMPARED), _plain(new, _NOT_COMPARED), False)
    kind = _kind([*changed, *found, *(group for group in groups if group["Type"] != "None")], old, new)
    return {"ID": new["ID"], "Type": kind, "Fields": changed or None, "Objects": found or None, "TaskGroups": groups}


def _destroys(old: Json, new: Json) -> bool:
    """Whether a group's allocations have to be replaced for that change."""
    if old["Networks"] != new["Networks"] or old["EphemeralDisk"] != new["EphemeralDisk"]:
        return True
    pairs = [_task_diff(*pair) for pair in _by_name(old["Tasks"], new["Tasks"])]
    return any("destroy" in note for task in pairs for note in task["Annotations"] or ())


# What is kept


@attr.s(auto_attribs=True, eq=False)
class _Task:
    """A process of an allocation."""

    process: subprocess.Popen[bytes]
    pidfd: int
    allocation: str
    killing: bool = False


@attr.s(auto_attribs=True, eq=False)
class _Allocation:
    id: str
    key: Key
    index: int
    job: Json
    group: Json
    node: Json
    eval_id: str
    ip: str
    port: int
    created: int
    create_index: int
    modify_index: int
    status: str = "pending"
    description: str = ""
    desired: str = "run"
    desired_description: str = ""
    events: tuple[Json, ...] = ()
    task_state: str = "pending"
    failed: bool = False
    restarts: int = 0
    tries: int = 0  # restarts in the policy's interval
    tries_since: float = 0.0
    started_at: int = 0
    finished_at: int = 0
    last_restart: int = 0
    previous: str = ""
    next: str = ""
    followup: str = ""
    tracker: Json | None = None
    migrate: bool = False
    due: bool = False  # to be rescheduled now
    waits: bool = False  # for a variable
    stand_in: bool = False
    task: _Task | None = None
    rendered: tuple[int, Json] = (0, {})

    @property
    def is_over(self) -> bool:
        return self.desired != "run" or self.status in ("complete", "failed", "lost")

    @property
    def holds(self) -> bool:
        """Whether it has its index: it is to run, or will be rescheduled."""
        return self.desired == "run"

    def stub(self) -> Json:
        """As lists have it, with resources."""
        if self.rendered[0] != self.modify_index:
            self.rendered = (self.modify_index, self._render())
        return self.rendered[1]

    def _render(self) -> Json:
        task = self.group["Tasks"][0]
        state = {
            "Events": list(self.events),
            "Failed": self.failed,
            "FinishedAt": _rfc3339(self.finished_at),
            "LastRestart": _rfc3339(self.last_restart),
            "Paused": "",
            "Restarts": self.restarts,
            "StartedAt": _rfc3339(self.started_at),
            "State": self.task_state,
        }
        transition = {"NoShutdownDelay": False, "Reschedule": False, "Migrate": True} if self.migrate else {}
        port = {"HostNetwork": "default", "Label": "http", "Value": self.port}
        to = next((one.get("To") for net in self.group["Networks"] or () for one in net["DynamicPorts"]), None)
        if to:
            port["To"] = to
        return {
            "AllocatedResources": {
                "Shared": {
                    "DiskMB": 300,
                    "Networks": [{"DynamicPorts": [port], "IP": self.ip}],
                    "Ports": [{"HostIP": self.ip, "Label": "http", "Value": self.port, **({"To": to} if to else {})}],
                },
                "TaskLifecycles": {task["Name"]: None},
                "Tasks": {
                    task["Name"]: {
                        "Cpu": {"CpuShares": task["Resources"]["CPU"], "ReservedCores": None},
                        "Devices": None,
                        "Memory": {"MemoryMB": task["Resources"]["MemoryMB"], "MemoryMaxMB": 0},
                        "Networks": None,
                    }
                },
            },
            "ClientDescription": self.description,
            "ClientStatus": self.status,
            "CreateIndex": self.create_index,
            "CreateTime": self.created,
            "DeploymentStatus": None,
            "DesiredDescription": self.desired_description,
            "DesiredStatus": self.desired,
            "DesiredTransition": {
                **dict.fromkeys("ForceReschedule Migrate MigrateDisablePlacement NoShutdownDelay Reschedule".split(), None),
                **transition,
            },
            "EvalID": self.eval_id,
            "FollowupEvalID": self.followup,
            "ID": self.id,
            "JobID": self.key[1],
            "JobType": self.job["Type"],
            "JobVersion": self.job["Version"],
            "ModifyIndex": self.modify_index,
            "ModifyTime": _now(),
            "Name": f"{self.key[1]}.{self.group['Name']}[{self.index}]",
            "Namespace": self.key[0],
            "NextAllocation": self.next,
            "NodeID": self.node["ID"],
            "NodeName": self.node["Name"],
            "PreemptedAllocations": None,
            "PreemptedByAllocation": "",
            "RescheduleTracker": self.tracker,
            "TaskGroup": self.group["Name"],
            "TaskStates": {task["Name"]: state} if self.events else None,
        }


@attr.s(auto_attribs=True)
class _State:
    """Jobs, evaluations and variables are replaced, not changed, so that a shallow copy is a snapshot."""

    index: int = 10
    tables: dict[str, int] = attr.ib(factory=lambda: {"jobs": 1, "allocs": 1, "evals": 1, "vars": 1, "nodes": 8})
    things: dict[tuple[str, Key], int] = attr.ib(factory=dict)  # when each job's part of a table was changed
    jobs: dict[Key, Json] = attr.ib(factory=dict)
    evals: dict[str, Json] = attr.ib(factory=dict)
    variables: dict[tuple[str, str], Json] = attr.ib(factory=dict)
    allocs: dict[str, _Allocation] = attr.ib(factory=dict)

    def bump(self, *changed: tuple[str, Key]) -> int:
        self.index += 1
        for table, key in changed:
            self.tables[table] = self.things[table, key] = self.index
        return self.index

    def snapshot(self) -> _State:
        return _State(
            self.index,
            dict(self.tables),
            dict(self.things),
            dict(self.jobs),
            dict(self.evals),
            dict(self.variables),
            {id_: attr.evolve(one) for id_, one in self.allocs.items()},
        )

    def of_job(self, key: Key) -> list[_Allocation]:
        """Not those of a purged one that had the same name."""
        job = self.jobs.get(key)
        if job is None:
            return []
        return [one for one in self.allocs.values() if one.key == key and one.job["CreateIndex"] == job["CreateIndex"]]


class FakeNomad:
    """An agent that answers at :attr:`address` as long as it is entered. Its levers may be used from any thread.

    :ivar requests: all that were answered.
    :ivar deployment_active: as if a deployment were under way.
    :ivar scheduling_delay: seconds that an evaluation stays pending.
    :ivar reporting_delay: seconds until it is told that a process runs; Nomad's is up to one.
    :param haste: the pauses before restarts and reschedulings are divided by that.
    :param nodes: how many it has.
    """

    def __init__(self, *, haste: float = 1.0, nodes: int = 2, namespaces: Sequence[str] = ("default",)) -> None:
        self.requests: list[Request] = []
        self.deployment_active = False
        self.scheduling_delay = _LATENCY
        self.reporting_delay = 0.0
        self._haste = haste
        self._namespaces = namespaces
        self._nodes = [{"ID": str(uuid.uuid4()), "Name": f"node-{i + 1}"} for i in range(nodes)]
        self._changed = threading.Condition()  # guards all that follows
        self._state = _State()
        self._old: tuple[float, _State] | None = None
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._tasks: dict[int, _Task] = {}  # by pidfd
        self._ports: dict[int, socket.socket] = {}
        self._denied: set[str] = set()
        self._once: list[tuple[str, str, bool, _Answer]] = []
        self._leaderless = False
        self._refused: tuple[str, str, int] | None = None
        self._image_is_bad = False
        self._stand_in_jobs: set[Key] = set()
        self._stand_ins: _StandIns | None = None
        self._epoch = 0  # counted up when those who wait must go
        self._closing = False
        self._defects: list[BaseException] = []
        self._directory = tempfile.mkdtemp(prefix="fake-nomad-slotpool-")
        self._woken, self._wake = os.pipe()
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)
        self._agent = threading.Thread(target=self._run, name="fake-nomad-agent", daemon=True)
        self._agent.start()
        reserved = _reserve(range(20000, 32000))
        self._port = reserved.getsockname()[1]
        self._reserved = reserved  # as nobody else shall have the port while the server is down
        self.address = f"http://127.0.0.1:{self._port}"
        self._server: _Server | None = None
        self.up()

    def __enter__(self) -> FakeNomad:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End everything. Repeatable.

        :raises AssertionError: something went wrong in here meanwhile.
        """
        with self._changed:
            if self._closing:
                return
            self._closing = True
        self.down()
        os.write(self._wake, b"x")
        self._agent.join()
        if self._stand_ins is not None:
            self._stand_ins.close()
        tasks = list(self._tasks.values())
        for task in tasks:
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                signal.pidfd_send_signal(task.pidfd, signal.SIGTERM)
        deadline = time.monotonic() + _END_LIMIT
        for task in tasks:
            self._end(task, deadline)
        for sock in [self._reserved, *self._ports.values()]:
            sock.close()
        os.close(self._woken)
        os.close(self._wake)
        shutil.rmtree(self._directory)
        assert not self._defects, self._defects

    @staticmethod
    def _end(task: _Task, deadline: float) -> None:
        """Wait for a process that has been told to end, and for what it has started in its group."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            task.process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            while time.monotonic() < deadline:
                os.killpg(task.process.pid, 0)
                time.sleep(0.01)
            os.killpg(task.process.pid, signal.SIGKILL)
        task.process.wait()
        os.close(task.pidfd)

    # Levers

    def allocations(self, job_id: str, namespace: str = "default") -> list[Json]:
        """A job's, as the API lists them, oldest first."""
        with self._changed:
            return [copy.deepcopy(one.stub()) for one in self._state.of_job((namespace, job_id))]

    def pid_of(self, alloc_id: str) -> int:
        with self._changed:
            task = self._state.allocs[alloc_id].task
            assert task is not None, f"allocation {alloc_id} has no process"
            return task.process.pid

    def kill(self, alloc_id: str, sig: int = signal.SIGKILL) -> None:
        """Send its server a signal; it is started again as its job says."""
        with self._changed:
            allocation = self._state.allocs[alloc_id]
            if allocation.stand_in:
                self._act(lambda: self._exited(allocation, -sig))
                return
            assert allocation.task is not None, f"allocation {alloc_id} has no process"
            signal.pidfd_send_signal(allocation.task.pidfd, sig)

    def lose(self, alloc_id: str) -> None:
        """As if its node did not answer any more: it gets a replacement on another, and its server runs on."""
        with self._changed:
            allocation = self._state.allocs[alloc_id]
            allocation.task = None
            self._change(allocation, status="lost")
            self._evaluate(allocation.key, "node-update")

    def no_room(self, dimension: str = "memory", above: int = 0) -> None:
        """Allocations beyond ``above`` find no node."""
        self._refuse(("room", dimension, above))

    def missing_driver(self) -> None:
        self._refuse(("driver", "", 0))

    def no_nodes(self) -> None:
        """No further ones are placed; those that run stay."""
        self._refuse(("nodes", "", 0))

    def _refuse(self, how: tuple[str, str, int]) -> None:
        with self._changed:
            self._refused = how

    def bad_image(self) -> None:
        """New allocations fail to pull their image."""
        with self._changed:
            self._image_is_bad = True

    def deny(self, capability: str) -> None:
        """Refuse what needs it; ``variables`` is all of ``variables-read``, ``variables-write`` and ``variables-destroy``."""
        with self._changed:
            self._denied.add(capability)

    def no_leader(self) -> None:
        with self._changed:
            self._leaderless = True
            self._release()

    def heal(self) -> None:
        """Take all refusals back; what could not be placed is placed now."""
        with self._changed:
            self._denied.clear()
            self._once.clear()
            self._leaderless = self._image_is_bad = self.deployment_active = False
            self._refused = self._old = None
            for id_, evaluation in list(self._state.evals.items()):
                if evaluation["Status"] == "blocked":
                    self._update_eval(id_, Status="pending", StatusDescription="")
                    self._schedule_later(id_)
            self._changed.notify_all()

    def answer_once(
        self,
        path_prefix: str,
        status: int,
        body: str | bytes,
        content_type: str = "text/plain; charset=utf-8",
        *,
        method: str = "",
        done: bool = False,
    ) -> None:
        """Answer the next request so; with ``done`` after it has had its effect. A status of 0 cuts the connection."""
        answer = _Answer(status, body.encode() if isinstance(body, str) else body, None, content_type)
        with self._changed:
            self._once.append((method, path_prefix, done, answer))

    def stale(self, seconds: float) -> None:
        """For so long answer all reads with what is so now."""
        with self._changed:
            self._old = (time.monotonic() + seconds, self._state.snapshot())
            self._later(seconds, self._changed.notify_all)

    def down(self) -> None:
        """Listen no more, and cut the connections."""
        with self._changed:
            server, self._server = self._server, None
            self._release()
        if server is not None:
            server.stop()

    def up(self) -> None:
        if self._server is None:
            self._server = _Server(self._port, self)

    def populate(self, job_id: str, count: int, **settings: Any) -> None:
        """Let a job's allocations be stand-ins: they grant leases of slots that run nothing, and need no processes.

        :param count: so many are there at once; with 0 the job is left to a pool to submit.
        :param settings: of that pool, as it compares the job that stands with its own.
        """
        config = SlotPoolConfig(nomad_address=self.address, job_id=job_id, **settings)
        key = (config.nomad_namespace or "default", job_id)
        with self._changed:
            self._stand_in_jobs.add(key)
            if self._stand_ins is None:
                self._stand_ins = _StandIns()
            if count:
                path = token_path(job_id)
                items = {"token": config.token or secrets.token_urlsafe(32)}
                self._state.variables.setdefault((key[0], path), self._variable(key[0], path, items, None))
                self._register(_canonical(create_sandbox_job(config, count)), key)
        deadline = time.monotonic() + 60
        while sum(one["ClientStatus"] == "running" for one in self.allocations(job_id, key[0])) < count:
            assert time.monotonic() < deadline, "the stand-ins were not placed"
            time.sleep(0.02)

    # Time: one thread does all that happens later, and sees processes end

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._numbers), act))
        if threading.current_thread() is not self._agent:
            os.write(self._wake, b"x")

    def _act(self, act: Callable[[], None]) -> None:
        self._later(0.0, act)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closing and self._timers and self._timers[0][0] <= time.monotonic():
                    self._guarded(heapq.heappop(self._timers)[2])
                if self._closing:
                    return
                left = self._timers[0][0] - time.monotonic() if self._timers else 3600.0
            for fd, _ in self._poll.poll(max(0.0, left) * 1000 + 1):
                if fd == self._woken:
                    os.read(fd, 4096)
                else:
                    with self._changed:
                        self._guarded(lambda fd=fd: self._reap(fd))  # type: ignore[misc]

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as e:
            traceback.print_exc()
            self._defects.append(e)

    def _release(self) -> None:
        """Have those who wait in a blocking query look up."""
        self._epoch += 1
        self._changed.notify_all()

    def _change(self, allocation: _Allocation, **changes: Any) -> None:
        self._change_all([allocation], **changes)

    def _change_all(self, allocations: Sequence[_Allocation], **changes: Any) -> None:
        """At one index, as nodes report many changes at once."""
        index = self._state.bump(*{("allocs", one.key) for one in allocations})
        for allocation in allocations:
            for name, value in changes.items():
                setattr(allocation, name, value)
            allocation.modify_index = index
        for key in {one.key for one in allocations}:
            self._update_status(key)
        self._changed.notify_all()

    def _update_status(self, key: Key) -> None:
        job = self._state.jobs.get(key)
        if job is None:
            return
        runs = any(not one.is_over for one in self._state.of_job(key))
        status = "running" if runs else "dead" if job["Stop"] else "pending"
        if job["Status"] != status:
            self._state.jobs[key] = {**job, "Status": status, "ModifyIndex": self._state.bump(("jobs", key))}
            self._changed.notify_all()

    # The scheduler

    def _evaluate(self, key: Key, trigger: str, **more: Any) -> Json:
        job = self._state.jobs.get(key)
        index = self._state.bump(("evals", key))
        evaluation = {
            "CreateIndex": index,
            "CreateTime": _now(),
            "ID": str(uuid.uuid4()),
            "JobID": key[1],
            "JobModifyIndex": job["JobModifyIndex"] if job else index,
            "ModifyIndex": index,
            "ModifyTime": _now(),
            "Namespace": key[0],
            "Priority": 50,
            "Status": "pending",
            "TriggeredBy": trigger,
            "Type": "service",
            **more,
        }
        self._state.evals[evaluation["ID"]] = evaluation
        self._changed.notify_all()
        if evaluation["Status"] == "pending" and "WaitUntil" not in evaluation:
            self._schedule_later(evaluation["ID"])
        return evaluation

    def _schedule_later(self, eval_id: str) -> None:
        self._later(self.scheduling_delay, lambda: self._schedule(eval_id))

    def _update_eval(self, eval_id: str, **changes: Any) -> None:
        old = self._state.evals[eval_id]
        index = self._state.bump(("evals", (old["Namespace"], old["JobID"])))
        self._state.evals[eval_id] = {**old, **changes, "ModifyIndex": index, "ModifyTime": _now()}
        self._changed.notify_all()

    def _schedule(self, eval_id: str) -> None:
        """Bring about what a job asks for, as one change; what can't be placed is left to a blocked evaluation."""
        evaluation = self._state.evals[eval_id]
        if evaluation["Status"] != "pending":
            return
        key: Key = (evaluation["Namespace"], evaluation["JobID"])
        job = self._state.jobs.get(key)
        wanted = {group["Name"]: group for group in job["TaskGroups"]} if job is not None and not job["Stop"] else {}
        ours = [one for one in self._state.allocs.values() if one.key == key and one.holds]
        plan = _Plan()
        for name in {*wanted, *(one.group["Name"] for one in ours)}:
            holders = [one for one in ours if one.group["Name"] == name]
            self._plan_group(plan, job, wanted.get(name), holders, eval_id)
        self._apply(plan)
        for blocked in [one for one in self._state.evals.values() if one["Status"] == "blocked"]:
            if (blocked["Namespace"], blocked["JobID"]) == key:
                why = f'existing blocked evaluation exists for job "{key[1]}"'
                why = why if plan.failed else f'evaluation "{eval_id}" successful'
                self._update_eval(blocked["ID"], Status="canceled", StatusDescription=why)
        more: Json = {}
        if plan.failed:
            description = "created to place remaining allocations"
            blocked = self._evaluate(
                key,
                "queued-allocs",
                Status="blocked",
                StatusDescription=description,
                FailedTGAllocs=plan.failed,
                PreviousEval=eval_id,
            )
            more = {"BlockedEval": blocked["ID"], "FailedTGAllocs": plan.failed}
        self._update_eval(
            eval_id,
            Status="complete",
            StatusDescription="",
            QueuedAllocations={name: plan.missing.get(name, 0) for name in wanted},
            PlanAnnotations={"DesiredTGUpdates": plan.updates, "PreemptedAllocs": None},
            **more,
        )
        self._update_status(key)

    def _plan_group(self, plan: _Plan, job: Json | None, group: Json | None, holders: list[_Allocation], eval_id: str) -> None:
        count = group["Count"] if group is not None else 0
        keep, replaced = [], []
        for one in holders:
            why = "" if group is None or job is None else self._why_replace(one, job, group)
            replaced.append((one, why)) if why else keep.append(one)
        name = group["Name"] if group is not None else holders[0].group["Name"]
        surplus = sorted([*keep, *(one for one, _ in replaced)], key=lambda one: -one.index)[: max(0, len(holders) - count)]
        plan.stops += [(one, "alloc not needed due to job update") for one in surplus]
        keep = [one for one in keep if one not in surplus]
        replaced = [(one, why) for one, why in replaced if one not in surplus]
        if job is None or group is None:
            return
        plan.in_place += [(one, job, group) for one in keep if one.job["Version"] != job["Version"]]
        taken = {one.index for one in keep} | {one.index for one, _ in replaced}
        fresh = list(itertools.islice((i for i in itertools.count() if i not in taken), count - len(taken)))
        places: list[tuple[int, _Allocation | None, str]] = [(one.index, one, why) for one, why in replaced]
        places += [(i, None, "") for i in fresh]
        for done, (index, previous, why) in enumerate(places):
            metrics = self._why_no_room(job, group, len(keep) + done)
            if metrics is not None:
                plan.failed[name] = {**metrics, "CoalescedFailures": len(places) - done - 1}
                plan.missing[name] = len(places) - done
                plan.stops += [(one, text) for _, one, text in places[done:] if one is not None and one.status == "lost"]
                break
            plan.places.append((index, job, group, previous, eval_id))
            if previous is not None:
                plan.stops.append((previous, "" if why == "due" else why))
        plan.updates[name] = {
            **dict.fromkeys("Canary Disconnect Preemptions Reconnect RescheduleLater RescheduleNow".split(), 0),
            "Ignore": sum(one.job["Version"] == job["Version"] for one in keep),
            "InPlaceUpdate": sum(one.job["Version"] != job["Version"] for one in keep),
            "DestructiveUpdate": sum("job update" in why for _, why in replaced),
            "Migrate": sum("migrated" in why for _, why in replaced),
            "Place": len(places) - sum("migrated" in why or "job update" in why for _, why in replaced),
            "Stop": len(surplus),
        }

    @staticmethod
    def _why_replace(one: _Allocation, job: Json, group: Json) -> str:
        if one.status == "lost":
            return _LOST
        if one.migrate:
            return "alloc is being migrated"
        if one.job["CreateIndex"] != job["CreateIndex"] or _destroys(one.group, group):
            return "alloc is being updated due to job update"
        return "due" if one.due else ""

    def _why_no_room(self, job: Json, group: Json, placed: int) -> Json | None:
        """What Nomad tells of a group that finds no node; None if it finds one."""
        total = len(self._nodes)
        metrics: Json = {
            **dict.fromkeys("ClassExhausted ClassFiltered ConstraintFiltered DimensionExhausted".split(), None),
            **dict.fromkeys("QuotaExhausted ResourcesExhausted ScoreMetaData Scores".split(), None),
            "AllocationTime": 16789,
            "NodePool": job["NodePool"],
            "NodesAvailable": {"dc1": total},
            "NodesEvaluated": total,
            "NodesExhausted": 0,
            "NodesFiltered": 0,
            "NodesInPool": total,
        }
        kind, dimension, above = self._refused or ("", "", 0)
        if kind == "nodes" or not {"dc1", "*"} & set(job["Datacenters"] or ()):
            return {**metrics, "NodesAvailable": {}, "NodesEvaluated": 0, "NodesInPool": 0}
        for one in [*(job["Constraints"] or ()), *(group["Constraints"] or ())]:
            if one["Operand"] in ("=", "==", "is") and _ATTRIBUTES.get(one["LTarget"]) != one["RTarget"]:
                words = f"{one['LTarget']} {one['Operand']} {one['RTarget']}"
                return {**metrics, "ConstraintFiltered": {words: total}, "NodesFiltered": total}
        if kind == "driver":
            return {**metrics, "ConstraintFiltered": {"missing drivers": total}, "NodesFiltered": total}
        if kind == "room" and placed >= above:
            return {**metrics, "DimensionExhausted": {dimension: total}, "NodesExhausted": total}
        return None

    def _apply(self, plan: _Plan) -> None:
        if not (plan.stops or plan.places or plan.in_place):
            return
        keys = {one.key for one, _ in plan.stops} | {one.key for one, _, _ in plan.in_place}
        keys |= {(job["Namespace"], job["ID"]) for _, job, *_ in plan.places}
        index = self._state.bump(*(("allocs", key) for key in keys))
        for one, job, group in plan.in_place:
            one.job, one.group, one.modify_index = job, group, index
        for one, why in plan.stops:
            one.desired, one.desired_description, one.modify_index = "stop", why, index
            if one.status != "lost":
                self._later(_LATENCY, lambda one=one: self._stop_task(one))  # type: ignore[misc]
        new = [self._place(index, *place) for place in plan.places]
        stand_ins = [one for one in new if one.stand_in]
        if stand_ins:
            self._later(_LATENCY, lambda: self._start_stand_ins(stand_ins))
        for one in new:
            if not one.stand_in:
                self._later(_LATENCY, lambda one=one: self._start(one))  # type: ignore[misc]
        for key in keys:
            self._update_status(key)
        self._changed.notify_all()

    def _place(
        self, index: int, number: int, job: Json, group: Json, previous: _Allocation | None, eval_id: str
    ) -> _Allocation:
        key: Key = (job["Namespace"], job["ID"])
        stand_in = key in self._stand_in_jobs
        id_ = str(uuid.uuid4())
        if stand_in:
            assert self._stand_ins is not None
            ip, port = self._stand_ins.reserve(id_)
        else:
            sock = _reserve(range(20000, 32000))
            ip, port = "127.0.0.1", sock.getsockname()[1]
            self._ports[port] = sock
        nodes = [node for node in self._nodes if previous is None or node is not previous.node] or self._nodes
        one = _Allocation(
            id_, key, number, job, group, nodes[number % len(nodes)], eval_id, ip, port, _now(), index, index, stand_in=stand_in
        )
        if previous is not None:
            one.previous, previous.next = previous.id, id_
            if previous.due:
                events = list((previous.tracker or {}).get("Events") or ())
                event = {
                    "Delay": self._reschedule_delay(previous),
                    "PrevAllocID": previous.id,
                    "PrevNodeID": previous.node["ID"],
                    "RescheduleTime": _now(),
                }
                one.tracker = {"Events": [*events, event][-5:], "LastReschedule": "ok"}
        self._state.allocs[id_] = one
        return one

    # The nodes

    def _start_stand_ins(self, allocations: Sequence[_Allocation]) -> None:
        assert self._stand_ins is not None
        started = [one for one in allocations if one.desired == "run"]
        for one in started:
            arguments = one.group["Tasks"][0]["Config"]["args"]
            token = self._state.variables[one.key[0], token_path(one.key[1])]["Items"]["token"]
            self._stand_ins.start(one.ip, one.id, token, int(arguments[arguments.index("--slots") + 1]))
            one.events += (*_received(), _event("Started", "Task started by client"))
        running = {"status": "running", "description": "Tasks are running", "task_state": "running", "started_at": _now()}
        if started:
            self._change_all(started, **running)

    def _start(self, one: _Allocation) -> None:
        """Start its server, or say why not."""
        if one.desired != "run" or one.status != "pending" or one.task is not None:
            return
        task = one.group["Tasks"][0]
        events = one.events or _received()
        if self._image_is_bad and task["Driver"] in ("docker", "podman"):
            image = task["Config"].get("image")
            said = (
                f"Failed to pull `{image}`: Error response from daemon: pull access denied for {str(image).split(':')[0]}, "
                "repository does not exist or may require 'docker login': denied: requested access to the resource is denied"
            )
            downloading = {"DriverMessage": "Downloading image", "Details": {"image": image}}
            events += (
                _event("Driver", "Downloading image", **downloading),
                _event("Driver Failure", said, DriverError=said, Details={"driver_error": said}),
            )
            self._restart(one, events)
            return
        directory = os.path.join(self._directory, one.id)
        missing = self._write_templates(one, task, os.path.join(directory, task["Name"]))
        if missing:
            event = _event("Template", f"Missing: nomad.var.block({missing}@{one.key[0]}.global)")
            self._change(one, waits=True, description="No tasks have started", events=(*events, event))
            return
        environment = self._environment(one, task, directory)
        os.makedirs(os.path.join(directory, "alloc", "logs"), exist_ok=True)
        logs = [open(_log(directory, task["Name"], kind), "ab") for kind in ("stdout", "stderr")]  # noqa: SIM115
        try:
            process = subprocess.Popen(
                _command(task, one.port, environment),
                stdin=subprocess.DEVNULL,
                stdout=logs[0],
                stderr=logs[1],
                cwd=os.path.join(directory, task["Name"]),
                env=environment,
                start_new_session=True,
            )
        except OSError as e:
            reason = f'binary "{e.filename}" could not be found' if isinstance(e, FileNotFoundError) else str(e)
            said = f"failed to launch command with executor: rpc error: code = Unknown desc = {reason}"
            events += (
                _event("Driver Failure", said, DriverError=said, Details={"driver_error": said}),
                _not_restarting("Error was unrecoverable"),
            )
            self._fail(one, events)
            return
        finally:
            for log in logs:
                log.close()
        running = _Task(process, os.pidfd_open(process.pid), one.id)
        self._tasks[running.pidfd] = running
        self._poll.register(running.pidfd, select.POLLIN)
        one.task, one.waits, one.started_at = running, False, _now()
        one.events = (*events, _event("Started", "Task started by client"))

        def report() -> None:
            if one.task is running and one.status == "pending":
                self._change(one, status="running", description="Tasks are running", task_state="running")

        self._later(self.reporting_delay, report)

    def _write_templates(self, one: _Allocation, task: Json, directory: str) -> str:
        """Render them; the path of a variable that is missing, else ""."""
        secrets_directory = os.path.join(directory, "secrets")
        os.makedirs(secrets_directory, 0o700, exist_ok=True)
        os.makedirs(os.path.join(directory, "local"), exist_ok=True)
        for template in task["Templates"] or ():
            text = template["EmbeddedTmpl"]
            for path in re.findall(r'nomadVar "([^"]+)"', text):
                if (one.key[0], path) not in self._state.variables:
                    return str(path)

            def rendered(found: re.Match[str]) -> str:
                items = self._state.variables[one.key[0], found[1]]["Items"]
                return re.sub(r"\{\{\s*\.(\w+)\s*\}\}", lambda inner: str(items.get(inner[1], "<no value>")), found[2])

            text = re.sub(r'\{\{\s*with nomadVar "([^"]+)"\s*\}\}(.*?)\{\{\s*end\s*\}\}', rendered, text, flags=re.DOTALL)
            target = os.path.join(directory, template["DestPath"])
            with contextlib.suppress(FileNotFoundError):
                os.unlink(target)
            mode = int(template["Perms"], 8)
            with open(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
                file.write(text)
        return ""

    def _environment(self, one: _Allocation, task: Json, directory: str) -> dict[str, str]:
        own = {
            "NOMAD_ADDR_http": f"{one.ip}:{one.port}",
            "NOMAD_ALLOC_DIR": os.path.join(directory, "alloc"),
            "NOMAD_ALLOC_ID": one.id,
            "NOMAD_ALLOC_INDEX": str(one.index),
            "NOMAD_ALLOC_NAME": f"{one.key[1]}.{one.group['Name']}[{one.index}]",
            "NOMAD_DC": "dc1",
            "NOMAD_GROUP_NAME": one.group["Name"],
            "NOMAD_IP_http": one.ip,
            "NOMAD_JOB_ID": one.key[1],
            "NOMAD_NAMESPACE": one.key[0],
            "NOMAD_PORT_http": str(one.port),
            "NOMAD_REGION": "global",
            "NOMAD_SECRETS_DIR": os.path.join(directory, task["Name"], "secrets"),
            "NOMAD_TASK_DIR": os.path.join(directory, task["Name"], "local"),
            "NOMAD_TASK_NAME": task["Name"],
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("NOMAD_", "SLOTPOOL_"))}
        given = {name: _interpolated(value, own) for name, value in (task["Env"] or {}).items()}
        return {**inherited, "TMPDIR": tempfile.gettempdir(), "PYTHONPATH": _CHECKOUT, **own, **given}

    def _reap(self, pidfd: int) -> None:
        task = self._tasks.pop(pidfd)
        self._poll.unregister(pidfd)
        code = task.process.wait()
        os.close(pidfd)
        one = self._state.allocs.get(task.allocation)
        if one is not None and one.task is task:
            one.task = None
            self._exited(one, code)

    def _exited(self, one: _Allocation, code: int) -> None:
        number = max(0, -code)
        status = 128 + number if number else code
        details = {"exit_code": str(status), "signal": str(number), "oom_killed": "false"}
        message = f"Exit Code: {status}" + (f", Signal: {number}" if number else "")
        events = (*one.events, _event("Terminated", message, ExitCode=status, Signal=number, Details=details))
        if one.stand_in and self._stand_ins is not None:
            self._stand_ins.stop(one.ip)
        if one.desired != "run":
            self._complete(one, (*events, _event("Killed", "Task successfully killed")))
        else:
            self._restart(one, events)

    def _complete(self, one: _Allocation, events: tuple[Json, ...]) -> None:
        told = {"status": "complete", "description": "All tasks have completed", "task_state": "dead", "finished_at": _now()}
        self._change(one, events=events, **told)

    def _restart(self, one: _Allocation, events: tuple[Json, ...]) -> None:
        """Start its server again after a pause, if the restart policy allows it once more."""
        policy = one.group["Tasks"][0]["RestartPolicy"]
        now = time.monotonic()
        if not one.tries_since or now - one.tries_since > policy["Interval"] / _SECOND:
            one.tries, one.tries_since = 0, now
        one.tries += 1
        if one.tries > policy["Attempts"]:
            interval = _duration(policy["Interval"])
            why = f'Exceeded allowed attempts {policy["Attempts"]} in interval {interval} and mode is "{policy["Mode"]}"'
            self._fail(one, (*events, _not_restarting(why)))
            return
        delay = int(policy["Delay"] * random.uniform(1.0, 1.25))
        why = "Restart within policy"
        details = {"restart_reason": why, "start_delay": str(delay)}
        event = _event(
            "Restarting", f"Task restarting in {_duration(delay)}", RestartReason=why, StartDelay=delay, Details=details
        )
        self._change(
            one,
            status="pending",
            description="No tasks have started",
            task_state="pending",
            restarts=one.restarts + 1,
            last_restart=_now(),
            events=(*events, event)[-10:],
        )
        again = (lambda: self._start_stand_ins([one])) if one.stand_in else (lambda: self._start(one))
        self._later(delay / _SECOND / self._haste, again)

    def _fail(self, one: _Allocation, events: tuple[Json, ...]) -> None:
        """It is given up here, and rescheduled after a pause."""
        told = {"status": "failed", "description": "Failed tasks", "task_state": "dead", "failed": True, "finished_at": _now()}
        self._change(one, events=events[-10:], **told)
        delay = self._reschedule_delay(one)
        failure = self._evaluate(one.key, "alloc-failure")
        later = self._evaluate(
            one.key,
            "alloc-reschedule",
            PreviousEval=failure["ID"],
            StatusDescription="created for delayed rescheduling",
            WaitUntil=_rfc3339(_now() + delay),
        )
        self._update_eval(failure["ID"], NextEval=later["ID"])
        self._change(one, followup=later["ID"])

        def reschedule() -> None:
            one.due = one.status == "failed" and one.holds
            self._schedule(later["ID"])

        self._later(delay / _SECOND / self._haste, reschedule)

    @staticmethod
    def _reschedule_delay(one: _Allocation) -> int:
        policy = one.group["ReschedulePolicy"]
        times = len((one.tracker or {}).get("Events") or ())
        return int(min(policy["Delay"] * 2**times, policy["MaxDelay"]))

    def _stop_task(self, one: _Allocation) -> None:
        """End its server, first politely."""
        limit = one.group["Tasks"][0]["KillTimeout"]
        if one.stand_in and one.status == "running":
            self._exited(one, 0)
        elif one.task is None:
            if one.status == "pending":
                self._complete(one, one.events)
        elif not one.task.killing:
            task = one.task
            task.killing = True
            said = f"Sent interrupt. Waiting {_duration(limit)} before force killing"
            event = _event("Killing", said, KillTimeout=limit, Details={"kill_timeout": _duration(limit)})
            self._change(one, events=(*one.events, event))
            in_container = one.group["Tasks"][0]["Driver"] in ("docker", "podman")
            signal.pidfd_send_signal(task.pidfd, signal.SIGTERM if in_container else signal.SIGINT)

            def force() -> None:
                if task.pidfd in self._tasks:
                    os.killpg(task.process.pid, signal.SIGKILL)

            self._later(limit / _SECOND, force)

    # The API

    def _view(self) -> _State:
        if self._old is not None and time.monotonic() < self._old[0]:
            return self._old[1]
        return self._state

    def answer(self, method: str, target: str, body: bytes, gone: Callable[[], bool]) -> _Answer:
        """What one request is answered with; a status of 0: nothing.

        :param gone: whether the client has hung up.
        """
        path, _, query = target.partition("?")
        params = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
        path = urllib.parse.unquote(path)
        with self._changed:
            once = next((one for one in self._once if one[0] in ("", method) and path.startswith(one[1])), None)
            if once is not None:
                self._once.remove(once)
            answer = once[3] if once is not None else None
            if once is None or once[2]:
                try:
                    found = self._route(method, path, params, body, gone)
                except _Refusal as e:
                    found = e.answer
                answer = answer or found
            assert answer is not None
            self.requests.append(Request(method, path, answer.status))
            return answer

    def _route(self, method: str, path: str, params: Mapping[str, str], body: bytes, gone: Callable[[], bool]) -> _Answer:
        method = "POST" if method == "PUT" and not path.startswith("/v1/var/") else method
        if params.get("region", "global") != "global":
            raise _Refusal(500, "No path to region")
        for pattern, routes in _ROUTES:
            found = pattern.fullmatch(path)
            if found is not None:
                if method not in routes:
                    raise _Refusal(405, "Invalid method")
                handler, capability = routes[method]
                if capability and (capability in self._denied or capability.partition("-")[0] in self._denied):
                    raise _Refusal(403, "Permission denied")
                if self._leaderless and capability:
                    raise _Refusal(500, "No cluster leader")
                asked = _Asked(found.groups(), params, body, gone, params.get("namespace") or "default")
                answer: _Answer = getattr(self, handler)(asked)
                if self._leaderless and capability:  # it was lost while the query was held
                    raise _Refusal(500, "No cluster leader")
                return answer
        return _Answer(404, b"", content_type=None)

    def _hold(self, asked: _Asked, table: str, key: Key, index_of: Callable[[], int]) -> int:
        """Wait until what is asked for has changed, as far as it is a blocking query; the index to tell.

        Nomad tells the index of the whole table, and is woken by changes of that job.
        """
        try:
            index = int(asked.params.get("index", "0"))
        except ValueError:
            raise _Refusal(400, "Invalid index") from None
        wait = _seconds(asked.params["wait"]) if asked.params.get("wait") else 300.0
        if wait is None:
            raise _Refusal(400, "Invalid wait time")
        deadline = time.monotonic() + min(wait, 600.0) * random.uniform(1.0, 17 / 16)
        epoch = self._epoch
        seen = self._view().things.get((table, key), 0)
        while index and index_of() <= index and self._view().things.get((table, key), 0) == seen and epoch == self._epoch:
            left = deadline - time.monotonic()
            if left <= 0 or asked.gone():
                break
            self._changed.wait(min(left, 0.5))
        return index_of()

    def _leader(self, asked: _Asked) -> _Answer:
        return _Answer(200, b'""' if self._leaderless else b'"127.0.0.1:4647"')

    def _body(self, asked: _Asked) -> Json:
        try:
            body = json.loads(asked.body)
        except ValueError:
            text = asked.body.decode("utf-8", "replace")
            raise _Refusal(400, f"invalid character {text[:1]!r} looking for beginning of value") from None
        if not isinstance(body, dict):
            raise _Refusal(400, "json: cannot unmarshal into Go value")
        return body

    def _submitted(self, asked: _Asked, body: Json) -> tuple[Json, Key]:
        job = body.get("Job")
        if job is None:
            raise _Refusal(400, "Job must be specified")
        if not job.get("ID"):
            raise _Refusal(400, "Job ID hasn't been provided")
        canonical = _canonical({"Namespace": asked.namespace, **job})
        namespace, id_ = canonical["Namespace"], canonical["ID"]
        errors = []
        if " " in id_:
            errors.append("Job ID contains a space")
        if not canonical["TaskGroups"]:
            errors.append("Missing job task groups")
        if not errors and namespace not in self._namespaces:
            errors.append(f'job "{id_}" is in nonexistent namespace "{namespace}"')
        if not errors and canonical["NodePool"] not in ("default", "all"):
            errors.append(f'job "{id_}" is in nonexistent node pool "{canonical["NodePool"]}"')
        if errors:
            lines = "".join(f"\t* {error}\n" for error in errors)
            raise _Refusal(500, f"{len(errors)} error{'s' if len(errors) > 1 else ''} occurred:\n{lines}\n")
        return canonical, (namespace, id_)

    def _submit(self, asked: _Asked) -> _Answer:
        body = self._body(asked)
        job, key = self._submitted(asked, body)
        if body.get("EnforceIndex"):
            self._enforce(key, int(body.get("JobModifyIndex") or 0))
        evaluation = self._register(job, key)
        index = evaluation["CreateIndex"]
        return _written(
            {
                "EvalCreateIndex": index,
                "EvalID": evaluation["ID"],
                "Index": index,
                "JobModifyIndex": self._state.jobs[key]["ModifyIndex"],
                "KnownLeader": False,
                "LastContact": 0,
                "NextToken": "",
                "Warnings": "",
            },
            index,
        )

    def _enforce(self, key: Key, index: int) -> None:
        job = self._state.jobs.get(key)
        said = f"Enforcing job modify index {index}: "
        if job is None and index:
            raise _Refusal(500, said + "job does not exist")
        if job is not None and not index:
            raise _Refusal(500, said + "job already exists")
        if job is not None and job["JobModifyIndex"] != index:
            raise _Refusal(500, f"{said}job exists with conflicting job modify index: {job['JobModifyIndex']}")

    def _register(self, job: Json, key: Key) -> Json:
        standing = self._state.jobs.get(key)
        if standing is None or job_diff(standing, job)["Type"] != "None":
            self._set_job(key, job)
        return self._evaluate(key, "job-register")

    def _set_job(self, key: Key, job: Json) -> int:
        """A new version of it; its index."""
        old = self._state.jobs.get(key)
        index = self._state.bump(("jobs", key))
        self._state.jobs[key] = {
            **job,
            "CreateIndex": old["CreateIndex"] if old else index,
            "JobModifyIndex": index,
            "ModifyIndex": index,
            "Status": old["Status"] if old else "pending",
            "SubmitTime": _now(),
            "Version": old["Version"] + 1 if old else 0,
        }
        self._changed.notify_all()
        return index

    def _get_job(self, asked: _Asked) -> _Answer:
        key = (asked.namespace, asked.words[0])

        def index_of() -> int:
            view = self._view()
            job = view.jobs.get(key)
            return int(job["ModifyIndex"]) if job is not None else view.tables["jobs"]

        index = self._hold(asked, "jobs", key, index_of)
        job = self._view().jobs.get(key)
        if job is None:
            raise _Refusal(404, "job not found", index)
        return _reading(job, index)

    def _delete_job(self, asked: _Asked) -> _Answer:
        key = (asked.namespace, asked.words[0])
        job = self._state.jobs.get(key)
        told: Json = {
            **dict.fromkeys("EvalCreateIndex Index JobModifyIndex LastContact VolumeEvalIndex".split(), 0),
            **dict.fromkeys("EvalID NextToken VolumeEvalID".split(), ""),
            "KnownLeader": False,
        }
        if job is None:
            return _written(told, 0)
        if asked.params.get("purge") in ("true", "1"):
            del self._state.jobs[key]
            self._state.bump(("jobs", key), ("allocs", key))
            for one in [one for one in self._state.allocs.values() if one.key == key]:
                del self._state.allocs[one.id]  # its node ends it, as it is not among those that it is to run
                one.desired = "stop"
                self._later(_LATENCY, lambda one=one: self._stop_task(one))  # type: ignore[misc]
            self._changed.notify_all()
        else:
            self._set_job(key, {**job, "Stop": True})
        evaluation = self._evaluate(key, "job-deregister")
        index = evaluation["CreateIndex"]
        told.update(EvalCreateIndex=index, EvalID=evaluation["ID"], Index=index, JobModifyIndex=evaluation["JobModifyIndex"])
        return _written(told, index)

    def _plan_job(self, asked: _Asked) -> _Answer:
        body = self._body(asked)
        job, key = self._submitted(asked, body)
        standing = self._state.jobs.get(key)
        index = standing["JobModifyIndex"] if standing is not None else 0
        plan = _Plan()
        same = standing is not None and job_diff(standing, job)["Type"] == "None"
        planned = {"CreateIndex": index, **(standing or {}), **job}
        planned["Version"] = standing["Version"] if standing is not None and same else -1
        for group in planned["TaskGroups"]:
            holders = [one for one in self._state.of_job(key) if one.holds and one.group["Name"] == group["Name"]]
            self._plan_group(plan, planned, group, holders, "")
        diff = job_diff(standing, job)
        for group in diff["TaskGroups"]:
            updates = plan.updates.get(group["Name"], {})
            group["Updates"] = {word: updates[name] for name, word in _UPDATES.items() if updates.get(name)}
        told = {
            "Annotations": {"DesiredTGUpdates": plan.updates, "PreemptedAllocs": None},
            "CreatedEvals": None,
            "Diff": diff if body.get("Diff") else None,
            "FailedTGAllocs": plan.failed or None,
            "Index": index,
            "JobModifyIndex": index,
            "NextPeriodicLaunch": None,
            "Warnings": "",
        }
        return _written(told, index)

    def _scale(self, asked: _Asked) -> _Answer:
        body = self._body(asked)
        key = (asked.namespace, asked.words[0])
        job = self._state.jobs.get(key)
        group = (body.get("Target") or {}).get("Group")
        if not group:
            raise _Refusal(400, "missing task group name for scaling action")
        if (body.get("Count") or 0) < 0:
            raise _Refusal(400, "scaling action count can't be negative")
        if job is None:
            raise _Refusal(404, f'job "{key[1]}" not found')
        if body.get("JobModifyIndex"):
            self._enforce(key, int(body["JobModifyIndex"]))
        if all(one["Name"] != group for one in job["TaskGroups"]):
            raise _Refusal(400, f'task group "{group}" specified for scaling does not exist in job')
        told: Json = {
            "EvalCreateIndex": 0,
            "EvalID": "",
            "KnownLeader": True,
            "LastContact": 0,
            "NextToken": "",
            "Warnings": "",
        }
        if body.get("Count") is not None:
            if self.deployment_active:
                raise _Refusal(400, "job scaling blocked due to active deployment")
            counted = [{**one, "Count": body["Count"]} if one["Name"] == group else one for one in job["TaskGroups"]]
            self._set_job(key, {**job, "TaskGroups": counted})
            evaluation = self._evaluate(key, "job-scaling")
            told.update(EvalCreateIndex=evaluation["CreateIndex"], EvalID=evaluation["ID"])
        index = self._state.bump()  # of the scaling's event
        return _written({**told, "Index": index, "JobModifyIndex": self._state.jobs[key]["ModifyIndex"]}, index)

    def _job_allocations(self, asked: _Asked) -> _Answer:
        key = (asked.namespace, asked.words[0])
        index = self._hold(asked, "allocs", key, lambda: self._view().tables["allocs"])
        return _reading([_without_resources(one.stub()) for one in self._view().of_job(key)], index)

    def _job_evaluations(self, asked: _Asked) -> _Answer:
        key = (asked.namespace, asked.words[0])
        index = self._hold(asked, "evals", key, lambda: self._view().tables["evals"])
        found = [one for one in self._view().evals.values() if (one["Namespace"], one["JobID"]) == key]
        shown = [{name: value for name, value in one.items() if value != ""} for one in found]
        return _reading(sorted(shown, key=lambda one: str(one["ID"])), index)

    def _deployment(self, asked: _Asked) -> _Answer:
        job = self._view().jobs.get((asked.namespace, asked.words[0]))
        if job is None or not self.deployment_active:
            return _reading(None, 0)
        index = job["ModifyIndex"]
        told = {
            "CreateIndex": index,
            "ID": str(uuid.uuid5(uuid.NAMESPACE_OID, job["ID"])),
            "JobCreateIndex": job["CreateIndex"],
            "JobID": job["ID"],
            "JobModifyIndex": job["JobModifyIndex"],
            "JobVersion": job["Version"],
            "ModifyIndex": index,
            "Namespace": job["Namespace"],
            "Status": "running",
            "StatusDescription": "Deployment is running",
        }
        return _reading(told, index)

    def _allocations(self, asked: _Asked) -> _Answer:
        wanted = asked.params.get("filter", "")
        found = re.fullmatch(r'\s*JobID\s*==\s*"((?:[^"\\]|\\.)*)"\s*', wanted)
        if wanted and found is None:
            raise _Refusal(400, "failed to create result paginator: failed to read filter expression: 1:1 (0): no match found")
        job_id = re.sub(r"\\(.)", r"\1", found[1]) if found is not None else None
        with_resources = asked.params.get("resources", "false")
        if with_resources not in ("true", "false"):
            said = f'Failed to parse value of "resources" ({with_resources}) as a bool'
            raise _Refusal(500, f'{said}: strconv.ParseBool: parsing "{with_resources}": invalid syntax')
        stubs = [
            one.stub()
            for one in self._view().allocs.values()
            if one.key[0] in (asked.namespace, "*") and job_id in (None, one.key[1])
        ]
        shown = stubs if with_resources == "true" else list(map(_without_resources, stubs))
        return _reading(shown, self._view().tables["allocs"])

    def _one(self, asked: _Asked, absent: str) -> _Allocation:
        id_ = asked.words[0]
        if len(id_) != 36:
            raise _Refusal(500, "alloc lookup failed: index error: UUID must be 36 characters")
        found = self._view().allocs.get(id_)
        if found is None:
            raise _Refusal(404, absent, self._view().tables["allocs"] if absent == "alloc not found" else None)
        return found

    def _allocation(self, asked: _Asked) -> _Answer:
        one = self._one(asked, "alloc not found")
        told = {
            **one.stub(),
            "Job": one.job,
            "Metrics": {"NodesEvaluated": len(self._nodes)},
            "AllocModifyIndex": one.create_index,
        }
        for name in "JobType JobVersion PreemptedAllocations PreemptedByAllocation".split():
            del told[name]
        # These are only there if they say something.
        for name in "DeploymentStatus DesiredDescription FollowupEvalID NextAllocation RescheduleTracker".split():
            if not told[name]:
                del told[name]
        if not one.migrate:
            del told["DesiredTransition"]
        return _reading(told, one.modify_index)

    def _stop_allocation(self, asked: _Asked) -> _Answer:
        one = self._state.allocs[self._one(asked, "allocation not found").id]
        self._change(one, migrate=True)
        evaluation = self._evaluate(one.key, "alloc-stop")
        return _written({"EvalID": evaluation["ID"], "Index": evaluation["CreateIndex"]}, evaluation["CreateIndex"])

    def _logs(self, asked: _Asked) -> _Answer:
        params, id_ = asked.params, asked.words[0]
        one = self._state.allocs.get(id_)
        if not params.get("task"):
            raise _Refusal(400, "must provide task name")
        if params.get("type") not in ("stdout", "stderr"):
            raise _Refusal(400, "must provide log type (stdout/stderr)")
        if one is None:
            raise _Refusal(404, f'Unknown allocation "{id_}"')
        task = one.group["Tasks"][0]["Name"]
        if params["task"] != task:
            raise _Refusal(400, f'unknown task name "{params["task"]}"')
        try:
            content = Path(_log(os.path.join(self._directory, id_), task, params["type"])).read_bytes()
        except FileNotFoundError:
            raise _Refusal(404, f'log entry for task "{task}" and log type "{params["type"]}" not found') from None
        offset = int(params.get("offset") or 0)
        content = content[-offset:] if params.get("origin") == "end" and offset else content[offset:]
        if params.get("plain") == "true":
            return _Answer(200, content, None, "text/plain")
        frame = {"Data": base64.b64encode(content).decode(), "File": f"alloc/logs/{task}.{params['type']}.0", "Offset": 0}
        return _Answer(200, _dumps(frame))

    def _variable(self, namespace: str, path: str, items: Mapping[str, str], old: Json | None) -> Json:
        index, now = self._state.bump(("vars", (namespace, path))), _now()
        return {
            "CreateIndex": old["CreateIndex"] if old else index,
            "CreateTime": old["CreateTime"] if old else now,
            "Items": dict(items),
            "ModifyIndex": index,
            "ModifyTime": now,
            "Namespace": namespace,
            "Path": path,
        }

    def _get_variable(self, asked: _Asked) -> _Answer:
        view = self._view()
        found = view.variables.get((asked.namespace, asked.words[0]))
        if found is None:
            raise _Refusal(404, "variable not found", view.tables["vars"])
        return _reading(found, found["ModifyIndex"])

    def _conflict(self, asked: _Asked) -> _Answer | None:
        """The answer to a change that is refused, as the variable has another index than that given."""
        given = asked.params.get("cas")
        if given is None:
            return None
        if not given.isdigit():
            raise _Refusal(400, f'can not parse cas: strconv.ParseUint: parsing "{given}": invalid syntax')
        standing = self._state.variables.get((asked.namespace, asked.words[0]))
        if int(given) == (standing["ModifyIndex"] if standing else 0):
            return None
        nothing: Json = {"Namespace": asked.namespace, "Path": asked.words[0]}
        nothing.update(dict.fromkeys("CreateIndex CreateTime ModifyIndex ModifyTime".split(), 0))
        return _written(standing or nothing, standing["ModifyIndex"] if standing else 0, 409)

    def _put_variable(self, asked: _Asked) -> _Answer:
        items = self._body(asked).get("Items")
        if not items:
            raise _Refusal(400, "variable missing required Items object")
        conflict = self._conflict(asked)
        if conflict is not None:
            return conflict
        key = (asked.namespace, asked.words[0])
        variable = self._variable(*key, items, self._state.variables.get(key))
        self._state.variables[key] = variable
        for one in self._state.allocs.values():
            if one.waits and one.desired == "run":
                self._later(_LATENCY, lambda one=one: self._start(one))  # type: ignore[misc]
        return _written(variable, variable["ModifyIndex"])

    def _delete_variable(self, asked: _Asked) -> _Answer:
        conflict = self._conflict(asked)
        if conflict is not None:
            return conflict
        key = (asked.namespace, asked.words[0])
        self._state.variables.pop(key, None)
        return _Answer(204, b"", self._state.bump(("vars", key)), None)

    def _list_nodes(self, asked: _Asked) -> _Answer:
        there = [] if self._refused is not None and self._refused[0] == "nodes" else self._nodes
        healthy = not (self._refused is not None and self._refused[0] == "driver")
        told = [
            {
                **node,
                "Address": "127.0.0.1",
                "CreateIndex": 8,
                "Datacenter": "dc1",
                "Drain": False,
                "Drivers": {name: {"Detected": healthy, "Healthy": healthy} for name in ("docker", "exec", "raw_exec")},
                "ModifyIndex": 10,
                "NodeClass": "",
                "NodePool": "default",
                "SchedulingEligibility": "eligible",
                "Status": "ready",
                "StatusDescription": "",
                "Version": "2.0.5",
            }
            for node in there
        ]
        return _reading(told, self._view().tables["nodes"])


@attr.s(auto_attribs=True)
class _Asked:
    """A request, as far as its route needs it."""

    words: Sequence[str]
    params: Mapping[str, str]
    body: bytes
    gone: Callable[[], bool]
    namespace: str


@attr.s(auto_attribs=True)
class _Plan:
    """What one evaluation changes."""

    stops: list[tuple[_Allocation, str]] = attr.ib(factory=list)
    in_place: list[tuple[_Allocation, Json, Json]] = attr.ib(factory=list)
    places: list[tuple[int, Json, Json, _Allocation | None, str]] = attr.ib(factory=list)
    failed: dict[str, Json] = attr.ib(factory=dict)
    missing: dict[str, int] = attr.ib(factory=dict)
    updates: dict[str, Json] = attr.ib(factory=dict)


_UPDATES = {
    "Place": "create",
    "Stop": "destroy",
    "Migrate": "migrate",
    "Ignore": "ignore",
    "InPlaceUpdate": "in-place update",
    "DestructiveUpdate": "create/destroy update",
}
_READ, _SUBMIT = "read-job", "submit-job"
# Of each path and method: the method of FakeNomad, and the capability that it needs. Without one it needs no leader either.
_ROUTES: list[tuple[re.Pattern[str], dict[str, tuple[str, str]]]] = [
    (re.compile(pattern), routes)
    for pattern, routes in [
        (r"/v1/status/leader", {"GET": ("_leader", "")}),
        (r"/v1/jobs", {"POST": ("_submit", _SUBMIT)}),
        (r"/v1/job/(.+)/plan", {"POST": ("_plan_job", _SUBMIT)}),
        (r"/v1/job/(.+)/scale", {"POST": ("_scale", "scale-job")}),
        (r"/v1/job/(.+)/allocations", {"GET": ("_job_allocations", _READ)}),
        (r"/v1/job/(.+)/evaluations", {"GET": ("_job_evaluations", _READ)}),
        (r"/v1/job/(.+)/deployment", {"GET": ("_deployment", _READ)}),
        (r"/v1/job/(.+)", {"GET": ("_get_job", _READ), "DELETE": ("_delete_job", _SUBMIT), "POST": ("_submit", _SUBMIT)}),
        (r"/v1/allocations", {"GET": ("_allocations", _READ)}),
        (r"/v1/allocation/([^/]+)/stop", {"POST": ("_stop_allocation", "alloc-lifecycle")}),
        (r"/v1/allocation/([^/]+)", {"GET": ("_allocation", _READ)}),
        (r"/v1/client/fs/logs/([^/]+)", {"GET": ("_logs", "read-logs")}),
        (
            r"/v1/var/(.+)",
            {
                "GET": ("_get_variable", "variables-read"),
                "PUT": ("_put_variable", "variables-write"),
                "DELETE": ("_delete_variable", "variables-destroy"),
            },
        ),
        (r"/v1/nodes", {"GET": ("_list_nodes", "node:read")}),
    ]
]


def _without_resources(stub: Json) -> Json:
    return {name: value for name, value in stub.items() if name != "AllocatedResources"}


def _seconds(duration: str) -> float | None:
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
    if not re.fullmatch(r"(\d+(\.\d+)?(ms|s|m|h))+", duration):
        return None
    return sum(float(number) * units[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)(ms|s|m|h)", duration))


def _received() -> tuple[Json, ...]:
    directory = "Building Task Directory"
    return (
        _event("Received", "Task received by client"),
        _event("Task Setup", directory, Message=directory, Details={"message": directory}),
    )


def _not_restarting(why: str) -> Json:
    details = {"fails_task": "true", "restart_reason": why}
    return _event("Not Restarting", why, FailsTask=True, RestartReason=why, Details=details)


def _log(directory: str, task: str, kind: str) -> str:
    return os.path.join(directory, "alloc", "logs", f"{task}.{kind}.0")


def _interpolated(text: object, values: Mapping[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}", lambda found: values.get(found[1], found[0]), str(text))


def _command(task: Json, port: int, environment: Mapping[str, str]) -> list[str]:
    """What a driver would run. A container's command is run without one, with an address that can be reached so."""
    config = task["Config"] or {}
    arguments = [str(one) for one in config.get("args") or ()]
    ours = [sys.executable, "-m", "slotpool", "serve"]
    if task["Driver"] in ("docker", "podman"):
        entry = [str(one) for one in config.get("entrypoint") or ()]
        words = [*(entry if entry and entry[-1] != "serve" else ours), *arguments]
        for option, value in (("--host", "127.0.0.1"), ("--port", str(port))):
            if option in words:
                words[words.index(option) + 1] = value
    elif os.path.basename(config["command"]) == "apptainer" and "serve" in arguments:
        words = [*ours, *arguments[arguments.index("serve") + 1 :]]
    else:
        words = [config["command"], *arguments]
    return [_interpolated(word, environment) for word in words]


def _reserve(ports: range) -> socket.socket:
    """A port that nobody has: bound here, but not listened on, so that whoever is told it can have it."""
    while True:
        sock = socket.socket()
        try:
            sock.bind(("127.0.0.1", random.choice(ports)))
        except OSError:
            sock.close()
            continue
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return sock


# HTTP


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, port: int, fake: FakeNomad) -> None:
        self.fake = fake
        self._connections: set[socket.socket] = set()
        self._ended = threading.Condition()
        super().__init__(("127.0.0.1", port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), name="fake-nomad-http", daemon=True)
        self._thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._ended:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._ended:
            self._connections.discard(request)
            self._ended.notify_all()
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # that of a connection that was cut
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self.server_close()
        self._thread.join()
        with self._ended:
            for sock in self._connections:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            self._ended.wait_for(lambda: not self._connections, 5)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16
    server: _Server

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP)
        answer = self.server.fake.answer(self.command, self.path, body, lambda: bool(poll.poll(0)))
        if not answer.status:
            self.close_connection = True
            return
        self.send_response(answer.status)
        if answer.content_type is not None:
            self.send_header("Content-Type", answer.content_type)
        if answer.index is not None:
            self.send_header("X-Nomad-Index", str(answer.index))
        if answer.read:
            self.send_header("X-Nomad-Knownleader", "true")
            self.send_header("X-Nomad-Lastcontact", "0")
        if answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(answer.body)

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def version_string(self) -> str:
        return "fake"

    def log_message(self, format: str, *args: Any) -> None:
        pass


# Stand-ins for sandbox servers


@attr.s(auto_attribs=True, eq=False)
class _StandIn:
    id: str
    token: str
    slots: int
    leases: LeaseTable
    boot_id: str = attr.ib(factory=lambda: secrets.token_hex(8))


@attr.s(auto_attribs=True, eq=False)
class _Connection:
    sock: socket.socket
    ip: str
    received: bytes = b""
    held: tuple[float, Json] | None = None  # a request for leases that waits for some, and until when


class _StandIns:
    """Any number of sandbox servers in one thread behind one socket: each has an address of the loopback's network.

    They know ``/health``, leases and the cordon; their slots can't run anything.
    """

    def __init__(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # both ends of each connection are in this process
        self._limit = soft
        self._listener = socket.socket()
        # No other machine shall reach it. An ordinary user may do that since Linux 5.7.
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"lo\0")
        self._listener.bind(("0.0.0.0", 0))
        self._listener.listen(4096)
        self._port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._servers: dict[str, _StandIn] = {}  # by address
        self._woken, self._wake = os.pipe()
        self._closing = False
        self._connections: dict[int, _Connection] = {}
        self._poll = select.epoll()
        self._poll.register(self._listener, select.EPOLLIN)
        self._poll.register(self._woken, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name="fake-nomad-stand-ins", daemon=True)
        self._thread.start()

    def reserve(self, id_: str) -> tuple[str, int]:
        number = next(self._numbers)
        return f"127.77.{number >> 8}.{number & 255}", self._port

    def start(self, ip: str, id_: str, token: str, slots: int) -> None:
        names = [f"slot-{i}" for i in range(slots)]
        server = _StandIn(id_, token, slots, LeaseTable(names))
        for name in names:
            server.leases.ready(name)
        with self._lock:
            self._servers[ip] = server

    def stop(self, ip: str) -> None:
        with self._lock:
            self._servers.pop(ip, None)
        os.write(self._wake, b"x")

    def close(self) -> None:
        self._closing = True
        os.write(self._wake, b"x")
        self._thread.join()
        for connection in list(self._connections.values()):
            connection.sock.close()
        self._listener.close()
        self._poll.close()
        os.close(self._woken)
        os.close(self._wake)
        with contextlib.suppress(ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (self._limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    def _run(self) -> None:
        while not self._closing:
            held = [one for one in self._connections.values() if one.held is not None]
            deadline = min((one.held[0] for one in held if one.held is not None), default=None)
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            for fd, _ in self._poll.poll(left):
                if fd == self._woken:
                    os.read(fd, 4096)
                    for connection in [one for one in self._connections.values() if one.ip not in self._servers]:
                        self._drop(connection)
                elif fd == self._listener.fileno():
                    self._accept()
                elif fd in self._connections:
                    self._read(self._connections[fd])
            for connection in held:
                if connection.sock.fileno() in self._connections and connection.held is not None:
                    self._try_lease(connection, *connection.held)

    def _accept(self) -> None:
        sock, _ = self._listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        ip = sock.getsockname()[0]
        if ip not in self._servers:
            sock.close()
            return
        self._connections[sock.fileno()] = _Connection(sock, ip)
        self._poll.register(sock, select.EPOLLIN)

    def _drop(self, connection: _Connection) -> None:
        del self._connections[connection.sock.fileno()]
        connection.sock.close()

    def _read(self, connection: _Connection) -> None:
        try:
            received = connection.sock.recv(1 << 16)
        except OSError:
            received = b""
        if not received:
            self._drop(connection)
            return
        connection.received += received
        head, found, rest = connection.received.partition(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", head)
        size = int(length[1]) if length is not None else 0
        if not found or len(rest) < size:
            return
        connection.received = rest[size:]
        words = head.split(None, 2)
        authorized = re.search(rb"(?i)\r\nauthorization: *bearer +(\S+)", head)
        token = authorized[1].decode() if authorized is not None else None
        self._answer(connection, words[0].decode(), words[1].decode(), token, rest[:size])

    def _answer(self, connection: _Connection, method: str, path: str, token: str | None, content: bytes) -> None:
        server = self._servers.get(connection.ip)
        if server is None:
            self._drop(connection)
            return
        if token != server.token and not (path == "/health" and token is None):
            self._send(connection, 401, {"error": {"code": "unauthorized", "message": "expected this server's token"}})
            return
        now = time.monotonic()
        table = server.leases
        self._clean(table, table.expire(now))
        body: Json = json.loads(content) if content else {}
        if (method, path) == ("GET", "/health"):
            known = {
                "version": "0",
                "name": server.id,
                "boot_id": server.boot_id,
                "isolation": "none",
                "landlock": 0,
                "network": True,
                "slots": server.slots,
                "counts": table.counts(),
            }
            self._send(connection, 200, {"status": "ok", **(known if token is not None else {})})
        elif (method, path) == ("POST", "/v1/leases"):
            self._clean(table, table.release(body["release"]))
            self._try_lease(connection, now + body["wait"], body)
        elif (method, path) == ("POST", "/v1/leases/renew"):
            lost = table.renew(body["tokens"], now)
            told = {"boot_id": server.boot_id, "lost": lost, "usable": table.usable(), "leased": table.leased()}
            self._send(connection, 200, told)
        elif (method, path) == ("POST", "/v1/cordon"):
            self._clean(table, table.release(body["release"]))
            self._send(connection, 200, {"cordoned": table.cordon(body["owner"], now + body["ttl"], now)})
        else:
            self._send(connection, 404, {"error": {"code": "not_found", "message": f"a stand-in has no {path}"}})

    @staticmethod
    def _clean(table: LeaseTable, slots: Iterable[str]) -> None:
        for slot in slots:
            table.ready(slot)

    def _try_lease(self, connection: _Connection, deadline: float, body: Json) -> None:
        """Grant what is free, or hold the request while nothing is."""
        server = self._servers.get(connection.ip)
        if server is None:
            self._drop(connection)
            return
        now = time.monotonic()
        self._clean(server.leases, server.leases.expire(now))
        taken = server.leases.take(body["owner"], body["take"], body["ttl"], now)
        if not taken and body["take"] and now < deadline:
            connection.held = (deadline, body)
            return
        connection.held = None
        leases = [{"slot": one.slot, "token": one.token, "workspace": f"/{one.slot}", "network": True} for one in taken]
        self._send(connection, 200, {"boot_id": server.boot_id, "leases": leases, "leased": server.leases.leased()})

    def _send(self, connection: _Connection, status: int, value: object) -> None:
        content = json.dumps(value).encode()
        head = f"HTTP/1.1 {status} OK\r\nContent-Length: {len(content)}\r\nContent-Type: application/json\r\n\r\n"
        try:
            connection.sock.sendall(head.encode() + content)
        except OSError:
            self._drop(connection)
