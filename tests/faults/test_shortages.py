"""A server that is short of something says so, goes on, and is well again when there is enough."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from arena import PYTHON
from conftest import PACKAGE, ROOT, StartServer, describe_slots

from slotpool.errors import ContainerLost, FileError, SlotPoolError
from slotpool.sandbox import cgroups, trees, users
from slotpool.sandbox.client import SandboxClient
from slotpool.sandbox.nursery_process import NurseryProcess
from slotpool.sandbox.tenancies import HostConfig, TenancyMaker


@pytest.fixture
def small_disk() -> Iterator[str]:
    if not ROOT:
        pytest.skip("only root can mount a small disk")
    directory = tempfile.mkdtemp(prefix="faults-")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0711", "faults", directory], check=True)
    yield directory
    subprocess.run(["umount", directory], check=True)
    os.rmdir(directory)


def test_a_slot_that_a_full_disk_has_put_into_quarantine_comes_back(small_disk: str, start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1, state_dir=small_disk, quarantine=0.5)
    subprocess.run(["mount", "-o", "remount,nr_inodes=1000", small_disk], check=True)
    fillers = Path(small_disk, "fillers")
    fillers.mkdir()
    for number in itertools.count():
        try:
            fillers.joinpath(str(number)).touch()
        except OSError:
            counts = server.client.health()["counts"]
            if counts["quarantined"]:
                break
            if counts["free"]:  # it was made ready in advance, or the disk was not full just then
                server.client.lease("test", 30, 0, [lease["token"] for lease in server.lease()])
    assert describe_slots(server.client)[0]["why"]
    shutil.rmtree(fillers)
    (lease,) = server.lease()
    assert server.bash(lease, "echo well")["stdout"] == "well\n"


@pytest.mark.parametrize("mode", ["bwrap", "user"])
def test_a_disk_that_a_slot_fills_is_told_to_all_and_free_again_when_it_is_given_back(
    small_disk: str, start_server: StartServer, mode: str
) -> None:
    server = start_server(mode, slots=2, state_dir=small_disk)
    filler, other = server.lease(2)
    server.client.write_file(other["slot"], other["token"], "file", b"whole")
    assert "No space left" in server.bash(filler, "cat /dev/zero >filler")["stderr"]
    with pytest.raises(FileError, match="No space left"):
        server.client.write_file(other["slot"], other["token"], "file", b"x" * 100_000)
    assert server.client.read_file(other["slot"], other["token"], "file") == b"whole"
    assert server.bash(other, "ls -A")["stdout"] == "file\n"
    server.client.lease("test", 30.0, 0, [filler["token"]])
    assert server.free(1)
    server.client.write_file(other["slot"], other["token"], "file", b"x" * 100_000)


def test_a_server_that_can_not_start_says_why(small_disk: str) -> None:
    (Path(small_disk) / "filler").write_bytes(bytes(1))
    with contextlib.suppress(OSError), (Path(small_disk) / "filler").open("ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    command = [sys.executable, "-m", "slotpool", "serve", "--port", "0", "--state-dir", small_disk]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": PACKAGE}, capture_output=True, text=True, check=False)
    assert done.stderr.startswith("slotpool: the server could not start: ")
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    (Path(small_disk) / "filler").unlink()


def test_a_port_that_is_taken_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "slotpool", "serve", "--port", str(port), "--isolation", "none"]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": PACKAGE}, capture_output=True, text=True, check=False)
    assert f"slotpool: can't listen on 127.0.0.1:{port}: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("mode", ["bwrap", "user"])
def test_a_server_out_of_descriptors_answers_again_when_there_are_some(start_server: StartServer, mode: str) -> None:
    server = start_server(mode, slots=2)
    (lease,) = server.lease()
    pid = server.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{pid}/fd")), before[1]))
    ran, refused = 0, []
    for _ in range(20):
        try:
            ran += server.bash(lease, "echo >>file", stdin="")["exit_code"] == 0  # it needs pipes of its own
        except SlotPoolError as e:
            refused.append(getattr(e, "may_have_run", False))
    assert refused
    assert not any(refused)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    assert server.bash(lease, "touch file; wc -l <file")["stdout"] == f"{ran}\n"
    server.client.lease("test", 30.0, 0, [lease["token"]])
    assert server.free(2)


def test_a_server_out_of_memory_answers_again_when_there_is_some(start_server: StartServer) -> None:
    server = start_server("user", slots=2)
    (lease,) = server.lease()
    pid = server.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_AS)
    server.bash(lease, "head -c 8000000 /dev/zero >big")
    used = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
    resource.prlimit(pid, resource.RLIMIT_AS, (used, before[1]))
    refused = 0
    with contextlib.ExitStack() as clients:
        for _ in range(10):  # more than there can be stacks of threads that have ended, which are used again
            client = clients.enter_context(contextlib.closing(SandboxClient(server.address, server.token)))
            try:
                client.health(repeat=False)  # takes a thread, and that a stack
            except ContainerLost:
                refused += 1
            assert len(server.client.read_file(lease["slot"], lease["token"], "big")) == 8_000_000  # which is never held whole
    assert refused
    resource.prlimit(pid, resource.RLIMIT_AS, before)
    assert len(server.client.read_file(lease["slot"], lease["token"], "big")) == 8_000_000
    server.client.lease("test", 30.0, 0, [lease["token"]])
    assert server.free(2)


FIRST_THREAD_ENDS = """
import ctypes, os, threading, time
def live_on():
    while open(f"/proc/self/task/{os.getpid()}/stat").read().split()[2] != "Z":
        time.sleep(0.001)
    print(flush=True)
    time.sleep(1019)
