"""``slotpool top`` and ``slotpool.top.watch``."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import PACKAGE, wait_until

from slotpool import SlotPool
from slotpool.top import watch

TOKEN = "SLOTPOOL_TEST_top_token"
ENV = {**os.environ, "PYTHONPATH": PACKAGE, "SLOTPOOL_TOKEN": TOKEN, "TERM": "xterm", "COLUMNS": "160", "LINES": "40"}
TOP = [sys.executable, "-m", "slotpool", "top"]


@pytest.fixture
def address() -> Iterator[str]:
    command = [sys.executable, "-m", "slotpool", "serve", "--port", "0", "--slots", "3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENV, cwd="/") as server:
        assert server.stdout is not None
        yield server.stdout.readline().decode().strip()
        server.terminate()


def test_once_shows_servers_and_those_that_do_not_answer(address: str) -> None:
    with SlotPool(servers=address, token=TOKEN) as pool, pool.slot() as s:
        s.bash("true")
        command = [*TOP, "--once", "--server", address, "--server", "http://127.0.0.1:1"]
        done = subprocess.run(command, env=ENV, capture_output=True, text=True, cwd="/", check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert address in done.stdout
    assert "/3" in done.stdout
    assert "127.0.0.1:1" in done.stdout
    assert "no answer" in done.stdout
    assert done.stdout.index("2 containers") < done.stdout.index(address)  # however many there are
    assert TOKEN not in done.stdout


def test_leases_that_are_waited_for_are_shown(address: str) -> None:
    command = [*TOP, "--once", "--server", address]
    pools = [SlotPool(servers=address, token=TOKEN) for _ in range(2)]
    with pools[0] as pool, pools[1] as other, ThreadPoolExecutor() as callers:
        held = [pool.acquire() for _ in range(3)]
        late = callers.submit(other.acquire)

        def shown() -> str:
            table = subprocess.run(command, env=ENV, capture_output=True, text=True, cwd="/", check=True).stdout
            heading = next(line for line in table.splitlines() if "waiting" in line)
            row = next(line for line in table.splitlines() if address in line)
            column = [word.strip() for word in heading.replace("┃", "│").split("│")].index("waiting")
            return row.split("│")[column].strip()

        assert wait_until(lambda: shown() == "1")  # between two of its requests it is 0
        held.pop().release()
        for slot in [*held, late.result()]:
            slot.release()


@pytest.mark.parametrize("how", ["Ctrl-C", "q"])
def test_a_live_view_ends_cleanly(address: str, how: str) -> None:
    ours, theirs = pty.openpty()
    command = [*TOP, "--interval", "0.1", "--server", address]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=ENV, cwd="/") as top:
        os.close(theirs)
        shown = b""
        while shown.count(b"total") < 3:
            shown += os.read(ours, 65536)
        if how == "q":
            os.write(ours, b"q")
        else:
            top.send_signal(signal.SIGINT)
        try:
            while more := os.read(ours, 65536):
                shown += more
        except OSError:  # the other end is closed
            pass
        assert top.wait(30) == 0
    os.close(ours)
    assert b"Traceback" not in shown
    assert TOKEN.encode() not in shown


def test_what_can_not_be_shown_is_said() -> None:
    for words, said in (
        ([], "--server: expected either servers or --nomad, got neither"),
        (["--server", "http://127.0.0.1:1", "--interval", "nan"], "--interval"),
    ):
        done = subprocess.run([*TOP, *words], env=ENV, capture_output=True, text=True, cwd="/", check=False)
        assert done.returncode == 125
        assert said in done.stderr
    code = (
        "import sys; sys.modules['rich'] = None; from slotpool.cli import main; main(['top', '--server', 'http://127.0.0.1:1'])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 125
    assert "pip install 'slotpool[cli]'" in done.stderr


def test_a_pool_is_watched_while_a_block_runs(pool: SlotPool, capfd: pytest.CaptureFixture[str]) -> None:
    with watch(pool, 0.05), pool.slot() as s:
        s.bash("true")
    assert "callers wait" in capfd.readouterr().err
