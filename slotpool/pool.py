"""The pool: hands out slots as leases, keeps some ready, brings about the containers that demand needs."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import queue
import secrets
import socket
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Callable

from .config import SlotPoolConfig
from .container import Container
from .errors import (
    AcquireTimeout,
    ConfigError,
    ContainerLost,
    ContainerRefused,
    InvalidRequest,
    LeaseLost,
    PoolClosed,
    SlotPoolError,
    StartFailed,
    shown,
)
from .fleet import Fleet, Member
from .fleet.local import LocalFleet
from .fleet.static import StaticFleet
from .health import HealthThread
from .scaling import Demand, Scaler
from .slot import ExecutionResult, Slot, SlotState
from .stats import Counters
from .tenure import Tenure

if TYPE_CHECKING:
    from types import TracebackType

    from .sandbox.protocol import CallRequest

log = logging.getLogger(__name__)

_WORKERS = 32  # threads for the pool's requests to servers
_EXCHANGES = 3  # requests that give back and take, under way at once to one container
_HOLD = 5.0  # seconds that such a request waits for a slot to become free, if somebody waits for it
_HOLDING = 4  # containers without a free slot at which such requests wait at once
_SHORT_HOLD = 1.0  # and if nobody does, but slots have just been given back


class _Waiter:
    """A caller in line. Its queue gets a tenure, or None when the pool closes."""

    def __init__(self) -> None:
        self.queue: queue.Queue[Tenure | None] = queue.Queue(1)


class SlotPool:
    """A pool of slots. Thread-safe; use it in a ``with`` block, or :meth:`start` and :meth:`stop` it.

    A process that is forked from the pool's may not use the pool or its slots; it should make a pool of its own.

    :param config: the settings; or give them as keywords, see :class:`SlotPoolConfig`.
    :raises ConfigError: a setting can't be used.
    """

    def __init__(self, config: SlotPoolConfig | None = None, **settings: Any) -> None:
        if config is not None and settings:
            raise ConfigError("config", "either a SlotPoolConfig or keywords", "both")
        if config is not None and not isinstance(config, SlotPoolConfig):
            raise ConfigError("config", "a SlotPoolConfig", shown(config))
        self.config = config if config is not None else SlotPoolConfig.make(settings)
        self._owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        # Guards every field below but the queues, which have locks of their own. Nothing slow is done under it.
        self._lock = threading.Lock()
        self._ready: queue.Queue[Tenure] = queue.Queue()  # leases that are held for the next to come
        self._waiters: deque[_Waiter] = deque()  # in order of arrival; nobody overtakes them, see acquire()
        self._containers: dict[str, Container] = {}
        self._held: set[Tenure] = set()
        self._counters = Counters()
        self._scaler = self._new_scaler()
        self._scale_target = 0  # containers that the fleet is, or is being, brought to
        self._scaling = False
        self._admitting: set[str] = set()  # members that are being asked who they are
        self._no_scaling_before = 0.0
        self._trouble: Exception | None = None  # the last failure to scale or to lease
        self._state = "new"
        self._pid = os.getpid()
        self._fleet: Fleet = _fleet_of(self.config)
        self._executor: ThreadPoolExecutor | None = None
        self._health: HealthThread | None = None
        self._grown = threading.Condition(self._lock)  # signalled when containers come, or can't
        # Leases whose slot was collected without a release. A finalizer may run anywhere, so it only puts them here.
        self._abandoned: queue.SimpleQueue[Tenure] = queue.SimpleQueue()

    def _new_scaler(self) -> Scaler:
        config = self.config
        return Scaler(config.slots_per_container, config.min_containers, config.max_containers, config.scale_down_after)

    # Life

    def start(self) -> SlotPool:
        """Start the fleet and wait for ``min_containers``; a no-op if it is started.

        :raises IsolationUnavailable, StartFailed: what was started is ended again.
        :raises PoolClosed: it was stopped; make a new one.
        """
        with self._lock:
            if self._state == "started":
                return self
            if self._state != "new" or os.getpid() != self._pid:
                raise PoolClosed(f"expected a new pool, got one that is {self._state}; make another SlotPool")
            self._state = "started"
            self._executor = ThreadPoolExecutor(_WORKERS, "slotpool")
            self._health = HealthThread(self)
        _open_pools.add(self)
        try:
            self._fleet.start(self._fleet_changed)
            self._health.start()
            with self._lock:
                self._decide_scale()
            self._await_containers()
        except BaseException:
            self.stop()
            raise
        return self

    def _await_containers(self) -> None:
        deadline = time.monotonic() + self.config.start_timeout
        needed = self.config.min_containers if self.config.backend != "static" else 1
        while True:
            failure = self._fleet.failure()
            with self._grown:
                if len(self._containers) >= needed:
                    return
                if failure is not None or (self._trouble is not None and self.config.backend == "static"):
                    break
                if not self._grown.wait(deadline - time.monotonic()) and time.monotonic() >= deadline:
                    break
        if isinstance(failure, StartFailed):
            raise failure
        cause = failure or self._trouble
        waited = f"{needed} container(s) are not there after {self.config.start_timeout:g} s" if cause is None else str(cause)
        raise StartFailed(f"{waited}; {self._fleet.describe()}") from cause

    def stop(self, purge_job: bool = False) -> None:
        """End everything: waiters get :class:`PoolClosed`, held slots are lost, leases are given back, local servers ended.

        Repeatable, from any thread. In a process forked from the pool's it does nothing.

        :param purge_job: also remove what a cluster keeps for the fleet; nothing if it is local.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            before, self._state = self._state, "stopped"
            waiters, held = list(self._waiters), list(self._held)
            self._waiters.clear()
            self._held.clear()
            containers = list(self._containers.values())
            self._grown.notify_all()
        for waiter in waiters:
            waiter.queue.put(None)
        for tenure in held:
            tenure.lose("the pool has been stopped")
        if before == "stopped" and not purge_job:
            return
        if self._health is not None:
            self._health.stop()
        if self.config.backend != "local":
            for container in containers:
                self._give_all_back(container)
        self._fleet.stop(purge_job)
        for container in containers:
            container.client.close()
        if self._executor is not None:
            self._executor.shutdown()
        _open_pools.discard(self)

    def _give_all_back(self, container: Container) -> None:
        tokens = [*container.tenures, *container.outbox]
        if tokens:
            try:
                container.client.lease(self._owner, self.config.lease_ttl, take=0, release=tokens)
            except SlotPoolError as e:
                log.warning("leases could not be given back, and will expire: %s", e)

    def __enter__(self) -> SlotPool:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _require_started(self) -> None:
        if os.getpid() != self._pid:
            raise PoolClosed(f"expected the process {self._pid} that made the pool, got {os.getpid()}; make a pool of its own")
        if self._state != "started":
            raise PoolClosed(f"expected a started pool, got one that is {self._state}; use it in a with block, or call start()")

    # Leases

    def slot(self, trajectory_id: str | None = None, *, timeout: float | None = None, network: bool | None = None) -> Slot:
        """The same as :meth:`acquire`, to be used as ``with pool.slot() as s:``."""
        return self.acquire(trajectory_id, timeout=timeout, network=network)

    def acquire(self, trajectory_id: str | None = None, *, timeout: float | None = None, network: bool | None = None) -> Slot:
        """A clean slot, for the caller alone until it is released; first come, first served.

        :param trajectory_id: a name for what the slot is used for; made up if not given.
        :param timeout: seconds to wait at most; default ``acquire_timeout``. 0 takes only what is ready.
        :param network: whether it must have network, or must not; default the pool's ``network``.
        :raises AcquireTimeout: it says what the pool was waiting for. Safe to try again.
        :raises PoolClosed: the pool isn't started, or was stopped meanwhile.
        :raises InvalidRequest: the isolation can't keep a slot off the network.
        """
        self._require_started()
        if timeout is None:
            timeout = self.config.acquire_timeout
        elif isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0:
            raise InvalidRequest("timeout", "a number of seconds, at least 0, or None", shown(timeout))
        if trajectory_id is not None and not isinstance(trajectory_id, str):
            raise InvalidRequest("trajectory_id", "a string or None", shown(trajectory_id))
        if not isinstance(network, (bool, type(None))):
            raise InvalidRequest("network", "True, False or None", shown(network))
        asked = time.monotonic()
        tenure = self._take_ready_or_wait(asked, timeout)
        slot = Slot(self, tenure, trajectory_id)  # from here on the slot's finalizer sees to the lease
        wanted = network if network is not None else self.config.network
        if wanted is not None and wanted != tenure.network:
            try:
                with tenure.use() as client:
                    tenure.network = client.reset(tenure.slot, tenure.token, wanted)
            except BaseException:
                slot.release()
                raise
        return slot

    def _take_ready_or_wait(self, asked: float, timeout: float) -> Tenure:
        waiter = None
        with self._lock:
            self._counters.requests_num += 1
            tenure = None if self._waiters else self._pop_ready()
            if tenure is None:
                waiter = _Waiter()
                self._waiters.append(waiter)
                self._counters.requests_queued += 1
            else:
                self._hand_out(tenure, asked)
            self._refill()
        if tenure is not None:
            return tenure
        assert waiter is not None
        try:
            try:
                tenure = waiter.queue.get(timeout=timeout)
            except queue.Empty:
                tenure = self._leave_line(waiter)
                if tenure is None:
                    raise self._timed_out(timeout) from self._trouble
            if tenure is None:
                raise PoolClosed("the pool was stopped while this caller waited for a slot")
        except BaseException as e:
            late = self._leave_line(waiter)
            if late is not None:
                self._give_back(late)
            with self._lock:
                self._counters.requests_errors += 1
            raise e
        with self._lock:
            self._counters.requests_wait_ms += (time.monotonic() - asked) * 1000
        return tenure

    def _pop_ready(self) -> Tenure | None:
        while True:
            try:
                tenure = self._ready.get_nowait()
            except queue.Empty:
                return None
            if not tenure.lost:
                return tenure

    def _leave_line(self, waiter: _Waiter) -> Tenure | None:
        """Wait no more; a tenure that was handed over in the last moment."""
        with self._lock:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                return None
        try:
            return waiter.queue.get_nowait()
        except queue.Empty:
            return None

    def _timed_out(self, timeout: float) -> AcquireTimeout:
        with self._lock:
            total, held, waiting = self._total(), len(self._held), len(self._waiters)
            trouble = self._trouble or self._fleet.failure()
        limit = f"max_containers={self.config.max_containers} times slots_per_container={self.config.slots_per_container}"
        return AcquireTimeout(
            f"no slot became free within {timeout:g} s: {held} of {total} slots are held by this pool, {waiting} more callers wait "
            f"(limit: {limit}); {self._fleet.describe()}" + (f"; last trouble: {trouble}" if trouble else "")
        )

    def _hand_out(self, tenure: Tenure, now: float) -> None:
        tenure.acquired_at = now
        self._held.add(tenure)

    def _deliver(self, tenure: Tenure) -> None:
        """A lease is there: to whoever has waited longest, else it is kept ready, or given back. The lock is held."""
        if self._waiters:
            self._hand_out(tenure, time.monotonic())
            self._waiters.popleft().queue.put_nowait(tenure)
        elif self._ready.qsize() < self.config.prefetch or tenure.used:
            self._ready.put_nowait(tenure)
        else:
            self._return_to_server(tenure)

    def _return_to_server(self, tenure: Tenure) -> None:
        container = tenure.container
        del container.tenures[tenure.token]
        container.outbox.append(tenure.token)
        self._submit_exchange(container)

    def release(self, slot: Slot, reset_workspace: bool = True) -> None:
        """Give a slot back. Returns at once; the server cleans the slot before anybody else gets it. Repeatable.

        :param reset_workspace: False hands the slot as it is, files and processes and all, to the next ``acquire`` of this pool.
        """
        if not isinstance(slot, Slot):
            raise InvalidRequest("slot", "a Slot of this pool", shown(slot))
        if slot._pool is not self:
            raise InvalidRequest("slot", "a slot of this pool", f"{slot!r} of another pool")
        if os.getpid() != self._pid:
            return
        slot._finalizer.detach()
        tenure = slot._tenure
        if not tenure.end():
            log.debug("%r was released before", slot)
            return
        self._give_back(tenure, keep=not reset_workspace)

    def _give_back(self, tenure: Tenure, keep: bool = False) -> None:
        container = tenure.container
        with self._lock:
            if tenure not in self._held:
                return  # lost, or the pool is stopped
            self._held.discard(tenure)
            self._counters.usage_ms += (time.monotonic() - tenure.acquired_at) * 1000
            if tenure.token not in container.tenures:
                self._counters.returns_bad += 1
                return
            if (keep or not tenure.used) and not container.cordoned:
                fresh = tenure.handed_on()
                container.tenures[fresh.token] = fresh
                self._deliver(fresh)
            else:
                self._return_to_server(tenure)

    def _abandon(self, tenure: Tenure) -> None:
        """A slot was collected without a release. Called by the collector, perhaps amid anything: takes no lock."""
        self._abandoned.put(tenure)
        if self._health is not None:
            self._health.wake()

    def _collect_abandoned(self) -> None:
        while True:
            try:
                tenure = self._abandoned.get_nowait()
            except queue.Empty:
                return
            if tenure.end():
                log.warning("%s was dropped without being released; giving it back", tenure.slot)
                with self._lock:
                    self._counters.slots_abandoned += 1
                self._give_back(tenure)

    # Getting leases from containers

    def _refill(self) -> None:
        """See that leases are asked for, and containers, as need be. The lock is held."""
        if self._state != "started":
            return
        need = self._need()
        holding = 0
        for container in self._in_order():
            if need <= 0:
                break
            if container.room <= 0:
                continue
            if container.exhausted:  # others have its slots: wait there for one, if somebody waits here, but don't count on it
                if self._waiters and holding < _HOLDING:
                    holding += 1
                    self._submit_exchange(container)
                continue
            need -= container.room
            self._submit_exchange(container)
        self._decide_scale()

    def _need(self) -> int:
        """Leases to ask for, beyond those that are asked for already."""
        asking = sum(container.asking for container in self._containers.values())
        return len(self._waiters) + self.config.prefetch - self._ready.qsize() - asking

    def _in_order(self) -> list[Container]:
        return sorted(self._containers.values(), key=lambda container: container.member.index)

    def _submit_exchange(self, container: Container) -> None:
        if container.exchanges < _EXCHANGES and self._executor is not None and self._state == "started":
            container.exchanges += 1
            self._submit(self._exchange, container)

    def _exchange(self, container: Container) -> None:
        """Give back what is in the container's outbox and take what is needed, in one request."""
        with self._lock:
            release, container.outbox = container.outbox, []
            take = max(0, min(self._need(), container.room))
            container.asking += take
            hold = _HOLD if self._waiters else _SHORT_HOLD if release else 0.0
        granted: list[Tenure] = []
        failure: SlotPoolError | None = None
        if take or release:
            try:
                answer = container.client.lease(self._owner, self.config.lease_ttl, take, release, hold)
                granted = [Tenure(container, lease) for lease in answer["leases"]]
            except SlotPoolError as e:
                failure = e
        with self._lock:
            container.exchanges -= 1
            container.asking -= take
            self._trouble = failure
            if failure is None and take:
                container.exhausted = not granted
            stale = container.id not in self._containers or self._state != "started"
            if stale:
                unwanted = [tenure.token for tenure in granted]
            else:
                unwanted = []
                for tenure in granted:
                    container.tenures[tenure.token] = tenure
                    self._counters.leases_num += 1
                    self._deliver(tenure)
                if container.outbox:
                    self._submit_exchange(container)
                if failure is None:
                    self._refill()
        if unwanted:
            container.client.lease(self._owner, self.config.lease_ttl, 0, unwanted)
        if failure is not None:
            log.warning("%s: %s", container.id, failure)
            if isinstance(failure, ContainerLost) and self._health is not None:
                self._health.wake()

    def _submit(self, act: Callable[..., None], *args: Any) -> None:
        assert self._executor is not None
        try:
            self._executor.submit(_logged, act, *args)
        except RuntimeError:  # the interpreter is going down; the pool's atexit handler does what is left to do
            log.debug("not done any more: %s", act)

    # Containers

    def _fleet_changed(self) -> None:
        """Take in new containers and drop those that are gone. Called by the fleet, from any thread."""
        members = {member.id: member for member in self._fleet.members()}
        with self._lock:
            if self._state != "started":
                return
            for id_ in [id_ for id_ in self._containers if id_ not in members]:
                self._drop(self._containers[id_], "its container has ended")
            for id_, member in members.items():
                if id_ not in self._containers and id_ not in self._admitting:
                    self._admitting.add(id_)
                    self._submit(self._admit, member)
            self._rescale()
            self._grown.notify_all()

    def _admit(self, member: Member) -> None:
        container = Container(member, self.config.slots_per_container)
        failure: SlotPoolError | None = None
        try:
            container.info = container.client.health()
            container.capacity = int(container.info.get("slots", 0))
            if container.capacity < 1:
                failure = ContainerRefused(f"{member.address} did not tell its slots; is the token right?")
        except SlotPoolError as e:
            failure = e
        with self._lock:
            self._admitting.discard(member.id)
            if failure is not None:
                log.warning("%s: %s", member.id, failure)
                self._trouble = failure
            elif self._state == "started":
                log.info(
                    "%s has come, with %d slots, isolation %s", member.id, container.capacity, container.info.get("isolation")
                )
                self._containers[member.id] = container
                self._refill()
            self._grown.notify_all()

    def _drop(self, container: Container, why: str) -> None:
        """Its leases are lost. The lock is held."""
        del self._containers[container.id]
        for tenure in container.tenures.values():
            tenure.lose(f"{tenure.slot} of {container.id} is lost: {why}")
        self._counters.leases_lost += len(container.tenures)
        self._counters.containers_lost += not container.cordoned
        container.tenures.clear()
        self._refill()

    def _decide_scale(self) -> None:
        """Scale up, if demand wants it. The lock is held."""
        demand = Demand(len(self._held), len(self._waiters))
        now = time.monotonic()
        if self._scaler.wanted(demand, now) > self._scale_target and now >= self._no_scaling_before:
            self._scale_target = self._scaler.current
            self._counters.scale_ups += 1
            self._rescale()

    def _rescale(self) -> None:
        """Have the fleet brought to the wanted number, in the background. The lock is held."""
        if self.config.backend != "static" and not self._scaling:
            self._scaling = True
            self._submit(self._scale)

    def _scale(self) -> None:
        while True:
            with self._lock:
                target = self._scale_target
            failure: SlotPoolError | None = None
            try:
                self._fleet.scale(target)
            except SlotPoolError as e:
                failure = e
                log.warning("scaling to %d containers failed: %s", target, e)
            with self._lock:
                if failure is not None:
                    self._trouble = failure
                    self._counters.scale_errors += 1
                    self._no_scaling_before = time.monotonic() + self.config.scale_cooldown
                    self._scale_target = len(self._containers)
                if failure is not None or target == self._scale_target:
                    self._scaling = False
                    self._grown.notify_all()
                    return

    def _scale_down(self) -> None:
        """End containers that have not been needed for a while, from the highest; never one with a slot in use."""
        with self._lock:
            wanted = self._scaler.wanted(Demand(len(self._held), len(self._waiters)), time.monotonic())
            in_use = {tenure.container.id for tenure in self._held}
            for container in reversed(self._in_order()):
                if container.member.index < wanted or container.id in in_use:
                    break
                container.cordoned = True
            keep = max((c.member.index + 1 for c in self._containers.values() if not c.cordoned), default=0)
            keep = max(keep, wanted)
            if self.config.backend == "static" or keep >= self._scale_target:
                return
            self._scale_target = keep
            self._counters.scale_downs += 1
            self._keep_ready(lambda tenure: not tenure.container.cordoned)
            self._rescale()

    def _keep_ready(self, wanted: Callable[[Tenure], bool]) -> None:
        """Leave only the wanted ones in the queue of ready leases. The lock is held."""
        for _ in range(self._ready.qsize()):
            tenure = self._ready.get_nowait()
            if not tenure.lost and wanted(tenure):
                self._ready.put_nowait(tenure)

    # What the health thread does

    def _tend(self) -> None:
        """Renew every lease, in one request a container, side by side; see to what is missing or not needed."""
        self._collect_abandoned()
        with self._lock:
            due = [container for container in self._containers.values() if not container.checking]
            for container in due:
                container.checking = True
                container.exhausted = False
                self._submit(self._check, container)
        self._scale_down()
        self._fleet_changed()  # a container that could not be admitted is tried again, one that is missing is replaced
        with self._lock:
            self._refill()

    def _check(self, container: Container) -> None:
        with self._lock:
            tokens = list(container.tenures)
        failure: SlotPoolError | None = None
        lost: list[str] = []
        try:
            lost = container.client.renew(tokens, timeout=self._check_timeout())
        except SlotPoolError as e:
            failure = e
        with self._lock:
            container.checking = False
            now = time.monotonic()
            if failure is None:
                container.answered_at = now
            for token in lost:
                tenure = container.tenures.pop(token, None)
                if tenure is not None:
                    tenure.lose(f"{tenure.slot} of {container.id} is lost: its server has ended the lease")
                    self._counters.leases_lost += 1
            if lost:
                self._keep_ready(lambda _: True)
                self._refill()
            # No lease in it can have outlived this, so nothing is taken from anybody.
            hopeless = failure is not None and now - container.answered_at > self.config.lease_ttl
            if hopeless and container.id in self._containers:
                self._drop(container, f"it has not answered for {self.config.lease_ttl:g} s: {failure}")
        if failure is not None:
            log.warning("%s does not answer the health check: %s", container.id, failure)
        if hopeless:
            self._fleet.replace(container.member)
            self._fleet_changed()

    def _check_timeout(self) -> float:
        return max(0.2, min(5.0, self.config.lease_ttl / 3))

    # Executing

    def execute(self, slot: Slot, tool: str, args: Mapping[str, Any], timeout: float | None = None) -> ExecutionResult:
        """Run a tool by name in a slot: ``bash {command, cwd, env, stdin}``, ``read_file {path}``, ``write_file {path, content}``.

        It runs at most once. A file that can't be read or written is a result with ``error``, not an exception.

        :param timeout: seconds; default ``command_timeout``.
        :raises InvalidRequest: nothing was run.
        :raises SlotError: ``may_have_run`` tells whether it is safe to try again elsewhere.
        """
        self._require_started()
        self._check_call(slot, tool, args)
        execution_id = secrets.token_hex(16)
        limit = self._timeout(timeout)
        failed = True
        try:
            with slot._tenure.use() as client:
                result = client.execute(slot.slot_id, slot._tenure.token, tool, args, limit, execution_id)
            failed = False
        finally:
            with self._lock:
                self._counters.executions_num += 1
                self._counters.executions_errors += failed
        return ExecutionResult.of(result, execution_id, slot.slot_id)

    def execute_batch(
        self, calls: Iterable[tuple[Slot, str, Mapping[str, Any]]], timeout: float | None = None
    ) -> list[ExecutionResult]:
        """Run many tools side by side, one request a container; the results in the order asked.

        What goes wrong with one call, or one container, is in the ``error`` of its results only; ``metadata`` then has
        ``exception`` and ``may_have_run``.

        :param timeout: seconds for each call; default ``command_timeout``.
        :raises InvalidRequest: if ``calls`` is not what it should be; nothing was run.
        """
        self._require_started()
        limit = self._timeout(timeout)
        entries: list[tuple[Slot, CallRequest]] = []
        for call in calls:
            if not isinstance(call, tuple) or len(call) != 3:
                raise InvalidRequest("calls", "tuples (slot, tool, args)", shown(call))
            slot, tool, args = call
            self._check_call(slot, tool, args)
            entries.append((slot, _call_request(slot, tool, args, limit)))
        groups: dict[Container, list[int]] = {}
        for i, (slot, _) in enumerate(entries):
            groups.setdefault(slot._tenure.container, []).append(i)
        found: list[ExecutionResult | None] = [None] * len(entries)

        def run(container: Container, numbers: Sequence[int]) -> None:
            part = [entries[i] for i in numbers]
            for i, result in zip(numbers, _run_batch(container, part)):
                found[i] = result

        if len(groups) == 1:
            ((container, numbers),) = groups.items()
            run(container, numbers)
        elif groups:
            with ThreadPoolExecutor(len(groups), "slotpool-batch") as side_by_side:
                for future in [side_by_side.submit(run, *group) for group in groups.items()]:
                    future.result()
        results = [result for result in found if result is not None]
        with self._lock:
            self._counters.executions_num += len(results)
            self._counters.executions_errors += sum("exception" in result.metadata for result in results)
        return results

    def _check_call(self, slot: object, tool: object, args: object) -> None:
        if not isinstance(slot, Slot) or slot._pool is not self:
            raise InvalidRequest("slot", "a slot of this pool", shown(slot))
        if not isinstance(tool, str):
            raise InvalidRequest("tool", "a string", shown(tool))
        if not isinstance(args, Mapping):
            raise InvalidRequest("args", "a mapping", shown(args))
        try:
            json.dumps(args)
        except (TypeError, ValueError) as e:
            raise InvalidRequest("args", "what JSON can express", f"{shown(args)}: {e}") from e

    def _timeout(self, timeout: object) -> float:
        if timeout is None:
            return self.config.command_timeout
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0.001 <= timeout <= 86_400:
            raise InvalidRequest("timeout", "a number of seconds from 0.001 to 86400, or None", shown(timeout))
        return float(timeout)

    # Looking at it

    def _total(self) -> int:
        return sum(container.capacity for container in self._containers.values() if not container.cordoned)

    @property
    def total_slots(self) -> int:
        """Slots of the containers that are there."""
        with self._lock:
            return self._total()

    @property
    def acquired_slots(self) -> int:
        """Slots that callers of this pool hold."""
        with self._lock:
            return len(self._held)

    @property
    def available_slots(self) -> int:
        """Slots that this pool doesn't hold for a caller: ready, being cleaned, or, of shared servers, perhaps another pool's."""
        with self._lock:
            return max(0, self._total() - len(self._held))

    def get_stats(self) -> dict[str, Any]:
        """What the pool is doing and has done; the README has a table that explains each entry. Costs no request."""
        with self._lock:
            states = Counter(tenure.state for tenure in self._held)
            total = self._total()
            containers = [container for container in self._in_order() if not container.cordoned]
            states[SlotState.AVAILABLE] = max(0, total - len(self._held))
            return {
                "started": self._state == "started",
                "containers": len(containers),
                "total_slots": total,
                "acquired_slots": len(self._held),
                "available_slots": states[SlotState.AVAILABLE],
                "slots_by_state": {state.value: states[state] for state in SlotState},
                "slots_ready": self._ready.qsize(),
                "requests_waiting": len(self._waiters),
                "pool_min": self.config.min_containers,
                "pool_max": self.config.max_containers,
                "isolation": sorted({str(container.info.get("isolation")) for container in containers}),
                **self._counters.as_dict(),
            }

    def __repr__(self) -> str:
        with self._lock:
            return f"<SlotPool {self.config.backend}, {self._state}, {len(self._held)} of {self._total()} slots acquired>"


