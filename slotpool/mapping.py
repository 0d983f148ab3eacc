"""One function over many items, each in a slot of its own: what :meth:`SlotPool.map` returns."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Callable, Generic, TypeVar, Union

from .errors import AcquireTimeout, ContainerLost, InvalidRequest, LeaseLost, PoolClosed, SetupFailed, shown
from .preparing import cause_of, steps_of
from .progress import Progress
from .slot import SlotState

if TYPE_CHECKING:
    from types import TracebackType

    from .pool import SlotPool
    from .preparing import Steps
    from .slot import Slot

log = logging.getLogger(__name__)

_MOST_WORKERS = 256  # threads, of which each has one item in hand
_LAST = 1 << 62  # the number of what comes after all items

Item = TypeVar("Item")
Value = TypeVar("Value")


class _Failure:
    """What an item ended with instead of a value.

    :ivar final: it ends the whole work, so it is raised in any case.
    """

    def __init__(self, error: BaseException, final: bool) -> None:
        self.error = error
        self.final = final


class _Stopped(Exception):
    """The work was stopped before an item was begun."""


_Outcome = Union[Value, _Failure]


class MapResults(Generic[Item, Value]):
    """The results, one by one; iterating waits for the next. The work begins at once, whether anybody iterates or not.

    :meth:`close`, leaving a ``with`` block of it, an exception that iterating raises and Ctrl-C amid it stop the work: no item
    is begun any more, and the slots of those under way are given back, which ends what runs in them. Dropping it amid
    iterating lets those under way go on to their end. For one thread.
    """

    def __init__(
        self,
        pool: SlotPool,
        act: Callable[[Slot, Item], Value],
        items: Iterable[Item],
        ordered: bool,
        return_exceptions: bool,
        retries: int,
        workers: int | None,
        setup: Steps | None,
        progress: bool | None,
        slots: int,
    ) -> None:
        """As :meth:`SlotPool.map`.

        :param slots: as many as there can be.
        """
        if not callable(act):
            raise InvalidRequest("fn", "a function of a slot and an item", shown(act))
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise InvalidRequest("retries", "an integer, at least 0", shown(retries))
        if workers is not None and (isinstance(workers, bool) or not isinstance(workers, int) or workers < 1):
            raise InvalidRequest("workers", "an integer, at least 1, or None", shown(workers))
        steps_of(setup)
        try:
            source = enumerate(items)
        except TypeError:
            raise InvalidRequest("items", "something to iterate over", shown(items)) from None
        total = len(items) if isinstance(items, Sized) else None
        self._ordered = ordered
        self._return_exceptions = return_exceptions
        self._waiting: dict[int, _Outcome[Value]] = {}  # finished ahead of their turn
        self._next = 0
        self._closed = False
        self._work = _Work(pool, act, source, retries, setup, Progress(total, progress))
        count = max(1, min(workers or _MOST_WORKERS, slots, slots if total is None else total))
        self._threads = [threading.Thread(target=self._work.run, name="slotpool-map", daemon=True) for _ in range(count)]
        self._work.running = count
        try:
            for thread in self._threads:
                thread.start()
        except BaseException:
            self._work.running -= sum(thread.ident is None for thread in self._threads)
            self.close()
            raise

    def __iter__(self) -> Iterator[Value]:
        return self

    def __next__(self) -> Value:
        """
        :raises StopIteration: there are no more, or the work was stopped.
        :raises Exception: what an item ended with, unless ``return_exceptions`` was given; the work has been stopped then.
        """
        if self._closed:
            raise StopIteration
        self._work.is_awaited = True
        try:
            outcome = self._wait()
        except BaseException:  # an interrupt; or there are no more
            self.close()
            raise
        if not isinstance(outcome, _Failure):
            return outcome
        if self._return_exceptions and not outcome.final:
            return outcome.error  # type: ignore[return-value]  # as asked for
        self.close()
        raise outcome.error

    def _wait(self) -> _Outcome[Value]:
        while True:
            if self._next in self._waiting:
                self._next += 1
                return self._waiting.pop(self._next - 1)
            told = self._work.done.get()
            if told is None:  # every thread has ended
                self._work.done.put(None)
                if not self._waiting:
                    raise StopIteration
                self._next = min(self._waiting)  # of those before, the work was stopped
                continue
            number, outcome = told
            if not self._ordered or (number != _LAST and isinstance(outcome, _Failure) and outcome.final):
                return outcome
            self._waiting[number] = outcome

    def close(self) -> None:
        """Stop the work, and wait until ``fn`` runs no more. Repeatable."""
        self._closed = True
        self._work.stop()
        self._work.progress.close()

    def __enter__(self) -> MapResults[Item, Value]:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        work = self.__dict__.get("_work")
        if work is not None and work.is_awaited:  # nobody waits any more; else it was begun for what it does alone
            work.is_stopped = True  # no more, as the collector may call this amid anything


class _Work(Generic[Item, Value]):
    """What the threads share. It does not know who takes the results, so that dropping that stops the work."""

    def __init__(
        self,
        pool: SlotPool,
        act: Callable[[Slot, Item], Value],
        source: Iterator[tuple[int, Item]],
        retries: int,
        setup: Steps | None,
        progress: Progress,
    ) -> None:
        self._pool = pool
        self._act = act
        self._source = source
        self._retries = retries
        self._setup = setup
        self.progress = progress
        self.done: queue.SimpleQueue[tuple[int, _Outcome[Value]] | None] = queue.SimpleQueue()
        self._has_failed = False  # the source; so it has no more
        self._taking = threading.Lock()  # guards _source, which is the caller's own code and may take its time
        self._released = threading.Condition()  # guards the next three; told when _slots gets less
        self._slots: set[Slot] = set()  # of items under way
        self._given_back = 0  # how often _slots got less
        self.running = 0  # threads
        self.is_stopped = False
        self.is_awaited = False

    def run(self) -> None:
        """Take items until there are none."""
        try:
            while not self.is_stopped and not self._has_failed:
                with self._taking:
                    number, item = next(self._source)
                try:
                    outcome: _Outcome[Value] = self._attempts(item)
                except _Stopped:
                    return
                except BaseException as e:
                    final = isinstance(e, PoolClosed) or not isinstance(e, Exception)
                    self.is_stopped = self.is_stopped or final
                    outcome = _Failure(e, final)
                    if not self.is_awaited:
                        log.warning("an item failed, and nobody waits for its result: %s", shown(item), exc_info=e)
                self.done.put((number, outcome))
                self.progress.step()
        except StopIteration:
            pass
        except Exception as e:  # of the iterable's own code: there are no more
            self._has_failed = True
            self.done.put((_LAST, _Failure(e, True)))
        finally:
            with self._released:
                self.running -= 1
                is_last = not self.running
            if is_last:
                self.done.put(None)
                self.progress.close()

    def _attempts(self, item: Item) -> Value:
        left = self._retries
        while True:
            slot = self._slot()
            try:
                self._pool._make_ready(slot)
                return self._act(slot, item)
            except StopIteration as e:  # which would end who iterates over the results, see PEP 479
                raise RuntimeError("fn raised StopIteration") from e
            except (ContainerLost, LeaseLost, SetupFailed) as e:
                cause = cause_of(e)
                is_lost = isinstance(cause, ContainerLost) or (isinstance(cause, LeaseLost) and slot.state is SlotState.ERROR)
                if not is_lost or not left or self.is_stopped:
                    raise
                left -= 1
                log.warning("%s of %s was lost; %s is begun anew: %s", slot.slot_id, slot.alloc_id, shown(item), e)
            finally:
                self._done_with(slot)

    def _slot(self) -> Slot:
        """One for an item, to be made ready; waited for as long as other items hold some, and then for the pool's
        ``acquire_timeout``.
        """
        while True:
            given_back = self._given_back
            try:
                slot = self._pool._take(setup=self._setup)
                break
            except AcquireTimeout:
                with self._released:
                    others = bool(self._slots) or self._given_back != given_back
                    if not others or self.is_stopped:
                        raise
        with self._released:
            self._slots.add(slot)
            is_stopped = self.is_stopped
        if is_stopped:
            self._done_with(slot)
            raise _Stopped
        return slot

    def _done_with(self, slot: Slot) -> None:
        slot.release()
        with self._released:
            self._slots.discard(slot)
            self._given_back += 1
            self._released.notify_all()

    def stop(self) -> None:
        """Begin nothing more, give the slots in use back, and wait until nobody uses them. Threads that wait for an item or a
        slot may live on for a while, and do nothing.
        """
        self.is_stopped = True
        with self._released:
            slots = list(self._slots)
        for slot in slots:
            slot.release()
        with self._released:
            self._released.wait_for(lambda: not self._slots)
