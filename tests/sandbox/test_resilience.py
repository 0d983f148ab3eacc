"""What once brought a whole server down, or a slot into another's hands."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import MODES, PACKAGE, SESSION, StartServer, wait_until, why_not

from slotpool import SlotPool
from slotpool.errors import FileError, LeaseLost, StartFailed
from slotpool.sandbox.cell import Cell
from slotpool.sandbox.isolation import Isolation, Limits, Place
from slotpool.sandbox.nursery_process import NurseryProcess
from slotpool.sandbox.protocol import Lease, RequestFailed
from slotpool.sandbox.tenancies import HostConfig, TenancyMaker


def test_a_user_in_use_is_never_given_to_another_slot() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root has users to give")
    from slotpool.sandbox.users import BLOCK, UserBlock

    users = UserBlock()
    try:
        held = users.take()
        for _ in range(2 * BLOCK):
            other = users.take()
            assert other != held
            users.give_back(other)
        second = UserBlock()
        assert second.first != users.first
        second.close()
    finally:
        users.close()


def test_a_directory_given_for_workspaces_keeps_what_is_in_it_and_its_mode(start_server: StartServer) -> None:
    directory = Path(SESSION) / "given"
    (directory / "precious").mkdir(parents=True)
    (directory / "precious" / "lock").write_text("not slotpool's")
    directory.chmod(0o1777)
    server = start_server("bwrap", slots=1, state_dir=str(directory))
    server.stop()
    assert (directory / "precious" / "lock").read_text() == "not slotpool's"
    assert directory.stat().st_mode & 0o7777 == 0o1777
    assert [path.name for path in directory.iterdir()] == ["precious"]


def test_a_server_ends_whichever_of_its_threads_is_given_the_signal(start_server: StartServer) -> None:
    server = start_server("none", slots=1)
    server.lease()
    pid = server.process.pid
    libc = ctypes.CDLL(None, use_errno=True)
    other = next(int(name) for name in os.listdir(f"/proc/{pid}/task") if int(name) != pid)
    assert libc.tgkill(pid, other, signal.SIGTERM) == 0
    assert server.process.wait(30) == 0


def test_a_path_too_long_for_a_socket_is_told(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match="too long"):
        SlotPool(state_dir=str(tmp_path / ("d" * 100))).start()


def test_many_calls_in_one_slot_all_have_their_results(pool: SlotPool) -> None:
    with pool.slot() as s:
        calls: Any = [(s, "bash", {"command": f"echo {i}"}) for i in range(80)]
        assert [result.stdout for result in pool.execute_batch(calls)] == [f"{i}\n" for i in range(80)]


def test_a_slot_is_made_also_if_no_shell_can_be_started_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def send(cell: Cell, message: bytes, fds: Sequence[int]) -> None:
        raise OSError(errno.ETOOMANYREFS, os.strerror(errno.ETOOMANYREFS))

    monkeypatch.setattr(Cell, "send", send)
    maker = TenancyMaker(HostConfig(slots=1, isolation="none"), NurseryProcess())
    try:
        tenancy = maker.make(network=True)
        assert tenancy.cell.armed == 0
        maker.end(tenancy)
        assert wait_until(lambda: not os.path.exists(tenancy.place.directory))
    finally:
        maker.close()


@pytest.mark.parametrize("may_have_run", [True, False])
def test_a_slot_whose_processes_can_not_be_killed_is_not_said_to_be_mended(
    monkeypatch: pytest.MonkeyPatch, may_have_run: bool
) -> None:
    maker = TenancyMaker(HostConfig(slots=1, isolation="none"), NurseryProcess())
    try:
        tenancy = maker.make(network=True)
        with monkeypatch.context() as patched:
            patched.setattr(Cell, "destroy", lambda _: False)
            with pytest.raises(RequestFailed, match="could not be killed") as failed:
                maker.mend(tenancy, tenancy.cell, may_have_run)
        assert (failed.value.body["code"], failed.value.body["may_have_run"]) == ("slot_broken", may_have_run)
        maker.end(tenancy)
    finally:
        maker.close()


def test_a_stopped_zygote_is_replaced_and_holds_nobody_up(start_server: StartServer) -> None:
    server = start_server("user", slots=2)
    one, other = server.lease(2)
    result = server.bash(one, "kill -STOP -1; sleep 1012", timeout=1.0)
    assert result["timed_out"]
    assert result["restarted"]
    assert server.bash(one, "echo well")["stdout"] == "well\n"
    assert server.bash(other, "echo well")["stdout"] == "well\n"


def test_a_stopped_zygote_does_not_hold_up_a_file(start_server: StartServer) -> None:
    server = start_server("user", slots=1, file_patience=0.5)
    (lease,) = server.lease()
    server.client.write_file(lease["slot"], lease["token"], "f", b"text")
    server.bash(lease, "(sleep 0.2; kill -STOP -1) >/dev/null 2>&1 &")

    def read_until_it_is_stopped() -> None:
        while True:
            server.client.read_file(lease["slot"], lease["token"], "f")

    with pytest.raises(FileError, match="it took too long"):
        read_until_it_is_stopped()
    assert server.client.read_file(lease["slot"], lease["token"], "f") == b"text"


@pytest.mark.filterwarnings("ignore::slotpool.security.SecurityWarning")
def test_a_container_whose_slots_cannot_be_cleaned_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can make a file that root can't remove")
    with SlotPool(isolation="none", slots_per_container=1, max_containers=1, health_check_interval=0.1) as pool:
        with pool.slot() as s:
            state = Path(s.workspace_dir).parents[2]
            first = s.alloc_id
            assert s.bash("touch f && chattr +i f").exit_code == 0
        try:
            with pool.slot(timeout=60) as s:
                assert s.alloc_id != first
                assert s.bash("ls -A").stdout == ""
        finally:
            (stuck,) = state.rglob("f")  # wherever it was moved to
            subprocess.run(["chattr", "-i", str(stuck)], check=True)
            shutil.rmtree(state)
    assert "1 of its 1 slots could not be made clean" in caplog.text


def test_a_slot_that_reads_its_own_output_does_not_hang_the_server(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    thief = "exec 9</proc/self/fd/1; (while :; do head -c 1 <&9; done) >/dev/null 2>&1 & while :; do echo x; done"
    for _ in range(3):
        result = server.bash(lease, thief, timeout=0.3)
        assert result["timed_out"]


def test_more_connections_than_select_can_watch(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    socks = []
    try:
        for _ in range(1100):
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(server.address[len("unix://") :])
            socks.append(sock)
        assert server.bash(lease, "echo well")["stdout"] == "well\n"
    finally:
        for sock in socks:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert server.bash(lease, "echo well")["stdout"] == "well\n"


def test_held_requests_leave_room_for_renewals(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease(ttl=5.0)
    held = "echo >>begun; until [ -e end ]; do sleep 0.05; done"
    threads = [threading.Thread(target=server.bash, args=(lease, held, 60.0)) for _ in range(40)]
    for thread in threads:
        thread.start()
    assert wait_until(lambda: server.bash(lease, "wc -l <begun")["stdout"] == "40\n", 30)
    assert server.client.renew([lease["token"]])["lost"] == []
    server.bash(lease, "touch end")
    for thread in threads:
        thread.join()


def test_reset_and_release_at_once_leave_a_usable_slot(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    both = threading.Barrier(2)

    def reset(lease: Lease) -> None:
        both.wait()
        with contextlib.suppress(LeaseLost):
            server.client.reset(lease["slot"], lease["token"])

    def release(lease: Lease) -> None:
        both.wait()
        server.client.lease("test", 30.0, 0, [lease["token"]])

    (lease,) = server.lease()
    with ThreadPoolExecutor(2) as threads:
        for _ in range(5):
            assert server.bash(lease, "mkdir d; cd d; touch {1..2000}")["exit_code"] == 0
            for act in [threads.submit(reset, lease), threads.submit(release, lease)]:
                act.result()
            (lease,) = server.lease()
            assert server.bash(lease, "ls -A; echo well")["stdout"] == "well\n"


def test_the_callers_directory_umask_and_signal_mask_do_no_harm(tmp_path: Path) -> None:
    (tmp_path / "attr.py").write_text("raise SystemExit('not the library')")
    script = (
        "import os, signal\n"
        "os.umask(0o077)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGCHLD, signal.SIGINT])\n"
        "from slotpool import SlotPool\n"
        "with SlotPool(slots_per_container=1, max_containers=1) as pool:\n"
        "    for _ in range(3):\n"
        "        with pool.slot() as s: print(s.bash('touch f; ls').stdout.strip())\n"
    )
    environment = {**os.environ, "PYTHONPATH": PACKAGE}
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.append({PACKAGE!r})\n{script}"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("f\nf\nf\n", "")


@pytest.mark.parametrize("mode", ["bwrap", "user", "none"])
def test_a_caller_that_ignores_the_ends_of_its_children_does_no_harm(mode: str) -> None:
    if why_not(mode):
        pytest.skip(why_not(mode))
    script = (
        f"import sys; sys.path.append({PACKAGE!r})\n"
        "import signal\n"
        "signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "from slotpool import SlotPool\n"
        f"with SlotPool(isolation={mode!r}, slots_per_container=1, max_containers=1) as pool:\n"
        "    for _ in range(2):\n"
        "        with pool.slot() as s: print(s.bash('exit 3', timeout=10).exit_code)\n"
    )
    command = [sys.executable, "-I", "-W", "ignore", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("3\n3\n", "")


def test_a_forked_child_that_lives_on_does_not_hold_up_stop() -> None:
    pool = SlotPool(slots_per_container=1, max_containers=1).start()
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    try:
        (server,) = pool._fleet._servers.values()  # type: ignore[attr-defined]
        pool.stop()
        assert server._process.returncode == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_background_process_that_has_ended_is_gone_for_later_commands(start_server: StartServer, mode: str) -> None:
    server = start_server(mode, slots=1)
    (lease,) = server.lease()
    server.bash(lease, "sleep 1013 & echo $! >pid")
    result = server.bash(lease, "kill $(<pid); while kill -0 $(<pid); do :; done 2>&-; echo gone", timeout=5.0)
    assert result["stdout"] == "gone\n"


def test_slots_that_are_given_back_together_are_all_made_clean(start_server: StartServer) -> None:
    server = start_server("none", slots=8)
    for _ in range(10):
        leases = server.lease(8)
        for lease in leases:
            assert server.bash(lease, "ls -A; touch file; ls")["stdout"] == "file\n"
        server.client.lease("test", 30.0, 0, [lease["token"] for lease in leases])


MAKER = """
import json, os, signal, sys
from slotpool.sandbox import confine
stdin, stdout, *info = map(int, sys.argv[2:])
pid = os.fork()
if not pid:
    confine.exec_bwrap(json.loads(sys.argv[1]), stdin, stdout, info)
