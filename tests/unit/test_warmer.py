"""When the next shell is started, and when one dies: by how close commands come."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import types
from collections.abc import Iterator

import attr
import pytest
from cells import new_cell

from slotpool.sandbox import cell, linux, sandboxes, zygote
from slotpool.sandbox.cell import Cell
from slotpool.sandbox.warmer import Warmer


@attr.s(auto_attribs=True)
class Sandbox:
    """A cell, the far end of its control socket, and the clock that it looks at."""

    cell: Cell
    control: socket.socket
    clock: types.SimpleNamespace

    def run(self, waits: bool = True) -> bytes:
        """What the shell of a command hears.

        :param waits: one is started before the command comes, and no other waits then.
        """
        if waits:
            self.cell.arm()
        call = self.cell.shell(b"true", None)
        with self.ordered() as fds:
            heard = os.read(fds["script"], 65536)
        call.close()
        return heard

    @contextlib.contextmanager
    def ordered(self) -> Iterator[dict[str, int]]:
        """The descriptors of the shell that was ordered first."""
        message, fds = linux.receive(self.control, 65536, 8)
        try:
            yield dict(zip(json.loads(message)["fds"], fds))
        finally:
            for fd in fds:
                os.close(fd)


@pytest.fixture
def sandbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    now = [1000.0]
    clock = types.SimpleNamespace(now=now, monotonic=lambda: now[0])
    monkeypatch.setattr(cell, "time", clock)
    with contextlib.ExitStack() as stack:
        made, control, far_lifeline = new_cell(stack)
        control.settimeout(20)
        yield Sandbox(made, control, clock)
        far_lifeline.send(sandboxes.DEAD)
        made.destroy()


@pytest.fixture
def warmer() -> Iterator[Warmer]:
    made = Warmer()
    yield made
    made.stop()


def test_a_shell_dies_as_its_command_ends_if_that_has_found_none_waiting(sandbox: Sandbox) -> None:
    sandbox.cell.answered()
    assert sandbox.run() == zygote.framed(b"true")
    assert sandbox.run(waits=False) == zygote.framed(b"true") + zygote.GO


CLOSE_OR_APART = pytest.mark.parametrize(("pause", "close"), [(0.0, True), (0.0019, True), (0.0021, False), (60.0, False)])


@CLOSE_OR_APART
def test_once_one_has_found_none_it_goes_by_how_close_a_command_comes(sandbox: Sandbox, pause: float, close: bool) -> None:
    sandbox.run(waits=False)
    sandbox.cell.answered()
    sandbox.clock.now[0] += pause
    assert sandbox.run() == zygote.framed(b"true") + (zygote.GO if close else b"")


@CLOSE_OR_APART
def test_the_next_shell_is_started_during_a_command_that_comes_close(
    sandbox: Sandbox, warmer: Warmer, pause: float, close: bool
) -> None:
    sandbox.run(waits=False)
    sandbox.cell.answered()
    sandbox.clock.now[0] += pause
    sandbox.run()
    warmer.begun(sandbox.cell)
    warmer.stop()  # it does first what it was left
    assert sandbox.cell.armed == close
    if close:
        with sandbox.ordered() as fds:
            assert "script" in fds


def test_after_an_answer_the_next_shell_is_started_whatever_comes(sandbox: Sandbox, warmer: Warmer) -> None:
    sandbox.run()
    warmer.begun(sandbox.cell)
    warmer.answered(sandbox.cell, None)
    warmer.stop()
    assert sandbox.cell.armed == 1
    with sandbox.ordered() as fds:
        assert "script" in fds