threading.Thread(target=live_on).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.mark.parametrize("command", [["sh", "-c", "echo; exec sleep 1019"], [PYTHON, "-c", FIRST_THREAD_ENDS]])
def test_the_next_server_kills_what_is_left_where_server_and_nursery_were_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    if not ROOT:
        pytest.skip("only root has users to give")
    block = users.UserBlock()
    left = subprocess.Popen(command, user=block.take(), stdout=subprocess.PIPE)
    assert left.stdout is not None
    try:
        assert left.stdout.readline() == b"\n"
        (tmp_path / str(block.first)).touch()  # a lock that nobody holds
        monkeypatch.setattr(users, "REGISTRY", str(tmp_path))  # others' servers have theirs beside it
        users._sweep()
        assert left.wait(10) == -signal.SIGKILL
        assert list(tmp_path.iterdir()) == []
    finally:
        left.kill()
        left.wait()
        left.stdout.close()
        monkeypatch.undo()
        block.close()


def test_what_a_server_has_left_running_is_dead_before_its_files_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it could make more of them as fast as that goes."""
    if not ROOT:
        pytest.skip("only root has users to give")
    directory = tempfile.mkdtemp(prefix="faults-")
    os.chmod(directory, 0o711)
    left = os.path.join(directory, "s-left")
    os.mkdir(left)
    block = users.UserBlock()
    runs = subprocess.Popen(["sleep", "1020"], user=block.take())
    os.close(block.fd)  # as if its server had been killed
    remove_tree = trees.remove_tree
    ran: list[bool] = []

    def remove(path: str) -> None:
        if path == left:
            ran.append(runs.poll() is None)
        remove_tree(path)

    monkeypatch.setattr(trees, "remove_tree", remove)
    try:
        TenancyMaker(HostConfig(slots=1, isolation="user", state_dir=directory), NurseryProcess()).close()
    finally:
        runs.kill()
        runs.wait()
    assert ran == [False]
    os.rmdir(directory)


def test_control_groups_of_a_server_in_another_pid_namespace_are_not_taken_for_left_ones() -> None:
    try:
        groups = cgroups.find(None, None)
    except OSError as e:
        pytest.skip(f"there are no control groups here: {e}")
    try:
        strange = [f"{os.path.dirname(root)}/slotpool-strange" for root in groups.roots]
        for root in strange:
            os.mkdir(root)
            held = os.open(root, os.O_RDONLY)
            fcntl.flock(held, fcntl.LOCK_EX)
            cgroups._sweep(os.path.dirname(root))
            assert os.path.isdir(root)
            os.close(held)
            cgroups._sweep(os.path.dirname(root))
            assert not os.path.isdir(root)
        groups.make("slot")
        for root in groups.roots:
            cgroups._sweep(os.path.dirname(root))
            assert os.path.isdir(f"{root}/slot")
    finally:
        groups.close()
