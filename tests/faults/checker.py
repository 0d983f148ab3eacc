"""Proves from a history that the promises were kept, or says what was broken. Pure; see :mod:`history` for the events."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from history import Event


def violations(events: list[Event]) -> list[str]:
    """What the history shows that must not be."""
    of = defaultdict(list)
    for event in events:
        of[event["kind"]].append(event)
    return [wrong for check in CHECKS for wrong in check(of)]


Events = defaultdict[str, list[Event]]


def _slots_of_leases(of: Events) -> dict[str, tuple[str, str]]:
    return {grant["lease"]: (grant["boot"], grant["slot"]) for grant in of["grant"]}


def leased_once(of: Events) -> Iterator[str]:
    """No slot is leased to two at a time.

    A lease has surely held from when its grant came until the last call that went well was made.
    """
    slots = _slots_of_leases(of)
    counted = Counter(grant["lease"] for grant in of["grant"])
    yield from (f"held twice: the lease {lease} was granted {n} times" for lease, n in counted.items() if n > 1)
    leases = {hold["holder"]: hold["lease"] for hold in of["hold"]}
    granted = {grant["lease"]: grant["at"] for grant in of["grant"]}
    yield from (
        f"held twice: {hold['holder']} has a lease that was not granted" for hold in of["hold"] if hold["lease"] not in slots
    )
    went_well = {result["call"] for result in of["result"]}
    surely: dict[str, float] = {}
    for call in of["call"]:
        if call["call"] in went_well:
            lease = leases[call["holder"]]
            surely[lease] = max(call["at"], surely.get(lease, 0.0))
    held = defaultdict(list)
    for lease, until in surely.items():
        if lease in slots:
            held[slots[lease]].append((granted[lease], until, lease))
    for (boot, slot), spans in held.items():
        spans.sort()
        for (_, until, one), (since, _, other) in zip(spans, spans[1:]):
            if since < until:
                yield f"held twice: {slot} of {boot} was leased as {other} while {one} still held"


def alone(of: Events) -> Iterator[str]:
    """Once a holder's command has begun in a slot, nothing of an earlier holder, or of before a reset, runs there."""
    slots = _slots_of_leases(of)
    leases = {hold["holder"]: hold["lease"] for hold in of["hold"]}
    seen = defaultdict(list)
    for effect in of["effect"]:
        lease = leases.get(effect["holder"])
        if lease in slots:
            seen[slots[lease]].append(effect)
    for (boot, slot), effects in seen.items():
        effects.sort(key=lambda effect: float(effect["stamp"]))
        current: tuple[str, int] | None = None
        former: set[tuple[str, int] | None] = set()
        for effect in effects:
            who = effect["holder"], effect["part"]
            if who in former:
                yield f"not alone: {effect['what']} of {effect['call']} in {slot} of {boot} after {current} had begun"
            elif who != current:
                former.add(current)
                current = who


def at_most_once(of: Events) -> Iterator[str]:
    """No command runs twice, none that is said not to have run, and each that has a result has run."""
    began = Counter(effect["call"] for effect in of["effect"] if effect["what"] == "begin")
    made = {call["call"] for call in of["call"]}
    for call, times in began.items():
        if times > 1:
            yield f"run twice: {call} ran {times} times"
        if call not in made:
            yield f"run twice: {call} was never asked for"
    for error in of["error"]:
        if not error["may_have_run"] and began[error["call"]]:
            yield f"run, and said not to have: {error['call']}: {error['error']}"
    for result in of["result"]:
        if result["well"] and not began[result["call"]]:
            yield f"not run, and said to have: {result['call']}"


def own_results(of: Events) -> Iterator[str]:
    """Each call's result is its own: each command prints its call."""
    for result in of["result"]:
        if result["well"] and result["out"] != result["call"]:
            yield f"another's result: {result['call']} got {result['out']!r}"
        if not result["well"] and not result["call"].startswith(result["out"]):  # it may have been ended before it printed
            yield f"another's result: {result['call']}, which failed, got {result['out']!r}"


def own_workspaces(of: Events) -> Iterator[str]:
    """A workspace has what its holder has put there since it was clean, nothing else and nothing less.

    Each command finds what is there, then leaves a file with its call's name.
    """
    put = defaultdict(list)  # files by (holder, part), and when they were surely there
    calls = {call["call"]: call for call in of["call"]}
    for result in of["result"]:
        if result["well"]:
            call = calls[result["call"]]
            put[call["holder"], call["part"]].append((result["at"], result["call"]))
    for effect in of["effect"]:
        if effect["what"] != "begin" or effect["call"] not in calls:
            continue
        call = calls[effect["call"]]
        own = f"{effect['holder']}.{effect['part']}."
        strange = [name for name in effect["files"] if not name.startswith(own) and name != "file"]
        if strange:
            yield f"another's workspace: {effect['call']} found {strange}"
        missing = [name for at, name in put[call["holder"], call["part"]] if at < call["at"] and name not in effect["files"]]
        if missing:
            yield f"lost from its workspace: {effect['call']} did not find {missing}"


def own_files(of: Events) -> Iterator[str]:
    """What is read is what was written last, or by a write that failed since, and may have been done."""
    may_be: dict[tuple[str, int], set[str]] = {}
    for event in sorted(of["wrote"] + of["read"], key=lambda event: float(event["at"])):
        where = event["holder"], event["part"]
        if event["kind"] == "read":
            if event["content"] not in may_be.get(where, {""}):
                yield f"another's file: {event['call']} read {event['content']!r}"
        elif event["well"]:
            may_be[where] = {event["call"]}
        else:
            may_be.setdefault(where, {""}).add(event["call"])


def none_lost(of: Events) -> Iterator[str]:
    """In the end each slot is free, or quarantined for a reason; and each client could go on to the end, and held none then."""
    for told in of["slots"]:
        if len(told["slots"]) != told["wanted"]:
            yield f"slot lost: {told['server']} has {len(told['slots'])} slots of {told['wanted']}"
        for slot in told["slots"]:
            if slot["state"] != "free" and not (slot["state"] == "quarantined" and slot["why"]):
                yield f"slot lost: {slot['slot']} of {told['server']} is {slot['state']} in the end, {slot['why']!r}"
    if not of["slots"]:
        yield "slot lost: no server has told its slots"
    last = Counter(event["client"] for event in of["last"])
    stopped = {event["client"]: event["held"] for event in of["stopped"]}
    for asked in of["asked"]:
        client = asked["client"]
        if last[client] != asked["threads"]:
            yield f"slot lost: of client {client} only {last[client]} of {asked['threads']} threads got one in the end"
        if stopped.get(client) != 0:
            yield f"slot lost: client {client} held {stopped.get(client)} when it stopped"


def none_left(of: Events) -> Iterator[str]:
    """In the end no process is there, and no server has ended but by what was done to it."""
    yield from (f"left: {event['process']}" for event in of["left"])
    yield from (f"ended by itself: {event['server']}, {event['code']}" for event in of["exited"] if not event["why"])


def own_errors(of: Events) -> Iterator[str]:
    """Whatever happens, callers get the library's own errors."""
    yield from (f"raised: {event['error']}" for event in of["raised"])


CHECKS = (leased_once, alone, at_most_once, own_results, own_workspaces, own_files, none_lost, none_left, own_errors)
