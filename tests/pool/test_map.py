"""``pool.map``: a function over many items, and what stops the work."""

from __future__ import annotations

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import servers, wait_until

from slotpool import AcquireTimeout, CommandFailed, ContainerLost, InvalidRequest, LeaseLost, Slot, SlotPool, mapping
from slotpool.errors import PoolClosed, SetupFailed


def echo(s: Slot, item: int) -> int:
    return int(s.bash(f"echo {item}", check=True).stdout)


def test_results_come_in_the_order_of_the_items(pool: SlotPool) -> None:
    def last_first(s: Slot, item: int) -> int:
        if item == 0:
            assert others.wait(30)
        elif item == 3:
            others.set()
        return echo(s, item)

    others = threading.Event()
    assert list(pool.map(last_first, range(20))) == list(range(20))


def test_results_come_as_they_finish(pool: SlotPool) -> None:
    first = threading.Event()

    def slow(s: Slot, item: int) -> int:
        assert item != 0 or first.wait(30)
        return echo(s, item)

    found = pool.map(slow, range(6), ordered=False)
    early = [next(found) for _ in range(5)]
    assert sorted(early) == [1, 2, 3, 4, 5]
    first.set()
    assert list(found) == [0]


def test_as_many_run_side_by_side_as_there_are_slots(pool: SlotPool) -> None:
    barrier = threading.Barrier(4)

    def together(s: Slot, item: int) -> str:
        barrier.wait(30)
        return s.slot_id

    assert set(pool.map(together, range(4))) == {"slot_0", "slot_1", "slot_2", "slot_3"}


def test_workers_bounds_what_runs_side_by_side(pool: SlotPool) -> None:
    running, most = [], []

    def watched(s: Slot, item: int) -> None:
        running.append(item)
        most.append(len(running))
        s.bash("true")
        running.remove(item)

    list(pool.map(watched, range(12), workers=2))
    assert max(most) <= 2


def test_every_item_has_a_clean_slot_set_up_for_it(pool: SlotPool) -> None:
    def look(s: Slot, item: int) -> str:
        found = s.bash("ls").stdout
        s.bash("touch junk")
        return found

    assert set(pool.map(look, range(12), setup="touch ready")) == {"ready\n"}


def test_the_log_tells_who_has_which_slot(pool: SlotPool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "slotpool")
    assert list(pool.map(echo, range(2), workers=1)) == [0, 1]
    told = [record.getMessage() for record in caplog.records if record.name == "slotpool.pool"]
    assert [sum(word in text for text in told) for word in ("acquired in local-", "released")] == [2, 2]


def test_items_are_taken_as_slots_become_free(pool: SlotPool) -> None:
    taken = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    with pool.map(echo, items()) as found:
        assert [next(found) for _ in range(3)] == [0, 1, 2]
    assert len(taken) < 1000
    assert list(found) == []


def test_what_an_item_raises_is_raised_and_stops_the_work(pool: SlotPool) -> None:
    begun = []

    def fail(s: Slot, item: int) -> None:
        begun.append(item)
        s.bash("exit 3" if item == 0 else "sleep 1000", check=True, timeout=2000)

    with pytest.raises(CommandFailed, match="exited with 3"):
        list(pool.map(fail, range(1000)))
    assert len(begun) < 1000
    assert wait_until(lambda: pool.acquired_slots == 0)  # a thread that waited for a slot may get one yet, and gives it back


def test_exceptions_can_be_returned_and_the_others_go_on(pool: SlotPool) -> None:
    def fail(s: Slot, item: int) -> int:
        if item % 2:
            raise ValueError(item)
        return echo(s, item)

    found: list[Any] = list(pool.map(fail, range(6), return_exceptions=True))
    assert found[::2] == [0, 2, 4]
    assert [repr(one) for one in found[1::2]] == ["ValueError(1)", "ValueError(3)", "ValueError(5)"]


