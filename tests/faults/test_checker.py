"""The checker of histories sees each kind of violation, and none in a history that has none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Callable

import pytest
from checker import CHECKS, violations
from history import Event


class Told:
    """A history in the making: each event comes a second after the one before."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, kind: str, **fields: Any) -> None:
        self.events.append({"kind": kind, "at": float(len(self.events)), **fields})

    def hold(self, holder: str, slot: str = "slot_0", boot: str = "boot") -> None:
        self("grant", boot=boot, slot=slot, lease=f"lease of {holder}")
        self("hold", holder=holder, lease=f"lease of {holder}")

    def call(self, holder: str, n: int = 1, part: int = 0) -> dict[str, Any]:
        told = {"holder": holder, "part": part, "call": f"{holder}.{part}.{n}"}
        self("call", **told)
        return told

    def effect(self, call: dict[str, Any], what: str = "begin", files: tuple[str, ...] = ()) -> None:
        self("effect", what=what, stamp=1e9 + len(self.events), files=list(files), **call)

    def command(self, holder: str, n: int = 1, part: int = 0, files: tuple[str, ...] = ()) -> None:
        call = self.call(holder, n, part)
        self.effect(call, files=files)
        self("result", call=call["call"], out=call["call"], well=True)

    def end(self, state: str = "free", why: str = "", held: int = 0, slots: int = 1) -> None:
        told = {"slot": "slot_0", "state": state, "owner": "", "why": why}
        self("asked", client="c", threads=1)
        self("last", client="c", thread=0)
        self("stopped", client="c", held=held)
        self("slots", server="s", wanted=1, slots=[told] * slots)
        self("exited", server="s", code=0, why="it was asked to end")


def all_is_well(told: Told) -> None:
    told.hold("a")
    told.command("a")
    told.command("a", 2, files=("a.0.1",))
    lost = told.call("a", 3)
    told("error", call=lost["call"], error="ContainerLost()", may_have_run=True)
    told.hold("b")
    told.effect(told.call("b"))  # and it has run, or has no result yet
    told.hold("c", slot="slot_1")
    told.command("c")
    told.command("c", 1, part=1)  # after a reset
    told.effect({"holder": "b", "part": 0, "call": "b.0.1"}, "beat")  # in another slot
    for n, well in ((2, True), (3, False)):
        told("wrote", well=well, **told.call("c", n, 1))
    told("read", content="c.1.3", **told.call("c", 4, 1))  # a write that failed may have been done
    ended = told.call("c", 5, 1)
    told.effect(ended, files=("c.1.1", "file"))
    told("result", call=ended["call"], out="", well=False)
    told.end("quarantined", "it could not be made clean")


def granted_again(told: Told) -> None:
    told.hold("a")
    told.hold("a")
    told.end()


def held_without_a_grant(told: Told) -> None:
    told("hold", holder="a", lease="a lease")
    told.end()


def held_by_two(told: Told) -> None:
    told.hold("a")
    told.hold("b")
    told.command("b")
    told.command("a")
    told.end()


def used_by_two(told: Told) -> None:
    told.hold("a")
    told.effect(told.call("a"))
    told.hold("b")
    told.effect(told.call("b"))
    told.effect(told.call("a", 2))
    told.end()


def outlives_its_lease(told: Told) -> None:
    told.hold("a")
    told.command("a")
    told.hold("b")
    told.command("b")
    told.effect({"holder": "a", "part": 0, "call": "a.0.1"}, "beat")
    told.end()


def outlives_a_reset(told: Told) -> None:
    told.hold("a")
    told.command("a")
    told.command("a", 1, part=1)
    told.effect({"holder": "a", "part": 0, "call": "a.0.1"}, "beat")
    told.end()


def runs_twice(told: Told) -> None:
    told.hold("a")
    told.command("a")
    told.effect({"holder": "a", "part": 0, "call": "a.0.1"})
    told.end()


def runs_unasked(told: Told) -> None:
    told.hold("a")
    told.effect({"holder": "a", "part": 0, "call": "a.0.1"})
    told.end()


def runs_in_spite_of_what_is_said(told: Told) -> None:
    told.hold("a")
    call = told.call("a")
    told("error", call=call["call"], error="LeaseLost()", may_have_run=False)
    told.effect(call)
    told.end()


def does_not_run(told: Told) -> None:
    told.hold("a")
    call = told.call("a")
    told("result", call=call["call"], out=call["call"], well=True)
    told.end()


def gets_anothers_result(told: Told) -> None:
    told.hold("a")
    told.effect(told.call("a"))
    told("result", call="a.0.1", out="b.0.1", well=True)
    told.end()


def fails_with_anothers_result(told: Told) -> None:
    told.hold("a")
    told.effect(told.call("a"))
    told("result", call="a.0.1", out="b.0.1", well=False)
    told.end()


