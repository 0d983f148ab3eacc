"""A slot's setup: carried out once for each clean workspace, and its failures name the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from slotpool import ContainerLost, InvalidRequest, Slot, SlotPool
from slotpool.errors import SetupFailed

NOTE = "echo step >> steps"


@pytest.fixture
def prepared() -> Iterator[SlotPool]:
    """A pool of one slot with a setup of its own."""
    with SlotPool(slots_per_container=1, max_containers=1, setup=NOTE) as pool:
        yield pool


def count(s: Slot) -> int:
    return s.read_file("steps").count("step")


def test_every_clean_slot_is_set_up_once(prepared: SlotPool) -> None:
    for _ in range(2):
        with prepared.slot() as s:
            assert count(s) == 1
            s.bash("true")
            assert count(s) == 1


def test_the_pools_steps_come_first_then_the_slots_own_in_order(prepared: SlotPool) -> None:
    def write(slot: Slot) -> None:
        slot.write_file("steps", slot.read_file("steps") + "mine\n")

    with prepared.slot(setup=[write, "echo last >> steps"]) as s:
        assert s.read_file("steps") == "step\nmine\nlast\n"
    with prepared.slot() as s:
        assert s.read_file("steps") == "step\n"


def test_a_slot_that_is_handed_on_as_it_is_is_not_set_up_again(prepared: SlotPool) -> None:
    s = prepared.acquire(setup="echo more >> steps")
    prepared.release(s, reset_workspace=False)
    with prepared.slot(setup=["echo more >> steps", "echo further >> steps"]) as s:
        assert s.read_file("steps") == "step\nmore\nfurther\n"


def test_a_step_may_come_twice(prepared: SlotPool) -> None:
    with prepared.slot(setup=["echo more >> steps", NOTE, "echo more >> steps"]) as s:
        assert s.read_file("steps") == "step\nmore\nstep\nmore\n"


def test_a_reset_whose_answer_is_lost_is_a_reset(prepared: SlotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    s = prepared.acquire()
    client = s._tenure.container.client
    reset = client.reset

    def answer_lost(*args: Any) -> bool:
        reset(*args)
        raise ContainerLost("no answer")

    monkeypatch.setattr(client, "reset", answer_lost)
    with pytest.raises(ContainerLost):
        s.reset()
    prepared.release(s, reset_workspace=False)
    with prepared.slot() as s:
        assert count(s) == 1


def test_a_reset_sets_it_up_again(prepared: SlotPool) -> None:
    with prepared.slot(setup="echo more >> steps") as s:
        s.bash("echo junk >> steps; touch junk")
        s.reset()
        assert s.read_file("steps") == "step\nmore\n"
        assert s.bash("ls").stdout == "steps\n"


def test_a_failing_command_is_named_and_its_slot_comes_back(prepared: SlotPool) -> None:
    with pytest.raises(SetupFailed, match=r"step 3 of 3, 'echo why >&2; exit 3': .*exited with 3.*why") as failed:
        prepared.acquire(setup=["true", "echo why >&2; exit 3"])
    assert (failed.value.number, failed.value.steps) == (3, 3)
    assert failed.value.result is not None
    assert failed.value.result.stderr == "why\n"
    assert prepared.acquired_slots == 0
    with prepared.slot(timeout=10) as s:
        assert count(s) == 1


def test_a_failing_function_is_named(prepared: SlotPool) -> None:
    def download(slot: Slot) -> None:
        raise OSError("no such host")

    with pytest.raises(SetupFailed, match=r"step 2 of 2, .*download: no such host") as failed:
        prepared.acquire(setup=download)
    assert isinstance(failed.value.__cause__, OSError)
    assert failed.value.result is None


def test_what_a_function_raises_to_end_the_program_does_so(prepared: SlotPool) -> None:
    def interrupted(slot: Slot) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared.acquire(setup=interrupted)
    assert prepared.acquired_slots == 0


def test_a_step_has_a_time_limit_of_its_own() -> None:
    settings: dict[str, Any] = {"slots_per_container": 1, "setup": "sleep 60", "setup_timeout": 0.1}
    with SlotPool(**settings) as pool, pytest.raises(SetupFailed, match="timed out"):
        pool.acquire()


def test_a_step_after_a_reset_that_fails_leaves_the_slot_with_its_holder(prepared: SlotPool) -> None:
    calls: list[Slot] = []

    def only_once(slot: Slot) -> None:
        calls.append(slot)
        if len(calls) > 1:
            raise OSError("not twice")

    with prepared.slot(setup=only_once) as s:
        with pytest.raises(SetupFailed, match="not twice"):
            s.reset()
        assert s.bash("cat steps").stdout == "step\n"


@pytest.mark.parametrize("wrong", [5, "", [""], [None], b"true", {"true": 1}])
def test_what_is_no_step_is_refused_before_anything_is_done(pool: SlotPool, wrong: object) -> None:
    with pytest.raises(InvalidRequest, match="setup: expected bash commands, or functions of a slot"):
        pool.acquire(setup=wrong)  # type: ignore[arg-type]
    assert pool.acquired_slots == 0