def test_a_failing_setup_is_an_items_failure(pool: SlotPool) -> None:
    found: list[Any] = list(pool.map(echo, [1, 2], setup="exit 9", return_exceptions=True))
    assert [type(one) for one in found] == [SetupFailed, SetupFailed]


def test_a_function_that_raises_stop_iteration_does_not_end_the_results_unseen(pool: SlotPool) -> None:
    def fail(s: Slot, item: int) -> int:
        return int(next(iter([]), item) if item else next(iter([])))

    failure: Any
    failure, *others = pool.map(fail, range(3), return_exceptions=True)
    assert isinstance(failure, RuntimeError)
    assert "fn raised StopIteration" in str(failure)
    assert others == [1, 2]


def test_what_the_items_raise_comes_after_the_results_so_far(pool: SlotPool) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise OSError("no more")

    found = pool.map(echo, items(), return_exceptions=True)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="no more"):
        next(found)
    assert list(found) == []


@pytest.mark.parametrize("during", ["function", "setup"])
@pytest.mark.parametrize("retries", [0, 2])
def test_an_item_whose_container_is_lost_is_begun_anew_if_asked_for(retries: int, during: str) -> None:
    attempts: list[str] = []
    before = set(servers())

    def lose_the_first(s: Slot) -> None:
        attempts.append(s.alloc_id)
        if len(attempts) == 1:
            (server,) = set(servers()) - before
            os.kill(server, signal.SIGKILL)
        s.bash("true")

    def run(s: Slot, item: int) -> str:
        if during == "function":
            lose_the_first(s)
        return s.bash("echo well").stdout

    setup = lose_the_first if during == "setup" else None
    with SlotPool(slots_per_container=1, max_containers=1) as pool:
        found: list[Any] = list(pool.map(run, [1], retries=retries, return_exceptions=True, setup=setup))
    if retries:
        assert found == ["well\n"]
        assert len(set(attempts)) == 2
    else:
        lost = found[0].__cause__ if during == "setup" else found[0]
        assert isinstance(lost, (ContainerLost, LeaseLost))
        assert len(attempts) == 1


def test_a_slot_that_the_function_itself_gives_back_is_no_lost_one(pool: SlotPool) -> None:
    calls = []

    def release(s: Slot, item: int) -> None:
        calls.append(item)
        s.release()
        s.bash("true")

    with pytest.raises(LeaseLost, match="released"):
        list(pool.map(release, [1], retries=5))
    assert calls == [1]


def test_leaving_it_ends_what_runs(pool: SlotPool) -> None:
    running = threading.Barrier(5)

    def hang(s: Slot, item: int) -> None:
        running.wait(30)
        s.bash("sleep 1000", timeout=2000)

    with pool.map(hang, range(100)):
        running.wait(30)
    assert pool.acquired_slots == 0


def test_leaving_it_ends_what_makes_a_slot_ready(pool: SlotPool) -> None:
    started, went_on = threading.Event(), threading.Event()

    def hang(s: Slot) -> None:
        started.set()
        s.bash("sleep 1000", timeout=1000)

    def go_on(s: Slot) -> None:
        went_on.set()

    with pool.map(echo, [1], setup=[hang, go_on]):
        assert started.wait(30)
    assert pool.acquired_slots == 0
    assert not went_on.is_set()


def test_it_works_to_the_end_though_nobody_looks(pool: SlotPool) -> None:
    done = []
    pool.map(lambda s, item: done.append(echo(s, item)), range(20))
    assert wait_until(lambda: sorted(done) == list(range(20)), 30)


def test_a_failure_that_nobody_looks_at_is_in_the_log(pool: SlotPool, caplog: pytest.LogCaptureFixture) -> None:
    def fail(s: Slot, item: str) -> None:
        raise ValueError("lost in the dark")

    pool.map(fail, ["this one"])
    assert wait_until(lambda: "lost in the dark" in caplog.text, 30)
    assert "'this one'" in caplog.text


