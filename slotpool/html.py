"""How pools, slots and results look in a notebook: HTML without scripts or style sheets, for light and dark themes.

Whatever text is shown may come from code that nobody trusts. So text becomes HTML in one place, :func:`_tag`, which
escapes all that is not :class:`_Html` already.
"""

from __future__ import annotations

import html
import re
import signal
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .slot import SlotState
from .view import look

if TYPE_CHECKING:
    from .pool import SlotPool
    from .slot import ExecutionResult, Slot
    from .view import ContainerView

_MOST_CHARACTERS = 20_000  # shown of a stream; a notebook keeps what it shows
_MOST_CONTAINERS = 50
_GREEN, _RED, _AMBER, _BLUE, _GREY = "#2e9e5b", "#d1453b", "#c98a12", "#3b82d1", "#8887"
_STATES = {  # of a container's slots, and how their part of a bar looks
    "executing": _GREEN,
    "acquired": _BLUE,
    "ready": "#3b82d166",
    "leased by others": _AMBER,
    "quarantined": _RED,
    "free": _GREY,
}
# What a terminal would take as an order: colours, the cursor, titles.
_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b\n]*(?:\x07|\x1b\\)?|[ -/]*[0-~])")
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"}  # to their pictures
_PRE = (
    "margin:2px 0 0;padding:4px 8px;max-height:24em;overflow:auto;white-space:pre-wrap;overflow-wrap:anywhere;"
    "font-family:monospace;font-size:0.95em;line-height:1.35;text-align:left;color:inherit;background:transparent"
)


class _Html(str):
    """Text that is HTML."""


def _tag(name: str, *content: str, style: str = "", title: str = "") -> _Html:
    """An element. :param style: never from outside."""
    inside = "".join(one if isinstance(one, _Html) else _escaped(one) for one in content)
    attributes = (f' style="{style}"' if style else "") + (f' title="{_escaped(title)}"' if title else "")
    return _Html(f"<{name}{attributes}>{inside}</{name}>")


def _escaped(text: str) -> str:
    # Half a surrogate pair can't be sent to a front end.
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"), quote=True)


def _muted(*content: str) -> _Html:
    return _tag("span", *content, style="opacity:0.65")


def _badge(text: str, colour: str) -> _Html:
    return _tag("span", text, style=f"background:{colour};color:#fff;border-radius:3px;padding:1px 6px;font-weight:600")


def _line(*parts: str) -> _Html:
    return _tag(
        "div", *(_tag("span", part, style="margin-right:10px") for part in parts), style="text-align:left;line-height:1.8"
    )


def of_result(result: ExecutionResult) -> str:
    """How it ended, what it printed on stdout and on stderr, each cut short if it is long."""
    facts = [_time(result.duration), result.slot_id, str(result.metadata.get("isolation", ""))]
    facts += ["stdout truncated"] * result.stdout_truncated + ["stderr truncated"] * result.stderr_truncated
    parts = [_line(_outcome(result), _muted(" · ".join(filter(None, facts))))]
    for name, text, colour in (
        ("error", result.error, _RED),
        ("stdout", result.stdout, _GREY),
        ("stderr", result.stderr, _AMBER),
    ):
        if text:
            pre = _tag("pre", _shown(text), style=_PRE)
            parts.append(_tag("div", _muted(name), pre, style=f"border-left:3px solid {colour};padding-left:8px;margin:4px 0"))
    return _tag("div", *parts)


def _outcome(result: ExecutionResult) -> _Html:
    if result.timed_out:
        return _badge("timed out", _RED)
    if result.exit_code is None:
        return _badge(str(result.metadata.get("exception", "failed")), _RED)
    if result.signal is not None:
        return _badge(f"killed by {_signal(result.signal)}", _RED)
    if result.error:
        return _badge("failed", _RED)
    return _badge(f"exit code {result.exit_code}", _RED if result.exit_code else _GREEN)


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.3g} ms" if seconds < 1 else f"{seconds:.1f} s"


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _shown(text: str) -> str:
    """Head and tail, as a terminal would leave them, but for colours."""
    half = _MOST_CHARACTERS // 2
    if len(text) > _MOST_CHARACTERS:
        text = f"{text[:half]}\n… {len(text) - 2 * half} characters are not shown …\n{text[-half:]}"
    text = _ESCAPES.sub("", text).replace("\r\n", "\n")
    return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")).translate(_CONTROLS)


