"""``%%slot`` and what shows while a pool starts, in a real Jupyter kernel."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import OURS, PACKAGE, sleepers, wait_until
from notebooks import Notebook, text_of


@pytest.fixture(scope="module")
def notebook(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Notebook]:
    """One for all tests here, with a pool of two slots. Each test has cells and variables of its own."""
    with Notebook().running(tmp_path_factory.mktemp("kernel")) as notebook:
        notebook.run("import os\nfrom slotpool import SlotPool\n%load_ext slotpool")
        notebook.run("pool = SlotPool(slots_per_container=2, max_containers=1).start()")
        yield notebook
        assert text_of(notebook.run("pool.stop()\n%unload_ext slotpool")) == ""


def test_a_cell_runs_in_a_slot_that_is_kept(notebook: Notebook) -> None:
    (shown,) = notebook.run("%%slot pool --new\necho kept > file; echo '<b>bold</b>'; echo err >&2; exit 3")
    page = shown.data["text/html"]
    assert "exit code 3" in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>bold" not in page
    assert page.index("stdout") < page.index("bold") < page.index("stderr") < page.index("err\n")
    assert notebook.run("%%slot pool --out kept\ncat file") == []
    assert text_of(notebook.run("print(kept.stdout, kept.exit_code, pool.acquired_slots)")) == "kept\n 0 1\n"
    assert text_of(notebook.run("s = %slot pool\nprint(s.read_file('file'))")) == "kept\n\n"
    notebook.run("%%slot pool --new --out clean\nls -A")
    assert text_of(notebook.run("print(repr(clean.stdout), pool.acquired_slots)")) == "'' 1\n"


def test_a_cell_runs_in_the_slot_that_it_is_given(notebook: Notebook) -> None:
    notebook.run("mine = pool.acquire(timeout=30)\nmine.write_file('whose', 'mine')")
    notebook.run("%%slot mine --out whose\ncat whose")
    assert text_of(notebook.run("print(whose.stdout)\nmine.release()")) == "mine\n"
    (lost,) = notebook.run("%%slot mine\ncat whose")
    assert lost.ename == "LeaseLost"


def test_options_are_checked(notebook: Notebook) -> None:
    notebook.run("some = pool.acquire(timeout=30)\n%slot pool --new --no-network")
    for line, said in (
        ("nothing", "UsageError: expected a variable with a SlotPool or a Slot, got nothing, which is None"),
        ("some --new", "UsageError: --new, --network: expected a pool"),
        ("pool --network", "UsageError: --network: the slot that is kept has no network"),
        ("pool --out a.b", "UsageError: --out: expected a variable's name, got 'a.b'"),
        ("pool --timeout -1", "InvalidRequest: timeout: "),
        ("pool --check", "CommandFailed: the command exited with 4: oops"),
    ):
        assert said in text_of(notebook.run(f"%%slot {line}\necho oops >&2; exit 4")), line
    notebook.run("some.release()")
    (shown,) = notebook.run("%%slot pool --timeout 0.2\nsleep 100")
    assert "timed out" in shown.data["text/html"]


def test_a_slot_with_network_is_taken_where_it_is_asked_for(notebook: Notebook) -> None:
    if "bwrap" not in text_of(notebook.run("print(pool.get_stats()['isolation'])")):
        pytest.skip("without bubblewrap every slot has network")
    for option, has_network in (("", False), (" --network", True), (" --no-network", False)):
        notebook.run(f"%%slot pool --new --out where{option}\nreadlink /proc/self/ns/net")
        shown = text_of(notebook.run("print(where.stdout.strip(), where.metadata['network'])"))
        namespace, told = shown.split()
        assert (namespace == os.readlink("/proc/self/ns/net"), told) == (has_network, str(has_network)), option
        assert notebook.run(f"%%slot pool --out again{option}\nls") == [], "the slot that is kept is as it was asked for"


def test_interrupting_the_kernel_ends_the_command_and_keeps_the_slot(notebook: Notebook) -> None:
    notebook.run("%%slot pool --new --out _\ntouch file")

    def interrupt() -> None:
        assert wait_until(lambda: sleepers("1021"), 30)
        notebook.interrupt()

    thread = threading.Thread(target=interrupt)
    thread.start()
    (error,) = notebook.run(f"%%slot pool --timeout 2000\nsleep 1021{OURS}")
    thread.join()
    assert error.ename == "KeyboardInterrupt"
    notebook.run("%%slot pool --out after\nls; pgrep -c sleep")
    assert text_of(notebook.run("print(after.stdout)")) == "file\n0\n\n"


def test_what_the_line_gives_is_no_lost_slot(notebook: Notebook) -> None:
    notebook.run("s = %slot pool")
    notebook.run("s._tenure.container.client.lease('somebody else', 30, 0, [s._tenure.token])")
    (lost,) = notebook.run("s.bash('true')")
    assert lost.ename == "LeaseLost"
    (said,) = notebook.run("s = %slot pool\nprint(s.bash('echo well').stdout)")
    assert said.text == "well\n\n"


def test_a_lost_slot_is_told_of_before_another_takes_its_place(notebook: Notebook) -> None:
    notebook.run("losing = %slot pool --new\nlosing.write_file('file', '')")
    ended = notebook.run("for c in pool._supply.containers.values(): c.client.lease('x', 30, 0, [losing._tenure.token])")
    assert ended == []
    (lost,) = notebook.run("%%slot pool\nls")
    assert lost.ename == "LeaseLost"
    notebook.run("%%slot pool --out again\nls")
    assert text_of(notebook.run("print(repr(again.stdout), again.exit_code)")) == "'' 0\n"


def hold_up_servers(directory: Path) -> Path:
    """Have a server that is started with ``directory`` on its PYTHONPATH wait until somebody writes to what is returned."""
    gate = directory / "gate"
    os.mkfifo(gate)
    (directory / "sitecustomize.py").write_text(  # which Python runs before anything else
        f"if b'slotpool.sandbox' in open('/proc/self/cmdline', 'rb').read().split(bytes(1)): open({str(gate)!r}).close()\n"
    )
    return gate


def test_a_line_is_shown_at_a_terminal_while_containers_start(tmp_path: Path) -> None:
    gate = hold_up_servers(tmp_path)
    script = "from slotpool import SlotPool\nwith SlotPool(slots_per_container=1, max_containers=1): print('started')"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{PACKAGE}", "COLUMNS": "40"}
    ours, theirs = pty.openpty()
    with subprocess.Popen([sys.executable, "-c", script], stdout=theirs, stderr=theirs, env=environment, cwd="/") as process:
        os.close(theirs)
        shown = b""
        while b"\x1b[K" not in shown:
            shown += os.read(ours, 65536)
        gate.open("w").close()
        try:
            while more := os.read(ours, 65536):
                shown += more
        except OSError:  # the other end is closed
            pass
        assert process.wait(60) == 0
    os.close(ours)
    before, *lines, after = shown.split(b"\x1b[K")
    assert before == b"\rstarting containers: 0 of 1 (0 local se"  # cut to the terminal's width
    assert all(line.startswith(b"\r") for line in lines)
    assert (lines[-1], after) == (b"\r", b"started\r\n")


def test_a_line_is_shown_in_a_notebook_while_containers_start(notebook: Notebook, tmp_path: Path) -> None:
    gate = hold_up_servers(tmp_path)
    shown: list[str] = []

    def look() -> str:
        shown.append(text_of(notebook.outputs()))
        return shown[-1] if "starting" in shown[-1] else ""

    def let_go() -> None:
        wait_until(look, 30)
        gate.open("w").close()

    thread = threading.Thread(target=let_go)
    thread.start()
    outputs = notebook.run(
        "os.environ['PYTHONPATH'] = " + repr(f"{tmp_path}:") + " + os.environ['PYTHONPATH']\n"
        "with SlotPool(slots_per_container=1, max_containers=1) as late:\n    print('started')\n"
        "os.environ['PYTHONPATH'] = os.environ['PYTHONPATH'].partition(':')[2]"
    )
    thread.join()
    assert "starting containers: 0 of 1 (0 local server(s) ready, 1 starting); " in shown[-1]
    assert text_of(outputs) == "\nstarted\n"  # and it is gone
