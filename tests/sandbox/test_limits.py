"""Each limit of a slot, run into by what it limits, in each mode; and what the server says of how it is kept."""

from __future__ import annotations

import contextlib
import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from arena import family
from conftest import ORDINARY_USER, PACKAGE, ROOT, Server, StartServer, can_run, wait_until

from slotpool.sandbox import cgroups, linux

MODES = ["bwrap", "user", "bwrap-as-user"]
KINDS = {"processes", "open_files", "memory", "cpu", "cpu_share", "file_size", "disk", "wall_time"}
MEMORY = 64 << 20


def limits(server: Server) -> dict[str, str]:
    told: dict[str, str] = server.client.health()["limits"]
    assert told.keys() == KINDS
    return told


POLICIES = "exec python3 -c 'import os; print(os.sched_getscheduler(0), os.sched_getscheduler(os.getppid()))'"


@contextlib.contextmanager
def scheduled(policy: int) -> Iterator[None]:
    """By that policy, also what is started."""
    before = os.sched_getscheduler(0)
    os.sched_setscheduler(0, policy, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, before, os.sched_param(0))


def python(server: Server, lease: Any, code: str) -> Any:
    return server.bash(lease, "exec python3 -", stdin=code)


@pytest.mark.parametrize("mode", MODES)
def test_processes_and_open_files_and_their_sizes(start_server: StartServer, mode: str) -> None:
    server = start_server(mode, max_processes=30, max_written=1 << 20)
    (lease,) = server.lease()
    told = limits(server)
    assert (told["processes"], told["open_files"], told["file_size"]) == ("rlimit", "rlimit", "rlimit")
    started = """
import os, signal, time
children = []
try:
    while len(children) < 100:
        pid = os.fork()
        if not pid:
            time.sleep(60)
        children.append(pid)
except OSError as e:
    print(e.errno)
print(len(children))
for pid in children:
    os.kill(pid, signal.SIGKILL)
"""
    number, count = python(server, lease, started)["stdout"].split()
    assert number == "11"  # EAGAIN
    assert 10 < int(count) < 30
    opened = "fds = []\ntry:\n    while 1: fds.append(open('/dev/null'))\nexcept OSError as e: print(len(fds), e.errno)"
    count, number = python(server, lease, opened)["stdout"].split()
    assert int(count) < 16_384
    assert number == "24"  # EMFILE
    written = server.bash(lease, "head -c 3000000 /dev/zero >file; stat -c %s file")
    assert written["stdout"] == f"{1 << 20}\n"
    with pytest.raises(OSError, match="too large"):
        server.client.write_file(lease["slot"], lease["token"], "file", bytes(3_000_000))
    raised = "ulimit -n 20000; ulimit -u 4000; ulimit -f unlimited; ulimit -c unlimited"
    assert server.bash(lease, raised)["stderr"].count("cannot modify limit") == 4


ALLOCATE = """
import sys
held = []
for n in range(400):
    held.append(b"x" * (1 << 20))
    print(n, flush=True)
"""


HOLD = """
import os, time
held = b"x" * (30 << 20)
while not os.path.exists("ended"): time.sleep(0.05)
"""


@pytest.mark.parametrize("mode", MODES)
def test_memory(start_server: StartServer, mode: str) -> None:
    server = start_server(mode, max_memory=MEMORY)
    one, other = server.lease(2)
    assert limits(server)["memory"] in (("cgroup v1", "cgroup v2") if in_groups(mode) else ("rlimit",))
    result = python(server, one, ALLOCATE)
    assert result["exit_code"] != 0
    assert 10 < len(result["stdout"].splitlines()) < MEMORY >> 20
    assert python(server, other, ALLOCATE.replace("400", "20"))["exit_code"] == 0
    if in_groups(mode):  # all of its processes together
        server.client.write_file(one["slot"], one["token"], "hold.py", HOLD.encode())
        together = "for i in 1 2 3 4; do (python3 hold.py; echo $? >>ended) & done; wait; cat ended"
        assert str(128 + signal.SIGKILL) in server.bash(one, together)["stdout"].split()
    assert server.bash(other, "echo well")["stdout"] == "well\n"


WITHOUT_ITS_FIRST_THREAD = f"""
import ctypes, os, threading
threading.Thread(target=lambda: exec({ALLOCATE!r})).start()
ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)  # exit(2), of this thread alone
"""