def test_breaking_off_begins_nothing_more(pool: SlotPool) -> None:
    begun = []

    def note(s: Slot, item: int) -> int:
        begun.append(item)
        return echo(s, item)

    for found in pool.map(note, range(10_000)):
        if found == 3:
            break
    assert wait_until(lambda: pool.acquired_slots == 0, 30)
    assert len(begun) < 10_000


def test_a_pool_that_is_stopped_ends_it(pool: SlotPool) -> None:
    running = threading.Barrier(5)

    def hang(s: Slot, item: int) -> None:
        running.wait(30)
        s.bash("sleep 1000", timeout=2000)

    found = pool.map(hang, range(100), return_exceptions=True)
    running.wait(30)
    pool.stop()
    with pytest.raises(PoolClosed):
        list(found)


def test_a_slot_is_waited_for_as_long_as_another_item_has_one() -> None:
    def run(s: Slot, item: int) -> int:
        if item == 0:
            assert wait_until(lambda: pool.get_stats()["requests_errors"] >= 2, 30)
        return item

    with SlotPool(slots_per_container=1, max_containers=1, acquire_timeout=1.0) as pool:
        pool.config.__dict__["max_containers"] = 2  # so that a second thread waits for a slot that never comes
        assert list(pool.map(run, range(3))) == [0, 1, 2]


def test_and_then_for_as_long_as_the_pool_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, given_back = threading.Event(), threading.Event()
    take, done_with = SlotPool._take, mapping._Work._done_with
    calls = itertools.count()

    def take_late(self: SlotPool, **given: Any) -> Slot:
        if next(calls) == 1:  # its time runs out just after the other item's slot was given back
            waiting.set()
            assert given_back.wait(30)
            raise AcquireTimeout("no slot became free")
        return take(self, **given)

    def done_and_told(self: mapping._Work[int, int], slot: Slot) -> None:
        done_with(self, slot)
        given_back.set()

    monkeypatch.setattr(SlotPool, "_take", take_late)
    monkeypatch.setattr(mapping._Work, "_done_with", done_and_told)
    with SlotPool(slots_per_container=2, max_containers=1) as pool:
        assert list(pool.map(lambda s, item: waiting.wait(30) and item, range(2))) == [0, 1]


def test_ctrl_c_stops_it_and_leaves_the_pool_well(pool: SlotPool) -> None:
    running = threading.Barrier(5)

    def hang(s: Slot, item: int) -> None:
        running.wait(30)
        s.bash("sleep 1000", timeout=2000)

    def interrupt() -> None:
        running.wait(30)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        list(pool.map(hang, range(100)))
    thread.join()
    assert pool.acquired_slots == 0
    assert list(pool.map(echo, range(8))) == list(range(8))


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("fn", {"fn": 5}),
        ("items", {"items": 5}),
        ("retries", {"retries": -1}),
        ("retries", {"retries": True}),
        ("workers", {"workers": 0}),
        ("workers", {"workers": "4"}),
        ("setup", {"setup": 5}),
    ],
)
def test_a_bad_argument_is_refused_before_anything_is_begun(pool: SlotPool, name: str, given: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=f"^{name}: "):
        pool.map(**{"fn": echo, "items": [1], **given})
    assert pool.get_stats()["requests_num"] == 0


def test_a_pool_that_is_not_started_is_refused() -> None:
    with pytest.raises(PoolClosed):
        SlotPool().map(echo, [1])


def test_a_bar_is_shown_when_it_is_asked_for(pool: SlotPool, capfd: pytest.CaptureFixture[str]) -> None:
    assert list(pool.map(echo, range(4))) == [0, 1, 2, 3]
    assert capfd.readouterr().err == ""
    assert list(pool.map(echo, range(4), progress=True)) == [0, 1, 2, 3]
    assert "4/4" in capfd.readouterr().err