def finds_anothers_file(told: Told) -> None:
    told.hold("a")
    told.command("a")
    told.hold("b")
    told.command("b", files=("a.0.1",))
    told.end()


def finds_a_file_of_before_a_reset(told: Told) -> None:
    told.hold("a")
    told.command("a")
    told.command("a", 1, part=1, files=("a.0.1",))
    told.end()


def misses_its_file(told: Told) -> None:
    told.hold("a")
    told.command("a")
    told.command("a", 2)
    told.end()


def reads_anothers_content(told: Told) -> None:
    told.hold("a")
    told("read", content="b.0.1", **told.call("a"))
    told.end()


def reads_an_old_content(told: Told) -> None:
    told.hold("a")
    for n in (1, 2):
        told("wrote", well=True, **told.call("a", n))
    told("read", content="a.0.1", **told.call("a", 3))
    told.end()


def slot_is_leased_for_ever(told: Told) -> None:
    told.end("leased")


def slot_is_quarantined_for_nothing(told: Told) -> None:
    told.end("quarantined")


def slot_is_gone(told: Told) -> None:
    told.end(slots=0)


def nobody_has_looked(told: Told) -> None:
    told("exited", server="s", code=0, why="it was asked to end")


def client_holds_one_in_the_end(told: Told) -> None:
    told.end(held=1)


def client_waits_for_ever(told: Told) -> None:
    told("asked", client="d", threads=2)
    told("stopped", client="d", held=0)
    told.end()


def client_does_not_end(told: Told) -> None:
    told("asked", client="d", threads=0)
    told.end()


def process_is_left(told: Told) -> None:
    told.end()
    told("left", process="17: sleep")


def server_ends(told: Told) -> None:
    told("exited", server="s", code=1, why="")
    told.end()


def caller_gets_a_foreign_error(told: Told) -> None:
    told("raised", client="c", error="OSError()")
    told.end()


WRONG: dict[Callable[[Told], None], str] = {
    granted_again: "held twice: the lease lease of a was granted 2 times",
    held_without_a_grant: "held twice: a has a lease that was not granted",
    held_by_two: "held twice: slot_0 of boot was leased as lease of b while lease of a still held",
    used_by_two: "not alone: begin of a.0.2 in slot_0 of boot",
    outlives_its_lease: "not alone: beat of a.0.1 in slot_0 of boot",
    outlives_a_reset: "not alone: beat of a.0.1 in slot_0 of boot",
    runs_twice: "run twice: a.0.1 ran 2 times",
    runs_unasked: "run twice: a.0.1 was never asked for",
    runs_in_spite_of_what_is_said: "run, and said not to have: a.0.1",
    does_not_run: "not run, and said to have: a.0.1",
    gets_anothers_result: "another's result: a.0.1 got 'b.0.1'",
    fails_with_anothers_result: "another's result: a.0.1, which failed, got 'b.0.1'",
    finds_anothers_file: "another's workspace: b.0.1 found ['a.0.1']",
    finds_a_file_of_before_a_reset: "another's workspace: a.1.1 found ['a.0.1']",
    misses_its_file: "lost from its workspace: a.0.2 did not find ['a.0.1']",
    reads_anothers_content: "another's file: a.0.1 read 'b.0.1'",
    reads_an_old_content: "another's file: a.0.3 read 'a.0.1'",
    slot_is_leased_for_ever: "slot lost: slot_0 of s is leased in the end",
    slot_is_quarantined_for_nothing: "slot lost: slot_0 of s is quarantined in the end",
    slot_is_gone: "slot lost: s has 0 slots of 1",
    nobody_has_looked: "slot lost: no server has told its slots",
    client_holds_one_in_the_end: "slot lost: client c held 1 when it stopped",
    client_waits_for_ever: "slot lost: of client d only 0 of 2 threads got one in the end",
    client_does_not_end: "slot lost: client d held None when it stopped",
    process_is_left: "left: 17: sleep",
    server_ends: "ended by itself: s, 1",
    caller_gets_a_foreign_error: "raised: OSError()",
}


def test_a_history_in_which_all_is_well() -> None:
    told = Told()
    all_is_well(told)
    assert violations(told.events) == []


@pytest.mark.parametrize(("story", "said"), [pytest.param(story, said, id=story.__name__) for story, said in WRONG.items()])
def test_a_violation_is_seen_and_nothing_else(story: Callable[[Told], None], said: str) -> None:
    told = Told()
    story(told)
    (found,) = violations(told.events)
    assert found.startswith(said)


def test_each_check_has_a_history_that_it_objects_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(of: Any) -> Iterator[str]:
        return iter(())

    for i in range(len(CHECKS)):
        monkeypatch.setattr("checker.CHECKS", (*CHECKS[:i], silent, *CHECKS[i + 1 :]))
        unseen = []
        for story in WRONG:
            told = Told()
            story(told)
            unseen.append(not violations(told.events))
        assert any(unseen), CHECKS[i]
