"""The slots of one server: leases, their sandboxes and workspaces, and the executions in them."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable

from .._version import __version__
from ..errors import SandboxStartFailed, StartFailed
from . import logs, protocol, spares, tools, zygote
from .capture import Driver, Job
from .cell import Cell
from .leases import Lease, LeaseTable
from .nursery_process import NurseryProcess
from .protocol import CallRequest, RequestFailed
from .run import Answer, Run
from .spares import Spares
from .tally import Tally
from .tenancies import HostConfig, Tenancy, TenancyMaker
from .warmer import Warmer

log = logging.getLogger(__name__)

_PATIENCE = (0.1, 0.5, 2.0, 5.0)  # seconds between attempts to make a sandbox
_MOST_PAUSE = 600.0  # seconds until a quarantined slot is tried again; the first pause is HostConfig.quarantine
_LATE = 5.0  # seconds past its time after which a request takes no leases: its client may have given up, see client._SLACK
_ENDERS = 8  # threads that end what was in slots
_MAKERS = 8  # threads that make sandboxes
_SHORTAGES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN, errno.ETOOMANYREFS)


def _drive(driver: Driver) -> None:
    driver.run()
    driver.close()


def _executor(threads: int, name: str) -> ThreadPoolExecutor:
    """One that has all its threads: what is to be ended is ended also where no more can be had at that moment.

    :raises RuntimeError: they can't be had now.
    """
    executor = ThreadPoolExecutor(threads, name)
    together = threading.Barrier(threads)
    try:
        for _ in range(threads):
            executor.submit(together.wait)
    except RuntimeError:
        together.abort()
        executor.shutdown()
        raise
    return executor


class Host:
    """Thread-safe. The lease table says what holds; what is slow is done outside its lock."""

    def __init__(self, config: HostConfig, nursery: NurseryProcess) -> None:
        """Choose the isolation and begin to make the slots ready.

        :param nursery: one that was just started, and ends with this.
        :raises IsolationUnavailable, StartFailed: nothing is left then.
        """
        self.config = config
        self.boot_id = secrets.token_hex(8)
        self.tally = Tally()
        self._maker = TenancyMaker(config, nursery)
        self.isolation = self._maker.isolation
        self.socket_path = self._maker.socket_path
        names = [f"slot_{i}" for i in range(config.slots)]
        # Guards the fields from here to _closing; signalled when a slot becomes free, and when one of them changes otherwise.
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._due = threading.Condition(self._lock)  # signalled when the reaper has to come sooner than it would
        self._reaper_comes = -math.inf  # on the monotonic clock; no later than anything while it is about its work
        self._table = LeaseTable(names)
        self._tenancies: dict[str, Tenancy] = {}
        self._retries: dict[str, float] = {}  # when to try again to clean a quarantined slot, on the monotonic clock
        self._pauses: dict[str, float] = {}  # seconds until that, if it fails once more
        self._cleaning = 0  # requests that clean a slot
        self._waiting = 0  # leases that requests wait for
        self._closing = False
        try:
            self._start_threads()
        except RuntimeError as e:
            raise StartFailed(f"this server needs more threads than it may have: {e}") from e
        for name in names:
            self._makers.submit(self._prepare, name)

    def _start_threads(self) -> None:
        """
        :raises RuntimeError: they can't be had now; nothing is left then.
        """
        slots = self.config.slots
        with contextlib.ExitStack() as undo:
            undo.callback(self._maker.close)
            self.warmer = Warmer()
            undo.callback(self.warmer.stop)
            # Apart, so that none of what is to be ended goes on until sandboxes were made for all that ended before it.
            self._enders = _executor(min(_ENDERS, slots), "slotpool-end")
            undo.callback(self._enders.shutdown)
            self._makers = _executor(min(_MAKERS, slots + spares.MOST), "slotpool-make")
            undo.callback(self._makers.shutdown)
            self._spares = Spares(self._make, self._makers)
            self._reaper = threading.Thread(target=self._reap, name="slotpool-expiry", daemon=True)
            self._reaper.start()
            undo.pop_all()

    def _clean(self, slots: Iterable[str]) -> None:
        with self._lock:
            if not self._closing:  # else all that is in them is being ended, and the enders may have ended too
                for slot in slots:
                    self._enders.submit(self._end_first, slot)

    def _end_first(self, slot: str) -> None:
        spent = self._end(slot)
        if spent is not None:
            self._makers.submit(self._prepare, slot, spent, from_stock=True)

    def _make_ready(self, slot: str) -> None:
        """End what was in ``slot`` and prepare it for the next lease, in this thread."""
        spent = self._end(slot)
        if spent is not None:
            self._prepare(slot, spent, from_stock=True)

    def _end(self, slot: str) -> float | None:
        """End what was in ``slot``, and make sure of it; the seconds that took, or None if it could not be done."""
        began = time.monotonic()
        try:
            with self._lock:
                old = self._tenancies.get(slot)
            if old is not None:
                self._maker.end(old)
                with self._lock:
                    del self._tenancies[slot]
        except Exception as e:
            self._quarantine(slot, time.monotonic() - began, e)
            return None
        return time.monotonic() - began

    def _prepare(self, slot: str, spent: float = 0.0, from_stock: bool = False) -> None:
        """Give ``slot``, which is empty, what its next lease needs.

        :param spent: seconds that its end took.
        :param from_stock: that may be a spare, if there is one.
        """
        began = time.monotonic() - spent
        try:
            tenancy = (self._spares.take() if from_stock else None) or self._make_with_patience()
        except Exception as e:
            self._quarantine(slot, time.monotonic() - began, e)
            return
        if tenancy is None:
            return
        self.tally.cleaned(time.monotonic() - began, failed=False)
        with self._lock:
            self._tenancies[slot] = tenancy
            self._pauses.pop(slot, None)
            self._table.ready(slot)
            self._changed.notify_all()

    def _quarantine(self, slot: str, spent: float, e: Exception) -> None:
        log.error("%s is quarantined: %s", slot, e, exc_info=not isinstance(e, SandboxStartFailed), extra={"slot": slot})
        self.tally.cleaned(spent, failed=True)
        with self._lock:
            self._table.quarantine(slot, str(e))
            pause = self._pauses.get(slot, self.config.quarantine)
            self._retries[slot] = time.monotonic() + pause
            self._pauses[slot] = min(2 * pause, _MOST_PAUSE)
            self._have_reaped_by(self._retries[slot])

    def restock(self) -> None:
        """Have spares made, if there are too few then. Once a slot was taken, and not sooner: it is in the way of who waits for
        that one. Nor at once: who gets the answer was likely woken on this processor, and would wait behind it.
        """
        self.warmer.take(self._spares.restock)

    def _make(self) -> Tenancy:
        return self._maker.make(self.isolation.default_network)

    def _make_with_patience(self) -> Tenancy | None:
        """Try again for a while: the machine may be short of memory or processes for a moment. None if the host closes."""
        for pause in (*_PATIENCE, None):
            if self._closing:
                return None
            try:
                return self._make()
            except (SandboxStartFailed, OSError) as e:
                if pause is None or self._closing:
                    raise
                log.warning("a sandbox could not be made, trying again in %g s: %s", pause, e)
            with self._lock:
                self._changed.wait_for(lambda: self._closing, pause)
        raise AssertionError

    # Leases

    def lease(self, owner: str, ttl: float, take: int, release: Sequence[str], wait: float) -> protocol.LeaseAnswer:
        """Give back, then take; see the protocol's ``POST /v1/leases``."""
        deadline = time.monotonic() + wait
        with self._lock:
            self._refuse_if_closing()
            given_back = self._table.held(release)
            to_clean = self._table.release(release)
            # If it has to wait for one of them anyway, it cleans that itself: handing it over would cost two wake-ups.
            own = to_clean.pop() if to_clean and take and wait and not self._table.has_free() else None
            self._cleaning += own is not None
        try:
            self._given_back(given_back)
            self._clean(to_clean)
            if own is not None:
                self._make_ready(own)
        finally:
            if own is not None:
                with self._lock:
                    self._cleaning -= 1
                    self._changed.notify_all()
        with self._lock:
            while True:
                self._refuse_if_closing()
                now = time.monotonic()
                leases = self._table.take(owner, take if now < deadline + _LATE else 0, ttl, now)
                if leases or take == 0 or now >= deadline:
                    break
                self._waiting += take
                try:
                    opens = self._table.opens()  # which nobody signals
                    self._changed.wait((min(opens, deadline) if opens > now else deadline) - now)
                finally:
                    self._waiting -= take
            self.tally.leases(granted=len(leases))
            if leases:
                self._have_reaped_by(now + ttl)
            described = [self._describe(lease) for lease in leases]
            leased = self._table.leased()
        for lease in leases:
            logs.lease(log, lease.slot, lease.token, "granted to %s for %g s", owner, ttl)
        return {"boot_id": self.boot_id, "leases": described, "leased": leased}

    def _given_back(self, leases: Sequence[Lease]) -> None:
        self.tally.leases(released=len(leases))
        for lease in leases:
            logs.lease(log, lease.slot, lease.token, "given back")

    def _describe(self, lease: Lease) -> protocol.Lease:
        setting = self._tenancies[lease.slot].setting
        return {"slot": lease.slot, "token": lease.token, "workspace": setting.workspace, "network": setting.network}

    def _refuse_if_closing(self) -> None:
        if self._closing:
            raise RequestFailed("closing", "the server is shutting down")

    def renew(self, tokens: Sequence[str]) -> protocol.RenewAnswer:
        """Renew leases."""
        with self._lock:
            lost = self._table.renew(tokens, time.monotonic())
            return {
                "boot_id": self.boot_id,
                "lost": lost,
                "usable": self._table.usable(),
                "leased": self._table.leased(),
            }

    def cordon(self, owner: str, ttl: float, release: Sequence[str]) -> bool:
        """Give leases back, then grant none for ``ttl`` seconds; False, if others are held."""
        with self._lock:
            self._refuse_if_closing()
            given_back = self._table.held(release)
            to_clean = self._table.release(release)
            now = time.monotonic()
            done = self._table.cordon(owner, now + ttl, now)
            self._changed.notify_all()
        self._given_back(given_back)
        self._clean(to_clean)
        return done

    def _have_reaped_by(self, due: float) -> None:
        """Have the reaper come then at the latest. The lock is held."""
        if due < self._reaper_comes:  # most often it comes sooner anyway, and would only be in the way of who gets a lease
            self._due.notify()

    def _reap(self) -> None:
        while True:
            with self._lock:
                if self._closing:
                    return
                now = time.monotonic()
                overdue = self._table.overdue(now)
                expired = self._table.expire(now)
                again = [slot for slot, due in self._retries.items() if due <= now]
                for slot in again:
                    del self._retries[slot]
                    self._table.prepare_again(slot)
                if not expired and not again:
                    times = [self._table.next_expiry(), *self._retries.values()]
                    self._reaper_comes = min((one for one in times if one is not None), default=math.inf)
                    self._due.wait(None if self._reaper_comes == math.inf else max(0.0, self._reaper_comes - now))
                    self._reaper_comes = -math.inf
            for lease in overdue:
                ids = {"slot": lease.slot, "lease": logs.lease_id(lease.token)}
                log.warning("%s, lease %s: expired, as %s was not heard of", *ids.values(), lease.owner, extra=ids)
            self.tally.leases(expired=len(expired))
            self._clean([*expired, *again])

    def tenancy(self, slot: str, token: str) -> Tenancy:
        """The use of ``slot`` by that lease, renewed.

        :raises RequestFailed: if the lease is not that slot's.
        """
        with self._lock:
            if self._table.check(slot, token, time.monotonic()) is None:
                raise protocol.lease_lost(slot)
            return self._tenancies[slot]

    def holds(self, slot: str, token: str) -> bool:
        """Whether that lease goes on."""
        with self._lock:
            return self._table.check(slot, token, time.monotonic()) is not None

    def reset(self, slot: str, token: str, network: bool | None) -> bool:
        """Empty the slot and kill its processes; whether it has network now."""
        old = self.tenancy(slot, token)
        if network is None:
            network = old.place.network
        elif self.isolation.refuses_network(network):
            raise protocol.invalid("network", self.isolation.refuses_network(network) or "", network)
        try:
            self._maker.end(old)
            fresh = self._spares.take() if network == self.isolation.default_network else None
            fresh = fresh or self._maker.make(network)
        except (SandboxStartFailed, OSError) as e:
            raise RequestFailed("slot_broken", str(e)) from e
        fresh.executions = old.executions  # ids stay spent
        with self._lock:
            holds = self._table.check(slot, token, time.monotonic()) is not None
            current = self._tenancies.get(slot) if holds else None
            if current is old:
                self._tenancies[slot] = fresh
                return network
        self._maker.discard(fresh)
        if current is None:
            raise protocol.lease_lost(slot)
        # Another was quicker, of which this may be the repetition.
        return network if current.place.network == network and not current.ended else self.reset(slot, token, network)

    # Executions

    def execute(self, calls: Sequence[CallRequest], wait: float) -> tuple[list[Answer], Callable[[], None]]:
        """Run or join executions side by side, for up to ``wait`` seconds.

        :return: for each its result, the :class:`RequestFailed` it failed with, or None if it still runs; and what to do
            once the answer is on its way.
        """
        deadline = time.monotonic() + wait
        runs = [Run(self, call) for call in calls]
        begun = [(run.job, run.tenancy) for run in runs if run.job is not None]
        driver = Driver([job for job, _ in begun])
        for _, tenancy in begun:
            self.warmer.begun(tenancy.cell)
        ended = driver.run(until=deadline)
        if not ended:
            try:
                threading.Thread(target=_drive, args=(driver,), name="slotpool-execution", daemon=True).start()
            except RuntimeError as e:  # no more threads to be had
                log.warning("a request is held until its executions have ended: %s", e)
                ended = driver.run()
        answers = [run.answer(deadline) for run in runs]

        def afterwards() -> None:
            for job, tenancy in begun:
                self.warmer.answered(tenancy.cell, job.call if ended else None)

        return answers, afterwards

    def cancel(self, slot: str, token: str, execution_id: str) -> bool:
        """Kill an execution; whether it ran."""
        return self.tenancy(slot, token).executions.cancel(execution_id)

    # What a run, or a transfer, needs

    def start(
        self, tenancy: Tenancy, tool: tools.Tool, timeout: float, on_end: Callable[[], None], patience: float = math.inf
    ) -> Job:
        """Start ``tool`` in the tenancy's cell, in a new one if that takes no orders any more."""
        cell = tenancy.cell
        try:
            call = tool.start(cell)
        except OSError as e:
            if e.errno in _SHORTAGES:
                raise RequestFailed("overloaded", f"the server is short of something: {e}") from e
            self._maker.mend(tenancy, cell, may_have_run=False)
            try:
                call = tool.start(tenancy.cell)
            except OSError as e:
                raise RequestFailed("slot_broken", f"the slot's processes are gone: {e}", may_have_run=False) from e
        return Job(call, time.monotonic() + timeout, tool.stdout_limit, tool.stderr_limit, on_end, patience)

    def check(self, job: Job, tenancy: Tenancy, slot: str, token: str) -> bool:
        """Deal with a lost outcome; whether the slot's processes had to be replaced.

        :raises RequestFailed: if nobody can know what became of the call.
        """
        if job.outcome.status == zygote.NOT_STARTED:
            why = f"the slot has as many processes as it may have, {self.config.max_processes}; reset it, or release it"
            raise RequestFailed("slot_broken", why, may_have_run=False)
        if job.outcome.never_began and not (job.outcome.timed_out or job.outcome.cancelled):
            job.call.cell.drop_armed()
            why = "the waiting shell was killed by what the slot had run before"
            raise RequestFailed("slot_broken", why, may_have_run=False)
        if not job.outcome.lost:
            return False
        self.replace(tenancy, job.call.cell, slot, token)
        if not job.outcome.timed_out:
            raise protocol.processes_lost()
        return True

    def replace(self, tenancy: Tenancy, cell: Cell, slot: str, token: str) -> None:
        """Make new processes for a slot, as those of ``cell`` were lost during a call, or do not answer.

        :raises RequestFailed: its lease has ended, or the server ends.
        """
        if self._closing:
            raise RequestFailed("closing", "the server is shutting down", may_have_run=True)
        if not self.holds(slot, token):
            raise protocol.lease_lost(slot, may_have_run=True)
        self._maker.mend(tenancy, cell, may_have_run=True)

    # The server as a whole

    def health(self) -> dict[str, Any]:
        with self._lock:
            counts, waiting = self._table.counts(), self._waiting
        tally = self.tally
        with tally.lock:
            counted = {
                "executing": tally.executing,
                "executions": tally.executions,
                "leases_granted": tally.leases_granted,
                "requests_open": tally.requests_open,
            }
        return {
            "version": __version__,
            "name": self.config.name,
            "boot_id": self.boot_id,
            "isolation": self.isolation.mode,
            "landlock": self.isolation.landlock,
            "limits": self._maker.limits,
            "network": self.isolation.default_network,
            "slots": self.config.slots,
            "counts": counts,
            "waiting": waiting,
            **counted,
        }

    def describe_slots(self) -> list[dict[str, str]]:
        with self._lock:
            return self._table.describe()

    def wait_for_nursery(self) -> bool:
        """Wait until the process that makes sandboxes has ended; whether that was :meth:`close`'s doing."""
        self._maker.wait()
        return self._closing

    def close(self) -> None:
        """End every lease and sandbox, remove every file. Running calls end as lost. Repeatable."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            tenancies = list(self._tenancies.values())
            self._changed.notify_all()
            self._due.notify()
        for tenancy in [*tenancies, *self._spares.close()]:
            tenancy.cell.destroy()
        self._reaper.join()
        self._enders.shutdown()
        self._makers.shutdown()
        with self._lock:
            self._changed.wait_for(lambda: not self._cleaning)
        self.warmer.stop()
        self._maker.close()