@contextlib.contextmanager
def little_memory(size: int) -> Iterator[cgroups.Groups]:
    """Control groups that may have so much."""
    try:
        groups = cgroups.find(size, None)
    except OSError as e:
        pytest.skip(f"no control groups can be had here: {e}")
    try:
        yield groups
    finally:
        groups.close()


def killed_by_kernel(groups: cgroups.Groups, name: str) -> int:
    """How many processes it had to kill in that group, and in those that are in it now."""
    if groups.version == 2:  # which counts there what happens further in
        texts = [Path(root, name, "memory.events").read_text() for root in groups.roots]
    else:
        texts = [path.read_text() for root in groups.roots for path in Path(root, name).rglob("memory.oom_control")]
    assert texts
    return sum(int(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith("oom_kill "))


@pytest.mark.parametrize("mode", MODES)
def test_a_slot_that_fills_the_servers_own_memory_is_ended_before_that_is_full(start_server: StartServer, mode: str) -> None:
    with little_memory(400 << 20) as groups:
        files = groups.make("server")
        if mode == "bwrap-as-user":
            if groups.version == 2:
                pytest.skip("of version 2 an ordinary user may not join a group that root has made")
            for file in files:
                os.chown(file, pwd.getpwnam(ORDINARY_USER).pw_uid, -1)
        server = start_server(mode, groups=files)
        one, other = server.lease(2)
        assert python(server, other, "held = b'x' * (20 << 20)\nimport time\ntime.sleep(0.2)")["exit_code"] == 0
        for _ in range(2):
            for program in (ALLOCATE, "b'x' * (400 << 20)", WITHOUT_ITS_FIRST_THREAD):
                result = server.bash(one, "python3 -\ntrue", stdin=program)
                assert result["exit_code"] == 0
            # What is in files fills it too from now on, until somebody needs that memory; unless they are in memory alone.
            fill = 'test "$(stat -f -c %T .)" = tmpfs || head -c 500000000 /dev/zero >file'
            assert server.bash(other, fill)["exit_code"] == 0
        result = server.bash(one, "python3 -", stdin=ALLOCATE)
        assert result["exit_code"] == 128 + signal.SIGKILL, result
        assert len(result["stdout"].splitlines()) > 100
        assert server.bash(other, "echo well")["stdout"] == "well\n"
        assert killed_by_kernel(groups, "server") == 0
        server.stop()


def in_groups(mode: str) -> bool:
    """Whether a server in that mode can have control groups here."""
    if mode == "bwrap-as-user" or not ROOT:
        return False
    try:
        cgroups.find(None, None).close()
    except OSError:
        return False
    return True


def test_processors(start_server: StartServer) -> None:
    if not in_groups("bwrap"):
        pytest.skip("no control groups can be had here")
    with contextlib.closing(cgroups.find(None, None)) as groups:
        server = start_server("bwrap", groups=groups.make("server"), max_cpus=0.1)
        (lease,) = server.lease()
        assert limits(server)["cpu"] in ("cgroup v1", "cgroup v2")

        def throttled() -> int:
            texts = [path.read_text() for root in groups.roots for path in Path(root, "server").rglob("cpu.stat")]
            return sum(int(line.split()[1]) for text in texts for line in text.splitlines() if "nr_throttled " in line)

        before = throttled()
        server.bash(lease, "while :; do :; done >/dev/null 2>&1 &")
        assert wait_until(lambda: throttled() > before)
        server.stop()


def test_processors_cannot_be_limited_without_groups() -> None:
    more: dict[str, Any] = {"user": pwd.getpwnam("nobody").pw_uid, "group": 65_534, "extra_groups": []} if ROOT else {}
    if more and not can_run(more):
        pytest.skip(f"user nobody can't run {sys.executable} with {PACKAGE}")
    command = [sys.executable, "-m", "slotpool", "serve", "--port", "0", "--max-cpus", "0.2"]
    environment = {**os.environ, "PYTHONPATH": PACKAGE}
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=60, check=False, **more)
    assert done.returncode != 0
    assert "max_cpus: expected control groups that this server may write" in done.stderr


SLICE = """
import ctypes, os, struct

def slice_of(thread):  # in nanoseconds, see sched_getattr(2); 0 before Linux 6.12
    number = {"x86_64": 315, "aarch64": 275, "riscv64": 275, "ppc64le": 356, "s390x": 346}[os.uname().machine]
    attributes = ctypes.create_string_buffer(48)
    if ctypes.CDLL(None).syscall(ctypes.c_long(number), thread, attributes, 48, 0):
        raise OSError("sched_getattr failed")
    return struct.unpack_from("Q", attributes, 24)[0]
"""


