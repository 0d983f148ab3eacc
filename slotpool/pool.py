"""The pool: what its users hold."""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import queue
import secrets
import socket
import time
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Callable, NoReturn

from . import abreast, batch
from .background import Background
from .config import SlotPoolConfig
from .errors import AcquireTimeout, ConfigError, InvalidRequest, PoolClosed, shown
from .fleet import Fleet
from .fleet.local import LocalFleet
from .fleet.static import StaticFleet
from .health import HealthThread
from .mapping import Item, MapResults, Value
from .preparing import Steps, steps_of
from .progress import waiting
from .sandbox import logs
from .security import warn_of
from .slot import ExecutionResult, Slot, SlotState
from .supply import Supply
from .tenure import Tenure
from .upkeep import Upkeep

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger(__name__)

_WORKERS, _RENEWERS = 24, 12  # threads at most
_SIDE_BY_SIDE = 16  # containers that leases are given back to at once, when the pool stops
_UNCLAIMED = 5.0  # seconds after which a lease that was handed out, and reached nobody, is given back


class SlotPool:
    """A pool of slots. Thread-safe; use it in a ``with`` block, or :meth:`start` and :meth:`stop` it.

    A process that is forked from the pool's may not use the pool or its slots; it should make a pool of its own.

    A :class:`.security.SecurityWarning` is given for ``isolation="none"``, and for a token that would go unencrypted over a
    network: to ``servers`` or a ``nomad_address`` with ``http`` that aren't on this machine. A started pool that is
    collected without having been stopped ends what it has, after a :class:`ResourceWarning`.

    :param config: the settings; or give them as keywords, see :class:`SlotPoolConfig`.
    :raises ConfigError: a setting can't be used.
    """

    def __init__(self, config: SlotPoolConfig | None = None, **settings: Any) -> None:
        if config is not None and settings:
            raise ConfigError("config", "either a SlotPoolConfig or keywords", "both")
        if config is not None and not isinstance(config, SlotPoolConfig):
            raise ConfigError("config", "a SlotPoolConfig", shown(config))
        self.config = config if config is not None else SlotPoolConfig.make(settings)
        warn_of(self.config, stacklevel=2)
        self._pid = os.getpid()
        self._state = "new"  # then started, then stopped; guarded by the supply's lock
        self._fleet = _fleet_of(self.config)
        self._background = Background(_WORKERS, "slotpool")
        # Apart, so that containers which don't answer, or not soon, keep none of the others' leases from being renewed.
        self._renewals = Background(_RENEWERS, "slotpool-renewal")
        self._supply = Supply(self.config, f"{socket.gethostname()}:{self._pid}:{secrets.token_hex(4)}", self._background)
        self._upkeep = Upkeep(self.config, self._fleet, self._supply, self._background, self._renewals)
        # Three renewals in a time to live, so that two may be lost.
        period = min(self.config.health_check_interval, self.config.lease_ttl / 3)
        self._health = HealthThread(
            self._tend, period, functools.partial(_clean_up, self._fleet, self._supply, (self._background, self._renewals))
        )
        self._supply.later = self._health.call
        self._upkeep.later = self._health.call
        # Leases whose slot was collected without a release. A finalizer may run anywhere, so it only puts them here.
        self._abandoned: queue.SimpleQueue[Tenure] = queue.SimpleQueue()

    def __deepcopy__(self, memo: object) -> SlotPool:
        return self  # so that a copy of what uses a pool, such as how gymnasium notes an environment was made, uses the same

    def __reduce__(self) -> NoReturn:
        raise TypeError("a SlotPool can't be pickled, as no other process can use it; pickle its config, and make a pool there")

    # Life

    def start(self) -> SlotPool:
        """Start the fleet and wait for ``min_containers``; a no-op if it is started. If that takes more than a moment, a
        line says so at terminals and in notebooks.

        :raises IsolationUnavailable, StartFailed: what was started is ended again. What is lacking decides whether another pool
            fares better; the job of a cluster may stand.
        :raises NomadError: the cluster refuses, or does not answer; so too.
        :raises ConfigError: a variable ``NOMAD_*`` can't be used.
        :raises PoolClosed: it was stopped; make a new one.
        """
        with self._supply.lock:
            if self._state == "started":
                return self
            if self._state != "new" or os.getpid() != self._pid:
                raise PoolClosed(f"expected a new pool, got one that is {self._state}; make another SlotPool")
            self._state = "started"
        _open_pools.add(self)
        try:
            self._health.start()
            with waiting(self._arrivals):
                self._upkeep.start()
        except BaseException:
            self.stop()
            raise
        return self

    def _arrivals(self) -> str:
        with self._supply.lock:
            count = len(self._supply.containers)
        told = self._fleet.describe().replace("\n", "; ")
        return f"starting containers: {count} of {max(1, self._upkeep.needed)} ({told})"

    def stop(self, purge_job: bool = False) -> None:
        """End everything: waiters get :class:`PoolClosed`, held slots are lost, leases are given back, local servers ended.

        Repeatable, from any thread. In a process forked from the pool's it does nothing. Don't call it in a signal's handler,
        which may have interrupted the pool amid a change; raise an exception there, and let the ``with`` block stop the pool.

        :param purge_job: also remove what a cluster keeps for the fleet; nothing if it is local.
        :raises NomadError: that could not be done; all else has been.
        """
        if os.getpid() != self._pid:
            return
        with self._supply.lock:
            self._state = "stopped"
        for tenure in self._supply.close():
            tenure.lose("the pool has been stopped")
        # All of what follows may be done again: by another thread, or because an interrupt came amid it.
        self._health.stop()
        with self._supply.lock:
            containers = list(self._supply.containers.values())
        if self.config.backend != "local":
            abreast.run([functools.partial(self._supply.give_all_back, one) for one in containers], _SIDE_BY_SIDE)
        try:
            self._fleet.stop(purge_job)
        finally:
            self._upkeep.sync()  # wakes a start() that waits for containers
            self._background.close()
            self._renewals.close()
            for container in containers:
                container.client.close()
            _open_pools.discard(self)

    def __enter__(self) -> SlotPool:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def __del__(self) -> None:
        # The health thread does the work: this may be called amid anything, so it may take no lock.
        if self.__dict__.get("_state") == "started" and os.getpid() == self._pid:
            message = f"a {self.config.backend} SlotPool was not stopped; use it in a with block, or call stop()"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    def _require_started(self) -> None:
        if os.getpid() != self._pid:
            raise PoolClosed(f"expected the process {self._pid} that made the pool, got {os.getpid()}; make a pool of its own")
        if self._state != "started":
            raise PoolClosed(f"expected a started pool, got one that is {self._state}; use it in a with block, or call start()")

    def _tend(self) -> None:
        """What the health thread does in each period."""
        self._collect_abandoned()
        self._upkeep.tend()

    # Leases

    def slot(
        self,
        trajectory_id: str | None = None,
        *,
        timeout: float | None = None,
        network: bool | None = None,
        setup: Steps | None = None,
    ) -> Slot:
        """The same as :meth:`acquire`, to be used as ``with pool.slot() as s:``."""
        return self.acquire(trajectory_id, timeout=timeout, network=network, setup=setup)

    def acquire(
        self,
        trajectory_id: str | None = None,
        *,
        timeout: float | None = None,
        network: bool | None = None,
        setup: Steps | None = None,
    ) -> Slot:
        """A clean slot, for the caller alone until it is released; first come, first served.

        :param trajectory_id: a name for what the slot is used for; made up if not given.
        :param timeout: seconds to wait at most; default ``acquire_timeout``. 0 takes only what is ready.
        :param network: whether it must have network, or must not; default the pool's ``network``.
        :param setup: what makes it ready, after the pool's own ``setup``: a bash command, a function that is called with the
            slot, or a sequence of such steps. A step that was carried out in the slot before is not repeated, if it was
            handed on as it is. :meth:`Slot.reset` repeats all.
        :raises AcquireTimeout: it says what the pool was waiting for. Safe to try again.
        :raises PoolClosed: the pool isn't started, or was stopped meanwhile.
        :raises InvalidRequest: the isolation can't keep a slot off the network, or an argument can't be used.
        :raises SetupFailed: a step of the setup failed; the slot has been given back.
        :raises SlotError: the slot was lost as it was given the network that is wanted. Safe to try again.
        """
        if not isinstance(network, (bool, type(None))):
            raise InvalidRequest("network", "True, False or None", shown(network))
        slot = self._take(trajectory_id, timeout, setup)
        try:
            self._make_ready(slot, network)
        except BaseException:
            slot.release()
            raise
        return slot

    def _take(self, trajectory_id: str | None = None, timeout: float | None = None, setup: Steps | None = None) -> Slot:
        """As :meth:`acquire`, but the slot is still to be made ready."""
        self._require_started()
        if timeout is None:
            timeout = self.config.acquire_timeout
        elif isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0:
            raise InvalidRequest("timeout", "a number of seconds, at least 0, or None", shown(timeout))
        if trajectory_id is not None and not isinstance(trajectory_id, str):
            raise InvalidRequest("trajectory_id", "a string or None", shown(trajectory_id))
        steps = (*self.config.setup, *steps_of(setup))
        try:
            tenure = self._supply.take(timeout)
        except AcquireTimeout as e:
            raise AcquireTimeout(f"{e}: {self._situation()}") from e.__cause__
        return Slot(self, tenure, trajectory_id, steps)  # from here on the slot's finalizer sees to the lease

    def _make_ready(self, slot: Slot, network: bool | None = None) -> None:
        """Give it the network that is wanted, and carry out its setup."""
        tenure = slot._tenure
        wanted = network if network is not None else self.config.network
        if wanted is not None and wanted != tenure.network:
            tenure.prepared = ()
            with tenure.use() as client:
                tenure.network = client.reset(tenure.slot, tenure.token, wanted)
        slot._prepare()
        logs.lease(log, slot.slot_id, tenure.token, "acquired in %s for %s", slot.alloc_id, slot.trajectory_id)

    def _situation(self) -> str:
        """What keeps callers waiting, in words."""
        failure, fleet = self._fleet.failure(), self._fleet.describe()
        supply, config = self._supply, self.config
        with supply.lock:
            held, waiting, trouble = len(supply.held), len(supply.waiters), failure or supply.trouble
        most = (
            f"at most {config.max_containers} containers of {config.slots_per_container}" if config.backend == "local" else ""
        )
        parts = [f"{held} of {self.total_slots} slots are held by this pool", f"{waiting} more callers wait", fleet, most]
        return ", ".join(filter(None, parts)) + (f"; the last trouble: {trouble}" if trouble else "")

    def release(self, slot: Slot, reset_workspace: bool = True) -> None:
        """Give a slot back. Returns at once; the server cleans the slot before anybody else gets it. Repeatable.

        :param reset_workspace: False hands the slot as it is, with files, processes and its network, to the next ``acquire`` of
            this pool.
        """
        if not isinstance(slot, Slot):
            raise InvalidRequest("slot", "a Slot of this pool", shown(slot))
        if slot._pool is not self:
            raise InvalidRequest("slot", "a slot of this pool", f"{slot!r} of another pool")
        if os.getpid() != self._pid:
            return
        tenure = slot._tenure
        if tenure.end():
            logs.lease(log, tenure.slot, tenure.token, "released" if reset_workspace else "released as it is")
        self._supply.give_back(tenure, keep=not reset_workspace)  # each time, as an interrupt may have come amid the first
        slot._finalizer.detach()

    def _abandon(self, tenure: Tenure) -> None:
        """A slot was collected without a release. Called by the collector, perhaps amid anything: takes no lock."""
        self._abandoned.put(tenure)
        self._health.wake()

    def _collect_abandoned(self) -> None:
        abandoned: list[Tenure] = []
        while not self._abandoned.empty():
            abandoned.append(self._abandoned.get())
        now = time.monotonic()
        with self._supply.lock:  # an interrupt may come between the hand-over and the making of the slot
            held = self._supply.held
            abandoned += [tenure for tenure in held if not tenure.claimed and now - tenure.acquired_at > _UNCLAIMED]
            self._supply.collect_strays()
        for tenure in abandoned:
            if tenure.end():
                ids = {"slot": tenure.slot, "lease": tenure.lease_id}
                log.warning("%s, lease %s: dropped without being released; giving it back", *ids.values(), extra=ids)
                with self._supply.lock:
                    self._supply.counters.slots_abandoned += 1
            self._supply.give_back(tenure)

    # Executing

    def execute(self, slot: Slot, tool: str, args: Mapping[str, Any], timeout: float | None = None) -> ExecutionResult:
        """Run a tool by name in a slot: ``bash {command, cwd, env, stdin}``, ``read_file {path}``,
        ``write_file {path, content}``.

        It runs at most once. A file that can't be read or written is a result with ``error``, not an exception.

        :param timeout: seconds; default ``command_timeout``.
        :raises InvalidRequest: nothing was run.
        :raises SlotError: ``may_have_run`` tells whether it is safe to try again elsewhere.
        """
        self._check_call(slot, tool, args)
        limit = self._timeout(timeout)
        failed = True
        try:
            with slot._tenure.use() as client:
                result = client.execute(slot.slot_id, slot._tenure.token, tool, dict(args), limit)
            failed = False
        finally:
            self._count(1, failed)
        return ExecutionResult.of(result, slot.slot_id)

    def execute_batch(
        self, calls: Iterable[tuple[Slot, str, Mapping[str, Any]]], timeout: float | None = None
    ) -> list[ExecutionResult]:
        """Run many tools side by side, one request a container; the results in the order asked.

        What goes wrong with one call, or one container, is in the ``error`` of its results only; ``metadata`` then has
        ``exception`` and ``may_have_run``.

        :param timeout: seconds for each call; default ``command_timeout``.
        :raises InvalidRequest: if ``calls`` is not what it should be; nothing was run.
        """
        limit = self._timeout(timeout)
        entries = []
        for call in calls:
            if not isinstance(call, tuple) or len(call) != 3:
                raise InvalidRequest("calls", "tuples (slot, tool, args)", shown(call))
            self._check_call(*call)
            entry = batch.entry(*call, limit)
            try:
                json.dumps(entry[1]["args"])
            except (TypeError, ValueError) as e:
                raise InvalidRequest("args", "what JSON can express", f"{shown(call[2])}: {e}") from e
            entries.append(entry)
        results = batch.run(entries)
        self._count(len(results), sum("exception" in result.metadata for result in results))
        return results

    def map(
        self,
        fn: Callable[[Slot, Item], Value],
        items: Iterable[Item],
        *,
        ordered: bool = True,
        return_exceptions: bool = False,
        retries: int = 0,
        workers: int | None = None,
        setup: Steps | None = None,
        progress: bool | None = None,
    ) -> MapResults[Item, Value]:
        """``fn(slot, item)`` for each item, in a clean slot of its own, on as many slots at once as there are.

        The results are iterated over as they come; :class:`.mapping.MapResults` tells what stops the work. ``fn`` is called in
        other threads, and ``items`` is iterated over there, as far as slots are free.

        :param ordered: in the order of the items; False gives each as soon as it is there.
        :param return_exceptions: give what an item raises as its result, and go on; else it is raised, and the work stopped.
        :param retries: how often an item is begun anew, in another slot, if its slot was lost amid it (:class:`ContainerLost`,
            :class:`LeaseLost`). ``fn`` then runs again from its beginning; no single command is sent twice.
        :param workers: items under way at most; default as many as the pool can have slots, up to 256.
        :param setup: as for :meth:`acquire`.
        :param progress: whether to show a progress bar, by tqdm; by default at a terminal and in notebooks, if tqdm is there.
        :raises InvalidRequest, PoolClosed: nothing was begun.
        """
        self._require_started()
        config = self.config
        most = 0 if config.backend == "static" else config.max_containers * config.slots_per_container
        slots = max(most, self.total_slots)
        return MapResults(self, fn, items, ordered, return_exceptions, retries, workers, setup, progress, slots)

    def _count(self, executions: int, errors: int) -> None:
        with self._supply.lock:
            self._supply.counters.executions_num += executions
            self._supply.counters.executions_errors += errors

    def _check_call(self, slot: object, tool: object, args: object) -> None:
        if not isinstance(slot, Slot) or slot._pool is not self:
            raise InvalidRequest("slot", "a slot of this pool", shown(slot))
        if not isinstance(tool, str):
            raise InvalidRequest("tool", "a string", shown(tool))
        if not isinstance(args, (dict, Mapping)):  # the former is told much sooner
            raise InvalidRequest("args", "a mapping", shown(args))

    def _timeout(self, timeout: object) -> float:
        if timeout is None:
            return self.config.command_timeout
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0.001 <= timeout <= 86_400:
            raise InvalidRequest("timeout", "a number of seconds from 0.001 to 86400, or None", shown(timeout))
        return float(timeout)

    # Looking at it

    def _total(self) -> int:
        return sum(container.capacity for container in self._supply.containers.values() if not container.cordoned)

    @property
    def total_slots(self) -> int:
        """Slots of the containers that are there."""
        with self._supply.lock:
            return self._total()

    @property
    def acquired_slots(self) -> int:
        """Slots that callers of this pool hold."""
        with self._supply.lock:
            return len(self._supply.held)

    @property
    def available_slots(self) -> int:
        """Slots that no caller of this pool holds: ready, being cleaned, or, of shared servers, perhaps another pool's."""
        with self._supply.lock:
            return max(0, self._total() - len(self._supply.held))

    def get_stats(self) -> dict[str, Any]:
        """What the pool is doing and has done; the README has a table that explains each entry. Costs no request."""
        supply = self._supply
        with supply.lock:
            states = Counter(tenure.state for tenure in supply.held)
            total, held = self._total(), len(supply.held)
            states[SlotState.AVAILABLE] = max(0, total - held)
            containers = [container for container in supply.in_order() if not container.cordoned]
            return {
                "started": self._state == "started",
                "containers": len(containers),
                "total_slots": total,
                "acquired_slots": held,
                "available_slots": states[SlotState.AVAILABLE],
                "slots_by_state": {state.value: states[state] for state in SlotState},
                "slots_ready": supply.ready.qsize(),
                "requests_waiting": len(supply.waiters),
                "pool_min": self.config.min_containers,
                "pool_max": self.config.max_containers,
                "isolation": sorted({str(container.info.get("isolation")) for container in containers}),
                "limits": _limits_of([container.info.get("limits") or {} for container in containers]),
                **supply.counters.as_dict(),
            }

    def _repr_html_(self) -> str:
        from .html import of_pool  # needed in notebooks alone

        return of_pool(self)

    def __repr__(self) -> str:
        return f"<SlotPool {self.config.backend}, {self._state}, {self.acquired_slots} of {self.total_slots} slots acquired>"


def _limits_of(told: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    return {kind: sorted({limits[kind] for limits in told if kind in limits}) for kind in sorted(set().union(*told))}


def _fleet_of(config: SlotPoolConfig) -> Fleet:
    if config.backend == "static":
        return StaticFleet(config.servers, config.token, config.cacert)
    if config.backend == "local":
        return LocalFleet(config.of_server())
    from .fleet.nomad.fleet import NomadFleet  # and with it requests, which takes a while to import

    return NomadFleet(config)


def _clean_up(fleet: Fleet, supply: Supply, executors: Iterable[Background]) -> None:
    """A pool was collected without having been stopped. Leases that it has had expire."""
    log.warning("a pool was dropped without being stopped")
    supply.close()
    fleet.stop(False)
    for executor in executors:
        executor.close()
    for container in supply.containers.values():
        container.client.close()


_open_pools: weakref.WeakSet[SlotPool] = weakref.WeakSet()


@atexit.register
def _stop_open_pools() -> None:
    for pool in list(_open_pools):
        try:
            pool.stop()
        except Exception:
            log.exception("%r could not be stopped at the interpreter's end", pool)
