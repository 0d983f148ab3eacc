"""Ctrl-C: the command ends, the slot comes back clean; in a script and in a Jupyter cell."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import OURS, PACKAGE, sleepers, wait_until

from slotpool import Slot, SlotPool
from slotpool.errors import PoolClosed
from slotpool.fleet.local import LocalFleet


def test_ctrl_c_in_a_script_ends_the_command_and_gives_the_slot_back() -> None:
    script = (
        "import time\n"
        "from slotpool import SlotPool\n"
        "with SlotPool(slots_per_container=1, max_containers=1) as pool:\n"
        "    try:\n"
        "        with pool.slot() as s:\n"
        "            print('ready', flush=True)\n"
        f"            s.bash('touch f; sleep 1010{OURS}', timeout=2000)\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted', flush=True)\n"
        "    with pool.slot(timeout=30) as s:\n"
        "        print(s.bash('ls -A; pgrep -c sleep').stdout, flush=True)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": PACKAGE},
        cwd="/",
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    assert wait_until(lambda: sleepers("1010"))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == (b"interrupted\n0\n\n", b"", 0)


def test_ctrl_c_while_waiting_for_a_slot_leaves_the_line() -> None:
    with SlotPool(slots_per_container=1, max_containers=1) as pool:
        held = pool.acquire()

        def interrupt() -> None:
            assert wait_until(lambda: pool.get_stats()["requests_waiting"] == 1)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            pool.acquire(timeout=100)
        thread.join()
        assert pool.get_stats()["requests_waiting"] == 0
        held.release()
        pool.acquire(timeout=30).release()


def test_interrupting_a_jupyter_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    monkeypatch.setenv("PYTHONPATH", PACKAGE)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path))
    cells = [
        "from slotpool import SlotPool\npool = SlotPool(slots_per_container=1, max_containers=1).start()",
        f"with pool.slot() as s:\n    s.bash('touch f; sleep 1011{OURS}', timeout=2000)",
        "with pool.slot(timeout=30) as s:\n    print(s.bash('ls -A; pgrep -c sleep; echo well').stdout)",
        "pool.stop()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(notebook, timeout=60, allow_errors=True, kernel_name="python3")

    async def run() -> None:
        async with client.async_setup_kernel():
            await client.async_execute_cell(notebook.cells[0], 0)
            running = asyncio.ensure_future(client.async_execute_cell(notebook.cells[1], 1))
            deadline = time.monotonic() + 30
            while not sleepers("1011"):
                assert time.monotonic() < deadline, "the command did not start"
                await asyncio.sleep(0.05)
            await client.km.interrupt_kernel()
            await running
            await client.async_execute_cell(notebook.cells[2], 2)
            await client.async_execute_cell(notebook.cells[3], 3)

    asyncio.run(run())
    assert [out.ename for out in notebook.cells[1].outputs] == ["KeyboardInterrupt"]
    assert notebook.cells[2].outputs[0].text == "0\nwell\n\n"
    assert notebook.cells[3].outputs == []


def test_ctrl_c_during_a_batch_in_two_containers_ends_all_of_it() -> None:
    with SlotPool(slots_per_container=1, max_containers=2) as pool:
        slots = [pool.acquire(timeout=60) for _ in range(2)]
        assert len({s.alloc_id for s in slots}) == 2

        def interrupt() -> None:
            assert wait_until(lambda: sleepers("1014") == 2)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            pool.execute_batch([(s, "bash", {"command": f"sleep 1014{OURS}"}) for s in slots], timeout=2000)
        thread.join()
        assert [s.bash("pgrep -c sleep").stdout for s in slots] == ["0\n", "0\n"]


def test_what_was_interrupted_has_ended_before_the_next_command_begins(pool: SlotPool) -> None:
    """It has so many processes that their end takes a while."""
    slot = pool.acquire()
    command = "for i in {1..200}; do sleep 1016 & done; touch begun; wait"
    for run in (
        lambda: slot.bash(command, timeout=2000),
        lambda: pool.execute_batch([(slot, "bash", {"command": command})] * 2, timeout=2000),
    ):

        def interrupt() -> None:
            assert wait_until(lambda: slot.bash("rm begun").success)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run()
        assert slot.bash("pgrep -c sleep").stdout == "0\n"
        thread.join()


def test_a_stop_that_was_interrupted_can_be_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = LocalFleet.stop

    def interrupted(fleet: LocalFleet, purge: bool) -> None:
        monkeypatch.setattr(LocalFleet, "stop", stop)
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalFleet, "stop", interrupted)
    pool = SlotPool(slots_per_container=1).start()
    with pytest.raises(KeyboardInterrupt):
        pool.stop()
    pool.stop()
    with pytest.raises(PoolClosed):
        pool.acquire()


def interrupt_release(s: Slot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Amid it."""
    supply = s._pool._supply
    give_back = supply.give_back

    def interrupted(*args: object, **more: object) -> None:
        monkeypatch.setattr(supply, "give_back", give_back)
        raise KeyboardInterrupt

    monkeypatch.setattr(supply, "give_back", interrupted)
    with pytest.raises(KeyboardInterrupt):
        s.release()


def test_a_release_that_was_interrupted_can_be_repeated(pool: SlotPool, monkeypatch: pytest.MonkeyPatch) -> None:
    s = pool.acquire()
    interrupt_release(s, monkeypatch)
    assert pool.acquired_slots == 1
    s.release()
    assert pool.acquired_slots == 0


def test_a_slot_is_given_back_that_is_dropped_amid_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    with SlotPool(slots_per_container=1, max_containers=1, health_check_interval=0.05) as pool:
        s = pool.acquire()
        interrupt_release(s, monkeypatch)
        del s
        gc.collect()  # what was raised has it too
        with pool.slot(timeout=20) as s:
            assert s.bash("echo well").stdout == "well\n"


def test_a_lease_that_an_interrupt_left_with_nobody_is_given_back() -> None:
    with SlotPool(slots_per_container=1, max_containers=1, prefetch=0, health_check_interval=0.05) as pool:
        s = pool.acquire()
        with pool._supply.lock:
            pool._supply.held.clear()  # as if the interrupt had come between taking it from one place and putting it in another
        del s
        with pool.slot(timeout=20) as s:
            assert s.bash("echo well").stdout == "well\n"
