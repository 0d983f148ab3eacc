"""Processes of others: the server's, its helpers' and another slot's."""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
from typing import Any

import pytest
from arena import LOOK, PYTHON, SHARED, TOKEN, Arena
from attacks import attack
from conftest import ROOT

from slotpool.errors import SlotBroken

READ_PROCESSES = r"""
def dump(pid):
    with open(f"/proc/{pid}/maps") as f:
        maps = f.read()
    look(f"maps of {pid}", maps.encode())
    with open(f"/proc/{pid}/mem", "rb", 0) as mem:
        for line in maps.splitlines():
            start, end = (int(part, 16) for part in line.split()[0].split("-"))
            if "rw" in line and end - start < 1 << 26 and time.monotonic() < deadline:
                mem.seek(start)
                look(f"mem of {pid}", attempt(mem.read, end - start) or b"")

class Vec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]

def read_remote(pid):
    buffer = ctypes.create_string_buffer(8)
    with open("/proc/self/maps") as f:
        address = int(f.readline().split("-")[0], 16)
    here, there = Vec(ctypes.addressof(buffer), 8), Vec(address, 8)
    if libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0) >= 0 or ctypes.get_errno() == 14:
        print("REMOTE", pid)  # EFAULT: allowed, but nothing is there

def attach(pid):
    if libc.ptrace(16, pid, None, None) == 0:
        os.waitpid(pid, 0x40000000)
        libc.ptrace(17, pid, None, None)
        print("TRACED", pid)

def take(pid):
    pidfd = os.pidfd_open(pid)
    for n in range(256):
        fd = libc.syscall(438, pidfd, n, 0)  # pidfd_getfd
        if fd >= 0:
            print("TAKEN", pid, n)
            os.close(fd)

everyone = visible()
for pid in sorted({*everyone, *given["pids"]} if given["all"] else given["pids"]):
    for name in ("environ", "cmdline", "auxv", "maps", "smaps", "stack", "task/%d/environ" % pid):
        look_in(f"/proc/{pid}/{name}")
    for name in ("cwd", "root", "fd", "map_files", "task/%d/fd" % pid, "task/%d/cwd" % pid):
        for inner in attempt(os.listdir, f"/proc/{pid}/{name}") or []:
            if "fd" in name:
                print("DESCRIPTOR", pid, inner)
            elif inner == given["name"]:
                look_in(f"/proc/{pid}/{name}/{inner}")
    for path in given["paths"]:
        look_in(f"/proc/{pid}/root{path}")
    attempt(dump, pid)
for pid in given["pids"]:
    for act in (read_remote, attach, take):
        attempt(act, pid)
"""


@attack(
    "environ, mem, maps, fd, cwd, ptrace, process_vm_readv, pidfd_getfd of another's processes",
    "nothing is read, traced or taken",
    docker=True,
)
def test_another_slots_processes_can_be_neither_read_nor_traced(arena: Arena) -> None:
    own_user = int(arena.server.bash(arena.a, "id -u")["stdout"])
    users = arena.processes()
    pids = sorted(users)
    path = arena.outside(arena.name)
    inside = json.loads(arena.before)["ready"]["pid"]
    given = {"all": True, "pids": pids, "name": arena.name, "paths": [path, *(f"{d}/{arena.name}" for d in SHARED)]}
    own = {"all": False, "pids": [inside], "name": arena.name, "paths": [f"{arena.b['workspace']}/{arena.name}"]}
    works = arena.run(arena.b, LOOK + READ_PROCESSES, given=own)
    for way in ("environ", "mem of", "cwd", "root"):
        assert re.search(f"FOUND .*{way}.* {arena.secret}", works), way
    # Docker's seccomp filter knows two of the calls as dangerous.
    for way in ("TRACED", "DESCRIPTOR") if arena.mode == "docker" else ("REMOTE", "TRACED", "TAKEN", "DESCRIPTOR"):
        assert f"{way} {inside}" in works
    told = arena.run(arena.a, LOOK + READ_PROCESSES, given=given)
    assert "FOUND" not in told
    assert arena.secret not in told
    if arena.own_users:  # in bwrap mode a process of A's own may have the same number
        others = [pid for pid, user in users.items() if user not in (own_user, None)]
        assert inside in others
        assert arena.pid in others
        for pid in others:
            assert not re.search(rf"(REMOTE|TRACED|TAKEN|DESCRIPTOR) {pid}\b", told)
    arena.assert_unharmed()


