"""A live view of pools and servers in a terminal, by rich."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import attr

from .errors import SlotPoolError
from .view import PoolView, look

try:
    from rich.console import Console
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text
except ImportError as e:
    raise ImportError("slotpool.top needs rich: pip install 'slotpool[cli]'") from e

if TYPE_CHECKING:
    from .pool import SlotPool

STATES = {"leased": ("█", "green"), "cleaning": ("▒", "yellow"), "free": ("░", "dim"), "quarantined": ("x", "red")}
_WIDEST = 40  # columns of a bar


@attr.s(slots=True, auto_attribs=True, frozen=True, kw_only=True)
class Row:
    """One container.

    :ivar slots: how many by each of :data:`STATES`.
    :ivar waiting: leases that requests wait for there; None if that isn't known. A caller may wait at several containers,
        and does at none if all slots are his own pool's.
    :ivar leases: granted since it began; None if that isn't known. Likewise ``commands``.
    :ivar trouble: why it does not answer.
    """

    id: str
    address: str
    isolation: str = ""
    slots: Mapping[str, int] = attr.ib(factory=dict)
    executing: int = 0
    waiting: int | None = None
    leases: int | None = None
    commands: int | None = None
    trouble: str = ""


@attr.s(slots=True, auto_attribs=True, frozen=True, kw_only=True)
class Look:
    """What there was at ``at``, in seconds on the monotonic clock, and what is said above the table."""

    at: float
    rows: Sequence[Row]
    leases: int = 0
    commands: int = 0
    footer: str = ""


def look_of(at: float, rows: Sequence[Row], footer: str = "") -> Look:
    """With the rows' sums."""
    leases, commands = sum(row.leases or 0 for row in rows), sum(row.commands or 0 for row in rows)
    return Look(at=at, rows=rows, leases=leases, commands=commands, footer=footer)


def of_pool(view: PoolView) -> Look:
    """What a pool knows of its containers. It counts leases and commands as a whole only."""
    rows = [
        Row(
            id=one.id,
            address=one.address,
            isolation=one.isolation,
            slots={
                "leased": one.acquired + one.ready + one.leased_by_others,
                "free": one.free,
                "quarantined": one.quarantined,
            },
            executing=one.executing,
        )
        for one in view.containers
    ]
    footer = f"{view.state}; {view.total('acquired')} slots acquired, {view.waiting} callers wait"
    counters = view.counters
    return Look(at=view.taken_at, rows=rows, leases=counters.leases_num, commands=counters.executions_num, footer=footer)


def table(now: Look, before: Look | None) -> Table:
    """A total, which must be seen however many there are, and a row a container; rates are differences from ``before``."""
    found = Table(title=now.footer or None, title_justify="left", expand=False)
    for heading in ("container", "address", "isolation", "slots"):
        found.add_column(heading, overflow="fold")
    for heading in ("executing", "waiting", "leases/s", "commands/s"):
        found.add_column(heading, justify="right")
    earlier = {row.id: row for row in before.rows} if before is not None else {}
    seconds = now.at - before.at if before is not None else 0.0
    rates = [_rate(getattr(now, name), getattr(before, name, None), seconds) for name in ("leases", "commands")]
    executing = str(sum(row.executing for row in now.rows))
    found.add_row("total", f"{len(now.rows)} containers", "", _legend(now.rows), executing, "", *rates, end_section=True)
    for row in now.rows:
        # Text, as what servers say of themselves isn't markup.
        cells = [Text(row.id), Text(row.address), Text(row.isolation)]
        if row.trouble:
            found.add_row(*cells, Text(row.trouble, "red"), "", "", "", "")
            continue
        old = earlier.get(row.id)
        rates = [_rate(getattr(row, name), getattr(old, name, None), seconds) for name in ("leases", "commands")]
        waiting = "-" if row.waiting is None else str(row.waiting)
        found.add_row(*cells, _bar(row.slots), str(row.executing), waiting, *rates)
    return found


def _legend(rows: Sequence[Row]) -> Text:
    said = Text()
    for state, (mark, style) in STATES.items():
        count = sum(row.slots.get(state, 0) for row in rows)
        if count:
            said.append(f"{mark} ", style).append(f"{count} {state}  ")
    said.rstrip()
    return said


def _bar(slots: Mapping[str, int]) -> Text:
    total = sum(slots.values())
    bar = Text()
    for state, (mark, style) in STATES.items():
        count = slots.get(state, 0)
        bar.append(mark * (count if total <= _WIDEST else -(-count * _WIDEST // total)), style)
    return bar.append(f" {slots.get('leased', 0)}/{total}")


def _rate(now: int | None, before: int | None, seconds: float) -> str:
    # A server that began anew counts from zero.
    return "-" if now is None or before is None or seconds <= 0 or now < before else f"{(now - before) / seconds:.1f}"


@contextlib.contextmanager
def watch(pool: SlotPool, interval: float = 1.0) -> Iterator[None]:
    """Show a live view of ``pool`` on standard error while the block runs; where that is no terminal, once at its end.

    :param interval: seconds between two looks. The pool need not be started; other threads may use it.
    :raises ImportError: rich is not installed.
    """
    console = Console(stderr=True)
    done = threading.Event()
    with Live(console=console, auto_refresh=False) as live:

        def show() -> None:
            before: Look | None = None
            while True:
                now = of_pool(look(pool))
                live.update(table(now, before), refresh=True)
                before = now
                if done.wait(interval):
                    return

        thread = threading.Thread(target=show, name="slotpool-watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def row_of(id_: str, address: str, info: Mapping[str, object]) -> Row:
    """From a server's health."""
    counts = info.get("counts")
    if not isinstance(counts, dict):
        return Row(id=id_, address=address, trouble="it answers, and tells no more; is there a token, in SLOTPOOL_TOKEN?")
    slots = {("cleaning" if state == "preparing" else str(state)): int(count) for state, count in counts.items()}
    known = ("executing", "waiting", "executions", "leases_granted")
    numbers = {key: int(str(info[key])) if key in info else None for key in known}
    return Row(
        id=id_,
        address=address,
        isolation=str(info.get("isolation", "")),
        slots=slots,
        executing=numbers["executing"] or 0,
        waiting=numbers["waiting"],
        leases=numbers["leases_granted"],
        commands=numbers["executions"],
    )


def now() -> float:
    """The clock of :class:`Look`."""
    return time.monotonic()


def silent(id_: str, address: str, why: SlotPoolError) -> Row:
    """Of a server that does not answer."""
    return Row(id=id_, address=address, trouble=str(getattr(why, "message", why)))