def of_slot(slot: Slot) -> str:
    """What identifies it and its use."""
    state = slot.state
    colour = {SlotState.EXECUTING: _GREEN, SlotState.ACQUIRED: _BLUE, SlotState.ERROR: _RED}.get(state, "#888")
    told = {
        "container": f"{slot.alloc_id} at {slot.container_addr}",
        "workspace": slot.workspace_dir,
        "network": "yes" if slot.network else "no",
        "trajectory": slot.trajectory_id,
        "lease": slot.lease_id,
    }
    if state in (SlotState.ACQUIRED, SlotState.EXECUTING):
        told["held for"] = _time(time.monotonic() - slot._tenure.acquired_at)
    if slot.metadata:
        told["metadata"] = repr(slot.metadata)
    rows = [_row([_muted(name), _tag("code", text)]) for name, text in told.items()]
    return _tag("div", _line(_tag("b", slot.slot_id), _badge(state.value, colour)), _table(rows))


def of_pool(pool: SlotPool) -> str:
    """Its containers with a bar of their slots' states, and what it has done."""
    view = look(pool)
    colour = {"started": _GREEN, "stopped": _RED}.get(view.state, "#888")
    slots, held = view.total("slots"), view.total("acquired")
    head = [f"{held} of {slots} slots acquired", f"{view.waiting} callers wait"]
    head += [f"{view.lost} lost slots are still held"] if view.lost else []
    parts = [_line(_tag("b", "SlotPool"), _badge(view.state, colour), f"{view.backend} · " + " · ".join(head))]
    if view.containers:
        rows = [_row([_tag("b", name) for name in ("container", "isolation", "slots", "")])]
        rows += [_of_container(one) for one in view.containers[:_MOST_CONTAINERS]]
        if len(view.containers) > _MOST_CONTAINERS:
            rows.append(_row([_muted(f"and {len(view.containers) - _MOST_CONTAINERS} more"), "", "", ""]))
        parts += [_table(rows), _legend()]
    counters = view.counters
    done = {
        "commands": counters.executions_num,
        "without a result": counters.executions_errors,
        "slots asked for": counters.requests_num,
        "without one": counters.requests_errors,
        "leases lost": counters.leases_lost,
        "containers lost": counters.containers_lost,
    }
    parts.append(_line(_muted(" · ".join(f"{count} {what}" for what, count in done.items() if count or what == "commands"))))
    return _tag("div", *parts)


def _of_container(one: ContainerView) -> _Html:
    states = {
        "executing": one.executing,
        "acquired": one.acquired - one.executing,
        "ready": one.ready,
        "leased by others": one.leased_by_others,
        "quarantined": one.quarantined,
        "free": one.free,
    }
    counts = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    parts = [
        _tag(
            "span",
            style=f"display:inline-block;height:10px;width:{160 * count / max(1, one.slots):.1f}px;background:{_STATES[state]}",
        )
        for state, count in states.items()
        if count
    ]
    bar = _tag("span", *parts, style="display:inline-block;white-space:nowrap;line-height:10px;font-size:0", title=counts)
    counts += "; about to be ended" if one.closing else ""
    return _row([_tag("span", one.id, title=one.address), one.isolation, bar, _muted(counts)])


def _legend() -> _Html:
    marks = [
        _tag("span", _tag("span", style=f"display:inline-block;width:10px;height:10px;background:{colour}"), f" {state}")
        for state, colour in _STATES.items()
    ]
    return _line(*(_muted(mark) for mark in marks))


def _table(rows: Iterable[str]) -> _Html:
    return _tag("table", _tag("tbody", *rows), style="margin:2px 0;border:0;border-collapse:collapse")


def _row(cells: Iterable[str]) -> _Html:
    style = "text-align:left;vertical-align:middle;padding:2px 12px 2px 0;border:0;background:transparent"
    return _tag("tr", *(_tag("td", cell, style=style) for cell in cells), style="background:transparent")
