"""Bounded output: what is kept of a stream, and how it reads as text."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
import tracemalloc
from collections.abc import Iterable

import pytest
from cells import new_cell
from hypothesis import given, settings
from hypothesis import strategies as st

from slotpool.sandbox import linux, sandboxes, zygote
from slotpool.sandbox.capture import Driver, Job, Output

FEW = settings(max_examples=200)
GAP = re.compile(r"\n\[\.\.\. (\d+) bytes left out \.\.\.\]\n")
LIMITS = st.integers(0, 40)


def fed(limit: int, chunks: Iterable[bytes]) -> Output:
    output = Output(limit)
    for chunk in chunks:
        output.add(chunk)
    return output


def split(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    ends = [*sorted(min(cut, len(data)) for cut in cuts), len(data)]
    return [data[start:end] for start, end in zip([0, *ends], ends)]


def test_nothing_is_an_empty_text() -> None:
    output = Output(10)
    assert (output.text(), output.kept(), output.truncated) == ("", b"", False)


def test_up_to_the_limit_everything_is_kept() -> None:
    output = fed(10, [b"01234", b"56789"])
    assert (output.text(), output.truncated) == ("0123456789", False)


def test_beyond_the_limit_first_and_last_halves_are_kept_with_a_line_between() -> None:
    output = fed(10, [b"0123456789abcdef"])
    assert (output.kept(), output.truncated) == (b"01234bcdef", True)
    assert output.text() == "01234\n[... 6 bytes left out ...]\nbcdef"


def test_one_byte_too_many_is_enough_to_be_truncated() -> None:
    output = fed(10, [b"0123456789", b"a"])
    assert (output.kept(), output.truncated) == (b"012346789a", True)


@pytest.mark.parametrize(("limit", "kept"), [(0, b""), (1, b"9"), (2, b"09"), (3, b"089")])
def test_limits_that_leave_next_to_no_room_are_kept_to(limit: int, kept: bytes) -> None:
    output = fed(limit, [b"01234", b"56789"])
    assert (output.kept(), output.truncated) == (kept, True)
    assert fed(limit, []).truncated is False


@pytest.mark.parametrize("character", ["\u00e9", "\u20ac", "\U0001f600"])
def test_a_character_split_between_chunks_comes_out_whole(character: str) -> None:
    data = f"a{character}b".encode()
    for cut in range(len(data)):
        assert fed(100, [data[:cut], data[cut:]]).text() == f"a{character}b"
    assert fed(100, [data[i : i + 1] for i in range(len(data))]).text() == f"a{character}b"


@pytest.mark.parametrize("character", ["\u00e9", "\u20ac", "\U0001f600"])
@pytest.mark.parametrize("limit", range(12))
def test_a_character_that_head_and_tail_share_is_whole_if_nothing_is_left_out(character: str, limit: int) -> None:
    text = character * 3
    output = fed(limit, [text.encode()])
    if limit >= len(text.encode()):
        assert output.text() == text
    else:
        assert set(GAP.sub("", output.text())) <= {character}


def test_bytes_that_are_not_utf_8_come_through_as_surrogate_escapes() -> None:
    output = fed(100, [b"a\xffb", b"\xc3"])
    assert output.text() == "a\udcffb\udcc3"
    assert output.text().encode("utf-8", "surrogateescape") == output.kept()
    assert fed(4, [b"\xff\xffabc\xff\xff"]).text() == "\udcff\udcff\n[... 3 bytes left out ...]\n\udcff\udcff"


def test_an_end_is_found_in_what_was_kept() -> None:
    assert fed(10, [b"01", b"23"]).ends_with(b"123")
    assert not fed(10, [b"0123"]).ends_with(b"12")
    assert fed(4, [b"01234"]).ends_with(b"34")
    assert not fed(4, [b"01234"]).ends_with(b"234")


def test_what_has_ended_while_another_calls_end_was_seen_to_is_not_past_its_deadline() -> None:
    with contextlib.ExitStack() as stack:
        made, control, far_lifeline = new_cell(stack)
        far: list[dict[str, int]] = []
        calls = []
        for _ in range(2):
            calls.append(made.shell(b"true", None))
            message, fds = linux.receive(control, 65536, 8)
            far.append(dict(zip(json.loads(message)["fds"], fds)))

        def long() -> None:
            os.write(far[1]["stdout"], b"whole")
            os.write(far[1]["call"], zygote.STATUS.pack(0))
            other.deadline = time.monotonic()

        ends: list[bool] = []
        one = Job(calls[0], time.monotonic() + 60, 50, 50, long)
        other = Job(calls[1], time.monotonic() + 60, 50, 50, lambda: ends.append(True))
        driver = Driver([one, other])
        os.write(far[0]["call"], zygote.STATUS.pack(0))
        assert driver.run()
        assert ends == [True]
        assert (other.outcome.timed_out, other.outcome.status, other.outcome.stdout.text()) == (False, 0, "whole")
        driver.close()
        for fd in (*far[0].values(), *far[1].values()):
            os.close(fd)
        far_lifeline.send(sandboxes.DEAD)
        made.destroy()


def test_calls_that_can_not_be_driven_to_their_ends_are_lost_and_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(output: Output, chunk: bytes) -> None:
        raise MemoryError

    with contextlib.ExitStack() as stack:
        made, control, far_lifeline = new_cell(stack)
        far: list[dict[str, int]] = []
        jobs = []
        ends: list[bool] = []
        for _ in range(2):
            call = made.shell(b"true", None)
            message, fds = linux.receive(control, 65536, 8)
            far.append(dict(zip(json.loads(message)["fds"], fds)))
            jobs.append(Job(call, time.monotonic() + 60, 50, 50, lambda: ends.append(True)))
        driver = Driver(jobs)
        monkeypatch.setattr(Output, "add", fail)
        os.write(far[0]["stdout"], b"too much")
        with pytest.raises(MemoryError):
            driver.run()
        assert driver.ended
        assert ends == [True, True]
        assert all(job.outcome.lost and job.call.sock.fileno() < 0 for job in jobs)
        for fd in (*far[0].values(), *far[1].values()):
            os.close(fd)
        far_lifeline.send(sandboxes.DEAD)
        made.destroy()


@FEW
@given(data=st.binary(max_size=100), limit=LIMITS, cuts=st.lists(st.integers(0, 100), max_size=10))
def test_however_it_comes_in_chunks_the_result_is_the_same(data: bytes, limit: int, cuts: list[int]) -> None:
    whole, pieces = fed(limit, [data]), fed(limit, split(data, cuts))
    assert b"".join(split(data, cuts)) == data
    assert pieces.text() == whole.text()
    assert pieces.kept() == whole.kept()
    assert pieces.truncated == whole.truncated


@FEW
@given(data=st.binary(max_size=100), limit=LIMITS, cuts=st.lists(st.integers(0, 100), max_size=10))
def test_what_is_kept_is_the_beginning_and_the_end_and_never_more_than_the_limit(
    data: bytes, limit: int, cuts: list[int]
) -> None:
    output = Output(limit)
    so_far = b""
    for chunk in split(data, cuts):
        output.add(chunk)
        so_far += chunk
        half = limit // 2
        expected = so_far if len(so_far) <= limit else so_far[:half] + so_far[len(so_far) - (limit - half) :]
        assert output.kept() == expected
        assert output.truncated == (len(so_far) > limit)


@FEW
@given(
    text=st.text(alphabet="a\u00e9\u20ac\U0001f600\n", max_size=40),
    limit=LIMITS,
    cuts=st.lists(st.integers(0, 100), max_size=5),
)
def test_truncation_cuts_at_the_boundaries_of_characters(text: str, limit: int, cuts: list[int]) -> None:
    output = fed(limit, split(text.encode(), cuts))
    if not output.truncated:
        assert output.text() == text
        return
    parts = GAP.split(output.text())
    assert len(parts) == 3
    head, _, tail = parts
    assert text.startswith(head)
    assert text.endswith(tail)
    assert len(head.encode()) > limit // 2 - 4
    assert len(tail.encode()) > limit - limit // 2 - 4


@FEW
@given(text=st.text(alphabet="a\u00e9\u20ac\U0001f600", max_size=40), limit=LIMITS)
def test_the_line_between_counts_every_byte_that_is_not_there(text: str, limit: int) -> None:
    output = fed(limit, [text.encode()])
    if output.truncated:
        head, count, tail = GAP.split(output.text())
        assert int(count) == len(text.encode()) - len(head.encode()) - len(tail.encode())


def test_memory_is_bounded_by_the_limit_however_much_comes() -> None:
    chunk = b"y\n" * 32_768
    tracemalloc.start()
    try:
        output = fed(10_000, (chunk for _ in range(1000)))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(output.kept()) == 10_000
    assert peak < 1_000_000