print(pid, flush=True)
signal.pause()
"""


def test_a_sandbox_whose_makers_die_while_it_starts_ends_by_itself(tmp_path: Path) -> None:
    """Bubblewrap is held where it tells of the sandbox's first process, which waits for it then, by a pipe that is full."""
    if why_not("bwrap"):
        pytest.skip(why_not("bwrap"))
    isolation = Isolation("bwrap", 0, False, Limits(100, None, {}), ())
    place = Place(str(tmp_path), (), os.geteuid(), os.getegid(), -1, False)
    os.mkdir(place.workspace)
    (stdin, hold), (out, stdout), (told, tell) = os.pipe(), os.pipe(), os.pipe()
    os.set_blocking(tell, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(tell, bytes(4096))
    os.set_blocking(tell, True)
    given = (stdin, stdout, told, tell)
    maker = subprocess.Popen(
        [sys.executable, "-c", MAKER, json.dumps(isolation.order(place)), *map(str, given)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": PACKAGE},
        pass_fds=given,
    )
    assert maker.stdout is not None
    with maker, maker.stdout:
        bwrap = int(maker.stdout.readline())
        for fd in (stdin, stdout, tell):
            os.close(fd)
        assert wait_until(lambda: "pipe_write" in Path(f"/proc/{bwrap}/wchan").read_text())
        first = int(Path(f"/proc/{bwrap}/task/{bwrap}/children").read_text())
        maker.kill()
        maker.wait()
    os.close(hold)
    os.read(told, 1 << 20)
    ended = select.poll()
    ended.register(out, select.POLLIN)
    try:
        assert [event for _, event in ended.poll(10_000)] == [select.POLLHUP]
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)
        os.close(out)
        os.close(told)