@attack("the same of the server's processes, for its token", "the token is not found")
def test_the_servers_memory_environment_and_files_hold_no_secret_for_a_slot(arena: Arena) -> None:
    pids = sorted(arena.processes())
    server = arena.pid
    given = {"all": True, "pids": pids, "name": "", "paths": []}
    if ROOT:  # others may not be allowed to, even as the server's own user
        control = subprocess.run(
            [PYTHON, "-c", LOOK + READ_PROCESSES],
            env={"NEEDLE": TOKEN, "GIVEN": json.dumps({**given, "all": False, "pids": [server]})},
            capture_output=True,
            text=True,
            check=True,
        )
        assert f"FOUND mem of {server}" in control.stdout, "the attack does not work"
    told = arena.run(arena.a, LOOK + READ_PROCESSES, needle=TOKEN, given=given)
    assert "FOUND" not in told
    arena.assert_unharmed()


LOOK_EVERYWHERE = r"""
for name in os.listdir("/proc"):
    if name.isdigit():
        for what in ("environ", "cmdline"):
            look_in(f"/proc/{name}/{what}")
for top in given:
    for directory, _, names in os.walk(top):
        if time.monotonic() > deadline:
            sys.exit("it takes too long")
        for name in names:
            look_in(os.path.join(directory, name))
"""


@attack("search every readable file, environ and cmdline for the server's token", "the token is not found", docker=True)
def test_the_servers_token_is_in_no_file_environment_or_command_line_that_a_slot_can_read(arena: Arena) -> None:
    planted = arena.server.bash(arena.a, 'echo SLOTPOOL_TEST_"server_token" > planted')
    assert planted["exit_code"] == 0
    told = arena.run(arena.a, LOOK + LOOK_EVERYWHERE, needle=TOKEN, given=["."])
    assert "FOUND ./planted" in told, "the attack does not work"
    places = [str(arena.state.parent), "/etc", "/run", "/dev/shm", "/var/tmp", "/var/log", "/root", "/home"]
    arena.server.bash(arena.a, "rm planted")
    assert "FOUND" not in arena.run(arena.a, LOOK + LOOK_EVERYWHERE, needle=TOKEN, given=places)
    arena.assert_unharmed()


# Killing: the code would do as it says, were it ever run as root or beside other processes of its user.


def assert_kills_are_contained(arena: Arena) -> None:
    told = arena.server.bash(arena.a, "id -u; readlink /proc/self/ns/pid; grep CapEff /proc/self/status")["stdout"].split()
    assert int(told[0]) > 0
    assert int(told[-1], 16) == 0
    if arena.own_users:
        assert int(told[0]) >= 20_000
        assert int(told[0]) not in {entry.pw_uid for entry in pwd.getpwall()}
    else:
        assert told[1] != os.readlink("/proc/self/ns/pid")


def kill(name: str, command: str, limit: float = 20.0) -> Any:
    return pytest.param(command, limit, id=name, marks=attack(f"signal others: {name}", "only the slot's own are hit", True))


@pytest.mark.parametrize(
    ("command", "limit"),
    [
        kill("SIGKILL to -1", "kill -9 -1"),
        kill("SIGSTOP to -1", "kill -STOP -1; sleep 60", 1.0),
        kill(
            "KILL, TERM, STOP to each number",
            "for sig in 9 15 19; do for pid in {1..20000} $(cd /proc; echo [0-9]*) $(seq $(($$ - 5000)) $(($$ + 5000))); do "
            "[ $pid = $$ ] || kill -$sig $pid; done; done 2>/dev/null",
            60.0,
        ),
        kill(
            "SIGKILL to each process group",
            """python3 -c 'import os
seen = [int(name) for name in os.listdir("/proc") if name.isdigit()]
for group in [*range(2, 20000), *seen, *range(os.getpid() - 5000, os.getpid() + 5000)]:
    if group > 1 and group != os.getpgrp():
        try:
            os.killpg(group, 9)
        except OSError:
            pass'""",
        ),
    ],
)
def test_no_signal_reaches_a_process_of_others(arena: Arena, command: str, limit: float) -> None:
    assert_kills_are_contained(arena)
    arena.server.bash(arena.a, "sleep 1000 >/dev/null 2>&1 & echo $! > sleeper; [ -d /proc/$! ]")
    try:
        arena.server.bash(arena.a, command, timeout=limit)
    except SlotBroken:
        pass  # it has killed its own zygote
    arena.assert_unharmed()
    # In a new sandbox, made as the zygote was hit too, its number may be another process's.
    look = "p=/proc/$(cat sleeper); grep -qs sleep $p/cmdline && cut -d' ' -f3 $p/stat || echo gone"
    hit = arena.server.bash(arena.a, look)["stdout"].strip()
    assert hit in ("gone", "Z", "T"), "the attack does not work"