def _call_request(slot: Slot, tool: str, args: Mapping[str, Any], timeout: float) -> CallRequest:
    return {
        "slot": slot.slot_id,
        "lease": slot._tenure.token,
        "execution_id": secrets.token_hex(16),
        "tool": tool,
        "args": dict(args),
        "timeout": timeout,
    }


def _run_batch(container: Container, part: Sequence[tuple[Slot, CallRequest]]) -> list[ExecutionResult]:
    answers: list[Any] = [None] * len(part)
    with contextlib.ExitStack() as stack:
        usable = []
        for i, (slot, _) in enumerate(part):
            try:
                stack.enter_context(slot._tenure.use())
                usable.append(i)
            except SlotPoolError as e:
                answers[i] = e
        if usable:
            for i, answer in zip(usable, container.client.batch([part[i][1] for i in usable])):
                answers[i] = answer
    results = []
    for (slot, request), answer in zip(part, answers):
        if isinstance(answer, LeaseLost):
            slot._tenure.lose(answer.message)
        make = ExecutionResult.failed if isinstance(answer, Exception) else ExecutionResult.of
        results.append(make(answer, request["execution_id"], slot.slot_id))
    return results


def _logged(act: Callable[..., None], *args: Any) -> None:
    """For work whose result nobody waits for."""
    try:
        act(*args)
    except Exception:
        log.exception("the pool's background work failed; this is a defect of slotpool")


def _fleet_of(config: SlotPoolConfig) -> Fleet:
    if config.backend == "static":
        return StaticFleet(config.servers, config.token)
    if config.backend == "local":
        return LocalFleet(
            {
                "slots": config.slots_per_container,
                "isolation": config.isolation,
                "max_output": config.max_output,
                "max_file": config.max_file_size,
                "max_processes": config.max_processes,
                "readonly_paths": config.readonly_paths,
                "state_dir": config.state_dir,
            }
        )
    raise ConfigError(
        "backend",
        '"local" or "static" (this version has no Nomad backend; NOMAD_ADDR in the environment asks for it)',
        shown(config.backend),
    )


_open_pools: weakref.WeakSet[SlotPool] = weakref.WeakSet()


@atexit.register
def _stop_open_pools() -> None:
    for pool in list(_open_pools):
        pool.stop()
