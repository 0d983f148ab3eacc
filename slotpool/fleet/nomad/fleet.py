"""Containers that a Nomad job runs, perhaps shared with other pools."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Collection, Sequence
from typing import Callable

from ...config import SlotPoolConfig
from ...errors import ConfigError, JobDiffers, NomadError, SlotPoolError, StartFailed
from .. import Member
from . import diagnosis, image
from .client import NomadClient
from .connection import Connection
from .job import GROUP, IN_CONTAINERS, TASK, count_of, create_sandbox_job, differences, token_path
from .types import Allocation, Evaluation, Job, address_of, known_form
from .watch import Watch

log = logging.getLogger(__name__)

_FEW = 8  # new allocations whose ports are asked for one by one; those of more come in one list
_TRIES = 5  # at a change that others' changes keep failing
_STARTING = 30.0  # seconds in which one that is pending may come to run
# Seconds from a placement until a container has its network, most often. A packet that comes earlier asks the network who has
# the address, in vain, and it asks again only a second later.
_NETWORK = 0.5
_CONFLICT = "job modify index"  # in Nomad's words for that


class NomadFleet:
    """The allocations of one job. Thread-safe.

    Three blocking queries follow the job, its allocations and its evaluations, so that a change is known at once.
    """

    def __init__(self, config: SlotPoolConfig) -> None:
        """
        :raises ConfigError: Nomad can't be reached in that way.
        """
        self._config = config
        self._client = NomadClient(connection_of(config))
        self._notify: Callable[[], None] = lambda: None
        self._token = ""
        self._watches: list[Watch] = []
        self._changing = threading.Lock()  # lets one change of the job be made at a time
        self._lock = threading.Lock()  # guards the fields below
        self._count = 0
        self._count_index = 0  # the job's modify_index with which it was told
        self._allocations: dict[str, Allocation] = {}
        self._evaluations: Sequence[Evaluation] = ()
        self._members: Sequence[Member] = ()
        self._addresses: dict[str, str] = {}  # by allocation; they don't change in its life
        self._seen: dict[str, float] = {}  # when each allocation was first seen
        self._given_up: set[str] = set()
        self._said: dict[str, str] = {}  # the last words of servers that ended too often, by allocation
        self._known_failed: frozenset[str] = frozenset()  # allocations that had failed before this pool came
        self._deployed = False  # by this fleet
        self._attached = False  # the job stands; nothing is changed before
        self._stopping = False  # nor after

    # Start and stop

    def start(self, wanted: int, on_change: Callable[[], None]) -> None:
        config = self._config
        self._notify = on_change
        self._client.leader()
        if config.purge_job_on_start:
            self._purge()
        before, _ = self._client.allocations(config.job_id)
        self._known_failed = frozenset(one.id for one in before if not one.may_answer)
        self._attach(wanted)
        self._watches = [
            Watch("allocations", self._watch_allocations),
            Watch("job", self._watch_job),
            Watch("evaluations", self._watch_evaluations),
        ]
        for watch in self._watches:
            watch.start()

    def _attach(self, wanted: int) -> None:
        """See that the job stands, with ``wanted`` containers at least."""
        with self._changing:
            for _ in range(_TRIES):
                job = self._client.job(self._config.job_id)
                try:
                    self._bring_up(job, wanted)
                except NomadError as e:
                    if not _is_conflict(e):
                        raise
                    continue
                self._attached = True
                return
        raise StartFailed(f"job {self._config.job_id} was changed by others {_TRIES} times while it was being set up")

    def _bring_up(self, job: Job | None, wanted: int) -> None:
        """Submit, update or scale the job, unless it has changed since ``job`` was read."""
        config = self._config
        if job is None or job.stopped:
            self._token = self._shared_token(create=True)
            self._ensure_image()
            self._deployed = True  # or perhaps, if there is no answer
            since = job.modify_index if job is not None else 0
            self._set_count(wanted, self._client.submit(create_sandbox_job(config, wanted), if_unchanged_since=since))
            return
        count = count_of(job)
        self._token = self._shared_token(create=False)
        wanted = max(wanted, count)
        if config.update_job is not False:
            body = create_sandbox_job(config, count)
            different = differences(self._client.plan(body).get("Diff") or {})
            if different and config.update_job is None:
                listed = "".join(f"\n  {line}" for line in different)
                raise JobDiffers(
                    f"job {config.job_id} stands and differs from this configuration (standing -> wanted):{listed}\n"
                    "update_job=True changes it and replaces its containers, update_job=False takes it as it is; or choose "
                    "another job_id"
                )
            if different:
                self._ensure_image()
                index = self._client.submit(create_sandbox_job(config, wanted), if_unchanged_since=job.modify_index)
                self._set_count(wanted, index)
                return
        self._set_count(count, job.modify_index)
        if wanted > count:
            self._scale(job, wanted)

    def _ensure_image(self) -> None:
        if self._config.driver == "docker":
            image.ensure(
                self._config.image,
                auto_build=self._config.auto_build_local_image,
                dockerfile=self._config.dockerfile_path,
                context=self._config.docker_build_context,
            )

    def _shared_token(self, create: bool) -> str:
        """The token of the job's servers. Nomad keeps it for all pools that share the job; the first one makes it."""
        path, given = token_path(self._config.job_id), self._config.token
        if given is not None and not create:
            return given
        for _ in range(_TRIES):
            kept = (self._client.variable(path) or {}).get("token")
            if kept is not None:
                if given not in (None, kept):
                    raise ConfigError("token", f"the token that Nomad's variable {path} has", "another one (not shown)")
                return kept
            if not create:
                raise ConfigError(
                    "token", f"a token, as job {self._config.job_id} stands and there is no variable {path}", "none"
                )
            fresh = given or secrets.token_urlsafe(32)
            if self._client.create_variable(path, {"token": fresh}):
                return fresh
        raise StartFailed(f"expected the entry token in Nomad's variable {path}, got a variable without it")

    def stop(self, purge: bool) -> None:
        """Leave the job to others, and to the next pool; unless it is to be purged, or never came up."""
        self._stopping = True
        for watch in self._watches:
            watch.stop()
        for watch in self._watches:
            watch.join(self._client.interrupt)
        failed = self._deployed and self.failure() is not None and not self.members()
        try:
            with self._changing:  # after what has begun
                if purge:
                    self._purge()
                elif failed:
                    self._client.stop(self._config.job_id)
        finally:
            self._deployed = False
            self._client.close()

    def _purge(self) -> None:
        """Remove the job with its containers, and the token."""
        job = self._client.job(self._config.job_id)
        if job is not None:
            count_of(job)
        try:
            # First, as who makes the job anew meanwhile makes a new token for it.
            self._client.delete_variable(token_path(self._config.job_id))
        finally:
            self._client.stop(self._config.job_id, purge=True)

    # What is there

    def members(self) -> Sequence[Member]:
        with self._lock:
            return self._members

    def _find_members(self) -> Sequence[Member]:
        """The lock is held."""
        early = _NETWORK if self._config.driver in IN_CONTAINERS else 0.0
        return [
            Member(
                one.id,
                one.index,
                f"http://{self._addresses[one.id]}",
                self._token,
                name=one.id,
                delay=0.0 if one.runs else early,
            )
            for one in sorted(self._allocations.values(), key=lambda one: one.index)
            if one.may_answer and one.id in self._addresses and one.id not in self._given_up
        ]

    def size(self) -> int:
        with self._lock:
            return self._count

    def failure(self) -> Exception | None:
        with self._lock:
            current = [one for one in self._allocations.values() if one.id not in self._known_failed]
            placed = sum(one.may_answer for one in self._allocations.values())
            evaluations, missing, said = self._evaluations, self._count - placed, dict(self._said)
        failed = diagnosis.of_allocations(current, self._config.image, self._config.driver, said)
        return failed or diagnosis.of_evaluations(evaluations, missing)

    def describe(self) -> str:
        with self._lock:
            allocations, addresses, count = list(self._allocations.values()), dict(self._addresses), self._count
        told = diagnosis.describe(self._config.job_id, count, allocations, addresses)
        troubles = [str(watch.trouble) for watch in self._watches if watch.trouble is not None]
        return "\n".join([told, *troubles[:1]])

    def _set_count(self, count: int, index: int) -> None:
        """Unless it is already known what came after that."""
        with self._lock:
            if index >= self._count_index:
                self._count, self._count_index = count, index

    # Changing it

    def grow(self, wanted: int) -> None:
        if not self._attached or wanted <= self.size():
            return
        with self._changing:
            for _ in range(0 if self._stopping else _TRIES):
                job = self._client.job(self._config.job_id)
                count = job.standing_count(GROUP) if job is not None else None
                try:
                    if job is None or count is None:
                        self._bring_up(job, wanted)
                    else:
                        self._set_count(count, job.modify_index)
                        if count < wanted:
                            self._scale(job, wanted)
                except NomadError as e:
                    if not _is_conflict(e):
                        raise
                    continue
                return

    def shrink(self, wanted: int, closed: Collection[str], before: float) -> bool:
        with self._changing:
            job = self._client.job(self._config.job_id)
            count = job.standing_count(GROUP) if job is not None else None
            if self._stopping or job is None or count is None:
                return False
            self._set_count(count, job.modify_index)
            if count <= wanted:
                return True
            now, _ = self._client.allocations(self._config.job_id)
            if any(one.index >= wanted and one.id not in closed and self._may_be_used(one) for one in now):
                return False
            if time.monotonic() > before:
                return False
            try:
                self._scale(job, wanted)
            except NomadError as e:
                if not _is_conflict(e):
                    raise
                return False
            return True

    def _may_be_used(self, allocation: Allocation) -> bool:
        """Whether somebody may have a lease there; not in one that has not come to run for long."""
        with self._lock:
            seen = self._seen.get(allocation.id, time.monotonic())
        return allocation.runs or (allocation.may_answer and time.monotonic() < seen + _STARTING)

    def _scale(self, job: Job, count: int) -> None:
        """Unless the job has changed since it was read."""
        message = f"slotpool needs {count} container(s)"
        index = self._client.scale(self._config.job_id, GROUP, count, message, if_unchanged_since=job.modify_index)
        self._set_count(count, index)

    def replace(self, member: Member) -> None:
        with self._lock:
            self._given_up.add(member.id)
            self._members = self._find_members()
        try:
            self._client.stop_allocation(member.id)
        except SlotPoolError:
            with self._lock:
                self._given_up.discard(member.id)
                self._members = self._find_members()
            raise

    # What the watches do

    def _watch_allocations(self, index: int, wait: float) -> int:
        found, index = self._client.allocations(self._config.job_id, index, wait, self._allocations)
        with self._lock:
            unknown = [one.id for one in found if one.may_answer and one.id not in self._addresses]
            silent = [one for one in found if one.id not in self._known_failed and one.id not in self._said]
        addresses = self._ask_addresses(unknown)
        given_up = [one.id for one in silent if diagnosis.has_given_up(one)]
        said = {id_: self._last_words(id_) for id_ in given_up[-1:]}
        with self._lock:
            self._allocations = {one.id: one for one in found}
            self._seen = {one.id: self._seen.get(one.id, time.monotonic()) for one in found}
            self._addresses = {id_: at for id_, at in {**self._addresses, **addresses}.items() if id_ in self._allocations}
            self._given_up &= self._allocations.keys()
            self._said.update(said)
            self._members = self._find_members()
        self._notify()
        return index

    def _last_words(self, allocation_id: str) -> str:
        try:
            return self._client.last_output(allocation_id, TASK)
        except NomadError as e:
            return f"(not to be had: {e})"

    def _ask_addresses(self, new: Sequence[str]) -> dict[str, str]:
        if len(new) > _FEW:
            told = [one for one in self._client.allocations_with_resources(self._config.job_id) if one.get("ID") in set(new)]
        else:
            told = [one for one in map(self._client.allocation, new) if one is not None]
        with known_form("allocations with their ports"):
            found = {str(one["ID"]): address_of(one, "http") for one in told}
        for id_ in [id_ for id_, address in found.items() if address is None]:
            log.warning("allocation %s has no port labelled http; is it slotpool's job?", id_)
        return {id_: address for id_, address in found.items() if address is not None}

    def _watch_job(self, index: int, wait: float) -> int:
        job, index = self._client.watch_job(self._config.job_id, index, wait)
        if job is None:
            self._set_count(0, index)
        else:
            self._set_count(job.standing_count(GROUP) or 0, job.modify_index)
        self._notify()
        return index

    def _watch_evaluations(self, index: int, wait: float) -> int:
        found, index = self._client.evaluations(self._config.job_id, index, wait)
        with self._lock:
            self._evaluations = found
        self._notify()
        return index


def _is_conflict(e: NomadError) -> bool:
    """Whether the job has changed since it was read, so that nothing was done."""
    return _CONFLICT in e.message.lower()


def connection_of(config: SlotPoolConfig) -> Connection:
    """How to reach Nomad: what the configuration gives, the rest from the environment."""
    given = {name[len("nomad_") :]: getattr(config, name) for name in _CONNECTION}
    return Connection.of(given)


_CONNECTION = [
    "nomad_address",
    "nomad_token",
    "nomad_namespace",
    "nomad_region",
    "nomad_cacert",
    "nomad_capath",
    "nomad_client_cert",
    "nomad_client_key",
    "nomad_tls_server_name",
    "nomad_skip_verify",
    "nomad_http_auth",
]