def test_processors_are_shared_without_groups(start_server: StartServer) -> None:
    """By restraining a slot with very many busy threads, and nobody else."""
    server = start_server("bwrap-as-user" if ROOT else "bwrap")
    many, few = server.lease(2)
    if limits(server)["cpu_share"].startswith("cgroup"):
        pytest.skip("an ordinary user has control groups here")
    busy = (
        SLICE
        + """
import os, signal, sys, time
children = []
for _ in range(int(sys.argv[1])):
    pid = os.fork()
    if not pid:
        while True: pass
    children.append(pid)
open("begun", "x").close()
if len(children) > 2:
    while not all(os.sched_getscheduler(pid) == os.SCHED_IDLE for pid in children): time.sleep(0.01)
else:
    while not os.path.exists("end"): time.sleep(0.01)
policies = {(os.sched_getscheduler(pid) == os.SCHED_IDLE, len(os.sched_getaffinity(pid))) for pid in children}
print(*policies, sorted({slice_of(pid) for pid in children}))
for pid in children: os.kill(pid, signal.SIGKILL)
"""
    )
    usual = linux.slice_of(0)
    long = 4_000_000 if usual else 0
    processors = len(os.sched_getaffinity(0))
    half = processors - processors // 2
    more: dict[str, Any] = {"user": ORDINARY_USER, "group": "nogroup", "extra_groups": []} if ROOT else {}
    loop = ["sh", "-c", "while :; do :; done"]
    bystanders = [subprocess.Popen(["unshare", "-Urpf", "--kill-child", *loop], **more) for _ in range(5 * processors)]
    with contextlib.ExitStack() as ended, ThreadPoolExecutor(1) as thread:
        for bystander in bystanders:
            ended.callback(bystander.wait)
            ended.callback(bystander.kill)
        looks = thread.submit(server.bash, few, "exec python3 - 2", stdin=busy)
        assert wait_until(lambda: "begun" in server.bash(few, "ls")["stdout"])
        restrained = server.bash(many, f"exec python3 - {5 * processors}", stdin=busy)["stdout"]
        assert restrained == f"(True, {half}) [{long}]\n"
        assert {os.sched_getscheduler(pid) for one in bystanders for pid in family(one.pid)} == {os.sched_getscheduler(0)}
        server.bash(few, "touch end")
        assert looks.result()["stdout"] == f"(False, {processors}) [{long}]\n"
    assert server.bash(many, POLICIES)["stdout"] == f"{os.SCHED_IDLE} {os.SCHED_IDLE}\n"  # and so are later commands


def test_no_command_can_have_a_policy_that_takes_the_processors(start_server: StartServer) -> None:
    server = start_server("bwrap-as-user" if ROOT else "bwrap")
    (lease,) = server.lease()
    assert server.bash(lease, "ulimit -He; ulimit -Hr")["stdout"] == "0\n0\n"


@pytest.mark.parametrize("policy", [os.SCHED_OTHER, os.SCHED_BATCH])
@pytest.mark.parametrize("mode", MODES)
def test_commands_yield_to_who_serves_them(start_server: StartServer, mode: str, policy: int) -> None:
    """But the zygote, which tells how they end, keeps the server's policy."""
    with scheduled(policy):
        server = start_server(mode)
    (lease,) = server.lease()
    assert server.bash(lease, POLICIES)["stdout"] == f"{os.SCHED_BATCH} {policy}\n"
    usual = linux.slice_of(0)
    longer = max(usual, linux.LONG_SLICE) if usual and policy == os.SCHED_OTHER else usual
    assert server.bash(lease, "exec python3 -", stdin=SLICE + "print(slice_of(0))")["stdout"] == f"{longer}\n"


def test_disk(start_server: StartServer) -> None:
    server = start_server("bwrap", max_disk=4 << 20)
    one, other = server.lease(2)
    assert limits(server)["disk"] == "tmpfs"
    for directory in (".", "/tmp", "/var/tmp", "/dev/shm"):
        result = server.bash(one, f"head -c 9000000 /dev/zero >{directory}/file; stat -c %s {directory}/file")
        assert int(result["stdout"]) <= 4 << 20, directory
        assert "No space left" in result["stderr"]
    assert server.bash(other, "head -c 3000000 /dev/zero >file && stat -c %s file")["stdout"] == "3000000\n"


def test_what_is_not_limited_is_said_to_be_so(start_server: StartServer) -> None:
    server = start_server("bwrap")
    cpu_share = limits(server)["cpu_share"]
    assert cpu_share in (("cgroup v1", "cgroup v2") if in_groups("bwrap") else ("SCHED_IDLE",))
    assert limits(server) == {
        "processes": "rlimit",
        "open_files": "rlimit",
        "memory": "none",
        "cpu": "none",
        "cpu_share": cpu_share,
        "file_size": "none",
        "disk": "none",
        "wall_time": "timeout",
    }
    (lease,) = server.lease()
    assert server.bash(lease, "echo begun; sleep 60", timeout=0.3)["timed_out"]


# Version 2 on a machine that has its controllers in version 1: the files are a tmpfs's, with the kernel's rules acted out.


@pytest.fixture
def hierarchy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A group of version 2 that this process is in."""
    files = ("cgroup.procs", "cgroup.subtree_control", "memory.max", "memory.swap.max", "cpu.max", "cpu.weight")
    make, write = os.mkdir, linux.write

    def mkdir(path: str, mode: int = 0o777) -> None:
        make(path, mode)
        for name in files:
            Path(path, name).touch()

    def removed(path: str) -> None:
        for name in files:
            Path(path, name).unlink()
        remove(path)

    def written(path: str, content: bytes) -> None:
        text = content.decode()
        if path.endswith("cgroup.subtree_control") and Path(path).with_name("cgroup.procs").read_text().strip():
            raise OSError(16, "a group with processes gives no controllers on")
        if path.endswith("cgroup.procs"):
            before = Path(tmp_path, "own", "cgroup.procs")
            before.write_text("\n".join(pid for pid in before.read_text().split() if pid != text))
            text = f"{Path(path).read_text()}{text}\n"
        write(path, text.encode())

    remove = os.rmdir
    monkeypatch.setattr(os, "mkdir", mkdir)
    monkeypatch.setattr(os, "rmdir", removed)
    monkeypatch.setattr(linux, "write", written)
    own = tmp_path / "own"
    mkdir(str(own))
    (own / "cgroup.procs").write_text(str(os.getpid()))
    (own / "cgroup.controllers").write_text("cpu memory pids\n")
    monkeypatch.setattr(cgroups, "_own_directory", lambda controller: str(own) if controller is None else "/nowhere")
    return own


def test_groups_of_version_2(hierarchy: Path) -> None:
    (hierarchy / "cgroup.procs").write_text(f"{os.getpid()}\n77\n")
    found = cgroups.find(MEMORY, 0.5, [77])
    assert found.version == 2
    (root,) = map(Path, found.roots)
    assert sorted((hierarchy / "slotpool" / "cgroup.procs").read_text().split()) == sorted([str(os.getpid()), "77"])
    assert (hierarchy / "cgroup.subtree_control").read_text() == "+memory +cpu"
    (joined,) = found.make("slot")
    group = root / "slot"
    assert joined == str(group / "cgroup.procs")
    assert (group / "memory.max").read_text() == str(MEMORY)
    assert (group / "memory.swap.max").read_text() == "0"
    assert (group / "cpu.max").read_text() == "50000 100000"
    found.remove("slot")
    assert not group.exists()
    found.close()
    assert not root.exists()


def test_a_group_that_others_are_in_is_left_as_it_is(hierarchy: Path) -> None:
    (hierarchy / "cgroup.procs").write_text(f"{os.getpid()}\n1\n")
    with pytest.raises(OSError, match=r"version 2: .*gives no controllers on"):
        cgroups.find(MEMORY, None, [77])
    assert not (hierarchy / "slotpool").exists()


def test_groups_of_a_server_that_was_killed_are_removed_by_the_next(start_server: StartServer) -> None:
    if not in_groups("bwrap"):
        pytest.skip("no control groups can be had here")
    code = "from slotpool.sandbox import cgroups; g = cgroups.find(None, None); g.make('slot'); print(g.roots)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": PACKAGE}, capture_output=True, text=True, check=True
    )
    roots = eval(done.stdout)
    assert all(map(os.path.isdir, roots))
    cgroups.find(None, None).close()
    deadline = time.monotonic() + 5
    while any(map(os.path.isdir, roots)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(os.path.isdir, roots))
