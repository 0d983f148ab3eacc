"""What a slot's code can reach of other slots, of the server and of the machine: nothing, by any of the usual ways.

Each attack is run as well where it must succeed, in the attacked slot itself or as the server's own user, so that one that
has no effect is noticed.
"""

from __future__ import annotations

import ctypes
import json
import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attr
import pytest
from conftest import ISOLATED, ROOT, Server, StartServer, wait_until

from slotpool.errors import FileError, SlotBroken
from slotpool.sandbox.protocol import Lease

PYTHON = "/usr/bin/python3"
SHARED = ("/tmp", "/var/tmp", "/dev/shm")
SECRET = "B-SECRET-[0-9a-f]{32}"
TOKEN = "SLOTPOOL_TEST_[s]erver_token"  # doesn't match itself
SCOPED_SOCKETS = 6  # the version of Landlock that knows abstract sockets

# What the attacks share. NEEDLE is what they look for; whatever holds it is printed.
LOOK = r"""
import ctypes, fcntl, glob, json, os, re, signal, socket, stat, struct, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.shmat.restype = ctypes.c_void_p
libc.shmat.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int]
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
needle = re.compile(os.environ["NEEDLE"].encode())
given = json.loads(os.environ["GIVEN"])
deadline = time.monotonic() + 15

def look(where, data):
    for found in needle.findall(data):
        print("FOUND", where, found.decode())

def attempt(act, *args):
    try:
        return act(*args)
    except (OSError, ValueError, OverflowError):
        return None

def read(path, limit=1 << 20):
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        end = time.monotonic() + 1
        if stat.S_ISFIFO(os.fstat(fd).st_mode):  # a writer may come, once it is open
            while time.monotonic() < end:
                data = attempt(os.read, fd, 4096)
                if data:
                    return data
                time.sleep(0.02)
        return os.read(fd, limit)
    finally:
        os.close(fd)

def look_in(path):
    data = attempt(read, path)
    if data:
        look(path, data)

def visible():
    own = {os.getpid()}
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in own]
"""

# The attacked slot's background process: the secret is in its environment and memory, and in all that it makes.
HOLDER = (
    LOOK
    + r"""
secret, name = os.environ["SECRET"].encode(), given["name"]
libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER: also where Yama restricts ptrace, its slot may use it

def serve(address):
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    def answer():
        while True:
            connection, _ = listener.accept()
            connection.sendall(secret)
            connection.close()
    threading.Thread(target=answer, daemon=True).start()

def feed(path):
    os.mkfifo(path, 0o666)
    def write():
        while True:
            try:
                with open(path, "wb") as f:
                    f.write(secret)
            except BrokenPipeError:
                pass
            time.sleep(0.02)
    threading.Thread(target=write, daemon=True).start()

for directory in given["directories"]:
    with open(os.path.join(directory, name), "wb") as f:
        f.write(secret)
    feed(os.path.join(directory, name + ".fifo"))
    serve(os.path.join(directory, name + ".socket"))
serve("\0" + name)
shm = libc.shmget(given["key"], 4096, 0o1600)
ctypes.memmove(libc.shmat(shm, None, 0), secret, len(secret))
with open("ready.new", "w") as f:
    json.dump({"pid": os.getpid(), "shm": shm}, f)
os.rename("ready.new", "ready")
signal.pause()
"""
)

# What the attacked slot still has: compared before and after.
INVENTORY = (
    LOOK
    + r"""
def ask(address):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(address)
        return sock.recv(100).decode()

name = given["name"]
with open("ready") as f:
    ready = json.load(f)
os.kill(ready["pid"], 0)
with open("/proc/sysvipc/shm") as f:
    segments = [line.split()[1] for line in f]
has = {"ready": ready, "shm": str(ready["shm"]) in segments, "abstract": ask("\0" + name), "here": sorted(os.listdir("."))}
for directory in given["directories"]:
    path = os.path.join(directory, name)
    with open(path) as f:
        has[path] = [f.read(), oct(os.stat(path).st_mode), os.stat(path).st_mtime_ns, os.stat(path).st_uid]
    has[path + ".socket"] = ask(path + ".socket")
with open(f"/proc/{ready['pid']}/stat") as f:
    has["state"] = f.read().rpartition(")")[2].split()[0] not in "TtZX"
print(json.dumps(has, sort_keys=True))
"""
)


@attr.s(auto_attribs=True)
class Arena:
    """A server with two leases: ``a`` attacks, ``b`` has secrets."""

    server: Server
    mode: str
    a: Lease
    b: Lease
    secret: str
    name: str
    key: int
    landlock: int
    before: str = ""

    @property
    def state(self) -> Path:
        """The server's directory."""
        return Path(self.server.address[len("unix://") :]).parent

    @property
    def directories(self) -> list[str]:
        return [self.b["workspace"], *SHARED]

    def outside(self, name: str) -> str:
        """Where a file of one slot's workspace is on this machine."""
        (path,) = self.state.glob(f"slots/*/workspace/{name}")
        return str(path)

    def run(self, lease: Lease, code: str, needle: str = SECRET, given: object = None, **env: str) -> str:
        """Run Python code in a slot; what it printed, whole."""
        env.update(NEEDLE=needle, GIVEN=json.dumps(given))
        result = self.server.bash(lease, f"exec {PYTHON} -", timeout=60.0, stdin=code, env=env)
        assert not result["timed_out"], result
        assert not result["stdout_truncated"], result["stdout"]
        assert result["exit_code"] == 0, result["stderr"]
        return str(result["stdout"]) + str(result["stderr"])

    def inventory(self) -> str:
        return self.run(self.b, INVENTORY, given={"name": self.name, "directories": self.directories})

    def settle(self) -> None:
        """Give ``b`` its secrets."""
        self.server.client.write_file(self.b["slot"], self.b["token"], "holder.py", HOLDER.encode())
        result = self.server.bash(
            self.b,
            f"{PYTHON} holder.py >log 2>&1 & for i in {{1..400}}; do [ -e ready ] && exit; sleep 0.05; done; cat log; exit 1",
            timeout=30.0,
            env={
                "SECRET": self.secret,
                "NEEDLE": SECRET,
                "GIVEN": json.dumps({"name": self.name, "directories": self.directories, "key": self.key}),
            },
        )
        assert result["exit_code"] == 0, result
        self.before = self.inventory()
        assert self.before.count(self.secret) == 2 * len(self.directories) + 1

    def assert_unharmed(self) -> None:
        assert self.inventory() == self.before
        assert self.server.process.poll() is None
        assert self.server.client.health()["status"] == "ok"

    def steal(self, attack: str, given: object = None, own: object = None) -> str:
        """Run the attack: the owner of the secret gets it so, and nobody else. What it printed."""
        assert self.secret in self.run(self.b, LOOK + attack, given=given if own is None else own), "the attack does not work"
        self.before = self.inventory()
        told = self.run(self.a, LOOK + attack, given=given)
        assert self.secret not in told
        assert "FOUND" not in told
        self.assert_unharmed()
        return told


def make_arena(start_server: StartServer, mode: str) -> Arena:
    server = start_server(mode)
    a, b = server.lease(2)
    name = f"of-b-{secrets.token_hex(8)}"
    secret = "B-SECRET-" + secrets.token_hex(16)
    landlock = server.client.health()["landlock"]
    arena = Arena(server, mode, a, b, secret, name, secrets.randbelow(1 << 30) + 1, landlock)
    arena.settle()
    return arena


@pytest.fixture(params=ISOLATED)
def arena(request: pytest.FixtureRequest, start_server: StartServer) -> Arena:
    return make_arena(start_server, request.param)


@pytest.fixture
def victim() -> Iterator[Path]:
    """A file of this machine that everybody may read, and only the server's administrator write."""
    directory = Path(tempfile.mkdtemp(prefix="test-isolation-", dir="/var/tmp"))
    directory.chmod(0o755)
    path = directory / "victim"
    path.write_text("unharmed")
    path.chmod(0o644)
    yield path
    assert path.read_text() == "unharmed"
    assert os.listdir(directory) == ["victim"]
    shutil.rmtree(directory)


def family(pid: int) -> list[int]:
    """A process and all its descendants."""
    below: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text(errors="replace").rpartition(")")[2].split()[1])
        except OSError:
            continue
        below.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for one in found:
        found += below.get(one, [])
    return found


# Files


def test_every_result_names_the_mode(arena: Arena) -> None:
    client, a = arena.server.client, arena.a
    mode = arena.mode.partition("-")[0]
    assert client.health()["isolation"] == mode
    calls = [("bash", {"command": "true"}), ("write_file", {"path": "x", "content": "y"}), ("read_file", {"path": "x"})]
    for tool, args in calls:
        assert client.execute(a["slot"], a["token"], tool, args, 10.0)["isolation"] == mode
    timed_out = client.execute(a["slot"], a["token"], "bash", {"command": "sleep 60"}, 0.1)
    assert timed_out["timed_out"]
    assert timed_out["isolation"] == mode


READ_FILES = r"""
os.mkdir("links")
for n, path in enumerate(given["paths"]):
    up = "/".join([".."] * 30) + path
    link, directory_link = f"links/{n}", f"links/d{n}"
    attempt(os.symlink, path, link)
    attempt(os.symlink, os.path.dirname(path), directory_link)
    hard = f"links/h{n}"
    attempt(os.link, path, hard)
    base = os.path.basename(path)
    ways = [path, up, link, f"{directory_link}/{base}", hard, f"/proc/self/root{path}", f"/proc/self/cwd/{up}"]
    ways += [f"/proc/1/root{path}", f"/proc/{os.getppid()}/root{path}", f"/proc/thread-self/root{path}"]
    for way in ways:
        look_in(way)
    at = attempt(os.open, os.path.dirname(path), os.O_PATH)
    if at is not None:
        fd = attempt(lambda: os.open(base, os.O_RDONLY | os.O_NONBLOCK, dir_fd=at))
        if fd is not None:
            look("openat " + path, attempt(os.read, fd, 4096) or b"")
    for directory in (os.path.dirname(path), os.path.dirname(up), directory_link):
        if base in (attempt(os.listdir, directory) or []):
            print("LISTED", directory)
for pattern in given["patterns"]:
    for path in glob.glob(pattern):
        print("LISTED", path)
        look_in(path)
"""


def test_another_slots_workspace_can_neither_be_read_nor_listed(arena: Arena) -> None:
    outside = arena.outside(arena.name)
    state = str(arena.state)
    names = [arena.name, arena.name + ".fifo", "holder.py", "ready"]
    paths = [str(Path(outside).with_name(name)) for name in names]
    attack = {
        "paths": [*paths, f"{arena.b['workspace']}/{arena.name}"],
        "patterns": [
            f"{state}/slots/*/workspace/of-b-*",
            f"{state}/slots/*/tmp/*",
            f"{state}/*",
            f"{arena.b['workspace']}/of-b-*",
        ],
    }
    own = {"paths": [f"{arena.b['workspace']}/{arena.name}"], "patterns": []}
    assert "LISTED" not in arena.steal(READ_FILES, attack, own)


def test_a_workspace_open_to_all_is_still_its_slots_own(arena: Arena) -> None:
    result = arena.server.bash(arena.b, f"chmod 777 . && chmod 666 {arena.name}* holder.py ready")
    assert result["exit_code"] == 0
    path = arena.outside(arena.name)
    attack = {"paths": [path, path + ".fifo"], "patterns": [os.path.dirname(path) + "/*"]}
    own = {"paths": [f"{arena.b['workspace']}/{arena.name}"], "patterns": []}
    assert "LISTED" not in arena.steal(READ_FILES, attack, own)


WRITE_FILES = r"""
def overwrite(path):
    with open(path, "ab") as f:
        f.write(b"written")

def truncate(path):
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))

os.mkdir("mine")
os.symlink("/", "root")
for path in given:
    for way in (path, "root" + path, "/proc/self/root" + path):
        directory = os.path.dirname(way)
        acts = [
            (overwrite, way), (truncate, way), (os.truncate, way, 0), (os.chmod, way, 0o666), (os.chmod, directory, 0o777),
            (os.chown, way, os.getuid(), os.getgid()), (os.utime, way, (1, 1)), (os.setxattr, way, "user.x", b"x"),
            (os.link, way, "mine/link"), (os.rename, way, "mine/stolen"), (os.rename, way, way + ".moved"), (os.unlink, way),
            (os.rename, directory, directory + ".moved"), (os.mkdir, directory + "/new"), (os.mkfifo, directory + "/pipe"),
            (os.symlink, "/etc", directory + "/planted"), (overwrite, directory + "/planted.txt"),
        ]
        for act, *args in acts:
            try:
                act(*args)
            except OSError:
                continue
            print("DONE", act.__name__, args)
"""


def test_another_slots_files_cannot_be_changed(arena: Arena, victim: Path) -> None:
    path = Path(arena.outside(arena.name))
    server_files = [str(arena.state / "lock"), str(arena.state / "http.sock"), str(arena.state / "etc" / "passwd")]
    told = arena.run(arena.a, LOOK + WRITE_FILES, given=[str(path), str(path.with_name("ready")), *server_files, str(victim)])
    assert "DONE" not in told
    arena.assert_unharmed()
    again = LOOK + "import shutil; shutil.rmtree('mine'); os.unlink('root')\n" + WRITE_FILES
    if arena.mode != "user":  # there is a directory of that name for A too, but it's A's
        arena.run(arena.a, again, given=[f"{arena.b['workspace']}/{arena.name}"])
        arena.assert_unharmed()
    mine = arena.server.bash(arena.a, "mkdir own && echo x > own/file && pwd")["stdout"].strip()
    told = arena.run(arena.a, again, given=[f"{mine}/own/file"])
    assert told.count("DONE") > 10, "the attack does not work"


READ_SHARED = r"""
for directory in given["directories"]:
    for name in (given["name"], given["name"] + ".fifo"):
        look_in(os.path.join(directory, name))
    for name in attempt(os.listdir, directory) or []:
        if name.startswith("of-b-"):
            print("LISTED", directory)
        if given["name"] in name:
            look_in(os.path.join(directory, name))
"""


def test_files_in_shared_directories_are_their_slots_own(arena: Arena) -> None:
    given = {"directories": SHARED, "name": arena.name}
    told = arena.steal(READ_SHARED, given)
    if arena.mode != "user" or arena.landlock:
        assert "LISTED" not in told
    paths = [f"{directory}/{arena.name}" for directory in SHARED]
    told = arena.run(arena.a, LOOK + WRITE_FILES, given=paths)
    if arena.mode == "user":  # in bwrap mode the attacker has such directories of its own
        assert not re.search(rf"DONE \w+ .*{arena.name}", told)
    arena.assert_unharmed()


def test_the_file_api_reads_nothing_that_the_slots_code_could_not(arena: Arena) -> None:
    client, a = arena.server.client, arena.a
    b_file = arena.outside(arena.name)
    server = arena.server.process.pid
    inner = arena.state / "slots"
    targets = {
        "/etc/shadow": "shadow",
        b_file: "b",
        os.path.dirname(b_file): "b_directory",
        str(arena.state / "lock"): "lock",
        str(arena.state): "state",
        str(inner): "slots",
        "/proc/1/environ": "init",
        f"/proc/{server}/environ": "server_environ",
        f"/proc/{server}/mem": "server_mem",
        f"/proc/{server}/fd/0": "server_stdin",
        "/": "root",
        str(Path(b_file).with_name("ready")): "ready",
    }
    for target, name in targets.items():
        assert arena.server.bash(a, f"ln -s {target} {name}")["exit_code"] == 0
    arena.server.bash(a, "echo mine > own; ln -s own link; mkdir d; ln -s ../root/etc/../.. d/up")
    assert client.read_file(a["slot"], a["token"], "link") == b"mine\n"
    paths = [*targets.values(), f"b_directory/{arena.name}", "state/lock", "root/etc/shadow", f"root{b_file}", f"d/up{b_file}"]
    for path in paths:
        try:
            content = client.read_file(a["slot"], a["token"], path)
        except FileError:
            continue
        assert path in ("init", "server_environ"), path  # in bwrap mode a process of its own may have that number
        assert arena.mode != "user"
        seen = arena.server.bash(a, f"od -An -v -tx1 {path} | tr -d ' \\n'")["stdout"]
        assert content.hex() == seen
        assert arena.secret.encode() not in content
        assert b"SLOTPOOL" not in content
    arena.assert_unharmed()


def test_the_file_api_writes_nothing_that_the_slots_code_could_not(arena: Arena, victim: Path) -> None:
    client, a = arena.server.client, arena.a
    b_file = arena.outside(arena.name)
    links = {
        "victim": str(victim),
        "victim_directory": str(victim.parent),
        "b": b_file,
        "b_directory": os.path.dirname(b_file),
        "lock": str(arena.state / "lock"),
        "state": str(arena.state),
        "proc": "/proc/sys/kernel",
        "root": "/",
    }
    for name, target in links.items():
        assert arena.server.bash(a, f"ln -s {target} {name}")["exit_code"] == 0
    before = sorted(os.listdir(arena.state)), (arena.state / "lock").read_bytes()
    paths = ["victim", "victim_directory/new", "victim_directory/victim", "b", "b_directory/new", f"b_directory/{arena.name}"]
    paths += ["lock", "state/new", "state/a/b", "proc/core_pattern", "proc/new", f"root{b_file}", f"root{victim}"]
    for path in paths:
        try:
            client.write_file(a["slot"], a["token"], path, b"planted")
        except FileError:
            continue
        assert arena.mode != "user", path  # a bwrap slot can have such a path in a /tmp of its own
        assert not path.startswith("proc/")
    assert (sorted(os.listdir(arena.state)), (arena.state / "lock").read_bytes()) == before
    arena.assert_unharmed()
    client.write_file(a["slot"], a["token"], "own", b"x")
    arena.server.bash(a, "ln -s own link")
    client.write_file(a["slot"], a["token"], "link", b"through")
    assert client.read_file(a["slot"], a["token"], "own") == b"through"


def test_a_directory_that_becomes_a_link_meanwhile_leads_the_file_api_nowhere(arena: Arena, victim: Path) -> None:
    client, a = arena.server.client, arena.a
    b_directory = os.path.dirname(arena.outside(arena.name))
    swap = f"""
import os, itertools
for n, target in enumerate({[b_directory, str(victim.parent), str(arena.state)]!r}):
    os.symlink(target, f"link{{n}}")
os.mkdir("real")
open("real/{arena.name}", "w").write("mine")
open("real/victim", "w").write("mine")
open("swapping", "w").close()
for n in itertools.cycle(range(3)):
    os.rename("real", "d")
    os.rename("d", "real")
    os.rename(f"link{{n}}", "d")
    os.rename("d", f"link{{n}}")
"""
    client.write_file(a["slot"], a["token"], "swap.py", swap.encode())
    arena.server.bash(a, f"{PYTHON} swap.py >/dev/null 2>&1 & until [ -e swapping ]; do sleep 0.01; done")
    wrote = 0
    # What everybody may read, the slot's own code can read too, where it sees the directory at all.
    own = arena.server.bash(a, f"cat {victim}")["stdout"].encode()
    for _ in range(40):
        for name in (arena.name, "victim", "lock"):
            try:
                client.write_file(a["slot"], a["token"], f"d/{name}", b"planted")
                wrote += 1
            except FileError:
                pass
            try:
                content = client.read_file(a["slot"], a["token"], f"d/{name}")
                assert content in (b"mine", b"planted") or (name == "victim" and content == own)
            except FileError:
                pass
    assert wrote, "the race was never won: nothing was tried"
    assert (arena.state / "lock").read_bytes() == b""
    arena.assert_unharmed()


# Processes

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


def test_another_slots_processes_can_be_neither_read_nor_traced(arena: Arena) -> None:
    own_user = int(arena.server.bash(arena.a, "id -u")["stdout"])
    users = {pid: _uid(pid) for pid in family(arena.server.process.pid)}
    pids = sorted(users)
    path = arena.outside(arena.name)
    inside = json.loads(arena.before)["ready"]["pid"]
    given = {"all": True, "pids": pids, "name": arena.name, "paths": [path, *(f"{d}/{arena.name}" for d in SHARED)]}
    own = {"all": False, "pids": [inside], "name": arena.name, "paths": [f"{arena.b['workspace']}/{arena.name}"]}
    works = arena.run(arena.b, LOOK + READ_PROCESSES, given=own)
    for way in ("environ", "mem of", "cwd", "root"):
        assert re.search(f"FOUND .*{way}.* {arena.secret}", works), way
    for way in ("REMOTE", "TRACED", "TAKEN", "DESCRIPTOR"):
        assert f"{way} {inside}" in works
    told = arena.run(arena.a, LOOK + READ_PROCESSES, given=given)
    assert "FOUND" not in told
    assert arena.secret not in told
    if arena.mode == "user":  # in bwrap mode a process of A's own may have the same number
        others = [pid for pid, user in users.items() if user not in (own_user, None)]
        assert inside in others
        assert arena.server.process.pid in others
        for pid in others:
            assert not re.search(rf"(REMOTE|TRACED|TAKEN|DESCRIPTOR) {pid}\b", told)
    arena.assert_unharmed()


def _uid(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


def test_the_servers_memory_environment_and_files_hold_no_secret_for_a_slot(arena: Arena) -> None:
    pids = family(arena.server.process.pid)
    server = arena.server.process.pid
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
    if arena.mode == "user":
        assert int(told[0]) >= 20_000
        assert int(told[0]) not in {entry.pw_uid for entry in pwd.getpwall()}
    else:
        assert told[1] != os.readlink("/proc/self/ns/pid")


@pytest.mark.parametrize(
    ("kill", "limit"),
    [
        ("kill -9 -1", 20.0),
        ("kill -STOP -1; sleep 60", 2.0),
        (
            "for sig in 9 15 19; do for pid in {1..20000} $(cd /proc; echo [0-9]*) $(seq $(($$ - 5000)) $(($$ + 5000))); do "
            "[ $pid = $$ ] || kill -$sig $pid; done; done 2>/dev/null",
            60.0,
        ),
        (
            f"""{PYTHON} -c 'import os
seen = [int(name) for name in os.listdir("/proc") if name.isdigit()]
for group in [*range(2, 20000), *seen, *range(os.getpid() - 5000, os.getpid() + 5000)]:
    if group > 1 and group != os.getpgrp():
        try:
            os.killpg(group, 9)
        except OSError:
            pass'""",
            20.0,
        ),
    ],
    ids=["all-at-once", "stop", "one-by-one", "groups"],
)
def test_no_signal_reaches_a_process_of_others(arena: Arena, kill: str, limit: float) -> None:
    assert_kills_are_contained(arena)
    arena.server.bash(arena.a, "sleep 1000 >/dev/null 2>&1 & echo $! > sleeper; [ -d /proc/$! ]")
    try:
        arena.server.bash(arena.a, kill, timeout=limit)
    except SlotBroken:
        pass  # it has killed its own zygote
    arena.assert_unharmed()
    # In a new sandbox, made as the zygote was hit too, its number may be another process's.
    look = "p=/proc/$(cat sleeper); grep -qs sleep $p/cmdline && cut -d' ' -f3 $p/stat || echo gone"
    hit = arena.server.bash(arena.a, look)["stdout"].strip()
    assert hit in ("gone", "Z", "T"), "the attack does not work"


# Other ways between processes

READ_SOCKETS = r"""
def ask(address):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(2)
        sock.connect(address)
        look(repr(address), sock.recv(100))
        print("CONNECTED", repr(address))

for address in given["addresses"]:
    attempt(ask, address)
with open("/proc/net/unix") as f:
    for line in f:
        if given["name"] in line:
            attempt(ask, line.split()[7].replace("@", "\0", 1))
"""


def test_another_slots_sockets_cannot_be_reached(arena: Arena) -> None:
    if arena.mode == "user" and arena.landlock < SCOPED_SOCKETS:
        pytest.skip("abstract sockets have no owner; this kernel's Landlock does not know them")
    abstract = "\0" + arena.name
    path = arena.outside(arena.name) + ".socket"
    given = {"name": arena.name, "addresses": [abstract, path, *(f"{d}/{arena.name}.socket" for d in SHARED)]}
    assert "CONNECTED" not in arena.steal(READ_SOCKETS, given)


CONNECT = r"""
sock = socket.socket(socket.AF_UNIX)
sock.settimeout(5)
try:
    sock.connect(given)
except OSError as e:
    print("refused", e)
else:
    sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    print("CONNECTED", sock.recv(1000))
"""


def test_the_servers_socket_cannot_be_reached(arena: Arena) -> None:
    path = arena.server.address[len("unix://") :]
    environment = {"NEEDLE": TOKEN, "GIVEN": json.dumps(path)}
    control = subprocess.run([PYTHON, "-c", LOOK + CONNECT], env=environment, capture_output=True, text=True, check=True)
    assert "CONNECTED" in control.stdout, "the attack does not work"
    told = arena.run(arena.a, LOOK + CONNECT, given=path)
    assert "refused" in told
    assert "CONNECTED" not in told
    assert "CONNECTED" not in arena.run(arena.a, "import os; os.symlink('" + path + "', 's')\n" + LOOK + CONNECT, given="s")


READ_SHM = r"""
idents = {libc.shmget(given, 0, 0)}
with open("/proc/sysvipc/shm") as f:
    idents |= {int(line.split()[1]) for line in f.readlines()[1:]}
idents |= set(range(200))
for ident in idents:
    address = libc.shmat(ident, None, 0o10000)  # read-only
    if address not in (None, ctypes.c_void_p(-1).value):
        look(f"shm {ident}", ctypes.string_at(address, 100))
        libc.shmdt(ctypes.c_void_p(address))
"""


def test_another_slots_shared_memory_can_be_neither_read_nor_removed(arena: Arena) -> None:
    arena.steal(READ_SHM, arena.key)
    remove = f"""
libc.shmctl(libc.shmget({arena.key}, 0, 0), 0, None)
with open("/proc/sysvipc/shm") as f:
    for line in f.readlines()[1:]:
        libc.shmctl(int(line.split()[1]), 0, None)
for ident in range(200):
    libc.shmctl(ident, 0, None)
"""
    arena.run(arena.a, LOOK + remove)
    arena.assert_unharmed()


KEYS = {"x86_64": (248, 250), "aarch64": (217, 219)}  # add_key, keyctl


def test_a_session_keyring_is_not_shared(start_server: StartServer) -> None:
    """Servers that are started from a login have its keyring, and all their children would have it too."""
    if os.uname().machine not in KEYS:
        pytest.skip("the numbers of the system calls are not known here")
    add_key, keyctl = KEYS[os.uname().machine]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    servers: list[tuple[str, Server]] = []
    failed: list[BaseException] = []

    def start() -> None:
        if libc.syscall(keyctl, 1, None) < 0:  # KEYCTL_JOIN_SESSION_KEYRING, for this thread and its children
            return
        try:
            servers.extend((mode, start_server(mode)) for mode in ISOLATED)
        except BaseException as e:  # a skip too, which must be raised in the test's own thread
            failed.append(e)

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    if not servers:
        pytest.skip("no session keyring can be made here")
    put = f"secret = b'B-SEC' + b'RET-' + b'0' * 32; print(libc.syscall({add_key}, b'user', b'of-b', secret, len(secret), -3))"
    get = f"""
buffer = ctypes.create_string_buffer(100)
key = libc.syscall({keyctl}, 10, -3, b"user", b"of-b", 0)  # KEYCTL_SEARCH
if key > 0 and libc.syscall({keyctl}, 11, key, buffer, 100) > 0:  # KEYCTL_READ
    look("keyring", buffer.raw)
"""
    leaks = []
    for mode, server in servers:
        a, b = server.lease(2)
        arena = Arena(server, mode, a, b, "", "", 0, 0)
        if "FOUND" not in arena.run(b, LOOK + put + "\n" + get):
            continue  # keys can't be used in slots at all
        if "FOUND" in arena.run(a, LOOK + get):
            leaks.append(mode)
    assert leaks == []


# Descriptors


def test_a_command_inherits_no_descriptor_but_its_three(arena: Arena) -> None:
    listing = arena.server.bash(arena.a, "ls -l /proc/self/fd | tail -n +2 | sed 's/.*[0-9:]* \\([0-9]* -> .*\\)/\\1/'")[
        "stdout"
    ]
    found = dict(line.split(" -> ") for line in listing.splitlines())
    assert sorted(found) == ["0", "1", "2", "3"]
    assert found["0"] == "/dev/null"
    assert found["2"].startswith("pipe:")
    assert found["3"].endswith("/fd")  # the listing's own
    shell = arena.server.bash(arena.a, "for fd in /proc/$$/fd/*; do echo ${fd##*/}; done; sleep 0")["stdout"].split()
    assert set(shell) <= {"0", "1", "2", "3", "255"}  # the pattern's own, and bash's
    code = "import os; print(sorted(int(n) for n in os.listdir('/proc/self/fd'))[:-1])"
    for _ in range(2):  # in the shell that was waiting, and in one started for it
        assert arena.server.bash(arena.a, f'{PYTHON} -c "{code}"')["stdout"] == "[0, 1, 2]\n"
    assert arena.run(arena.a, code) == "[0, 1, 2]\n"


TAKE_DESCRIPTORS = r"""
for pid in given or [pid for pid in visible() if pid != os.getppid()]:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        continue
    for n in range(256):
        fd = libc.syscall(438, pidfd, n, 0)  # pidfd_getfd
        if fd < 0:
            continue
        mode, target = os.fstat(fd).st_mode, os.readlink(f"/proc/self/fd/{fd}")
        if not stat.S_ISFIFO(mode) and target != "/dev/null":
            print("TAKEN", pid, n, target)
            if stat.S_ISREG(mode):
                attempt(os.write, fd, ("PLANTED" + "-IN-THE-LOG\n").encode())
        os.close(fd)
"""


@pytest.mark.parametrize("mode", ISOLATED)
def test_no_descriptor_of_the_server_can_be_taken_from_a_process_in_the_slot(
    start_server: StartServer, mode: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """``capfd`` makes the server's standard error, which all its children have, a file."""
    server = start_server(mode)
    (a,) = server.lease()
    arena = Arena(server, mode, a, a, "", "", 0, 0)
    background = server.bash(a, "exec 7<>own; sleep 1000 >/dev/null 2>&1 & echo $!")["stdout"].split()
    assert "TAKEN" in arena.run(a, LOOK + TAKE_DESCRIPTORS, given=[int(background[0])]), "the attack does not work"
    server.bash(a, f"kill {background[0]}")
    taken = [line for line in arena.run(a, LOOK + TAKE_DESCRIPTORS).splitlines() if "TAKEN" in line]
    logged = capfd.readouterr().err
    assert taken == []
    assert "PLANTED-IN-THE-LOG" not in logged


# Another process in the slot also has the nursery's socket, if it inherits it: what a slot could do with that.
BE_THE_NURSERY = r"""
import array
pidfd = os.pidfd_open(1)
for n in range(3, 256):
    fd = libc.syscall(438, pidfd, n, 0)  # pidfd_getfd
    if fd >= 0 and stat.S_ISSOCK(os.fstat(fd).st_mode):
        with socket.socket(fileno=fd) as sock, open("orders", "ab", 0) as log:
            log.write(b"waiting\n")
            while True:
                message, control, *_ = sock.recvmsg(1 << 18, socket.CMSG_SPACE(8))
                if not message:
                    break
                log.write(b"STOLEN " + message + b"\n")
"""


@pytest.mark.parametrize("mode", ["bwrap", "bwrap-as-user"])
def test_a_slot_cannot_take_the_servers_orders_for_other_slots(start_server: StartServer, mode: str) -> None:
    server = start_server(mode)
    a, b = server.lease(2)
    server.client.write_file(a["slot"], a["token"], "thief.py", (LOOK + BE_THE_NURSERY).encode())
    thieves = f"for i in 1 2 3 4; do {PYTHON} thief.py >/dev/null 2>&1 & done; sleep 1"
    server.bash(a, thieves, env={"NEEDLE": "x", "GIVEN": "null"})
    for _ in range(5):
        server.client.lease("test", 30.0, 0, [b["token"]])
        got = server.client.lease("test", 30.0, 1, wait=20)["leases"]
        assert "STOLEN" not in server.bash(a, "cat orders 2>/dev/null")["stdout"]
        (b,) = got
        assert server.bash(b, "echo alive")["stdout"] == "alive\n"


def test_the_zygote_can_be_neither_read_nor_traced(arena: Arena) -> None:
    """Its descriptors lead to the server, and it runs as the slot's own user."""
    code = r"""
zygote = int(given)
for name in ("environ", "maps", "mem", "auxv", "fd/0", "cwd", "root", "exe"):
    try:
        if name in ("cwd", "root", "exe"):
            os.readlink(f"/proc/{zygote}/{name}")
        else:
            os.close(os.open(f"/proc/{zygote}/{name}", os.O_RDONLY))
            with open(f"/proc/{zygote}/{name}", "rb") as f:
                f.read(1)
        print("READ", name)
    except PermissionError:
        print("denied", name)
    except OSError as e:
        print("other", name, e)
for n in range(64):
    if libc.syscall(438, os.pidfd_open(zygote), n, 0) >= 0:
        print("READ descriptor", n)
try:
    print("READ", os.listdir(f"/proc/{zygote}/fd"))
except PermissionError:
    print("denied list")
if libc.ptrace(16, zygote, None, None) == 0:
    print("READ by ptrace")
    os._exit(0)
"""
    zygote = arena.server.bash(arena.a, "echo $PPID")["stdout"].strip()
    told = arena.run(arena.a, LOOK + code, given=zygote)
    assert "READ" not in told
    assert told.count("denied") >= 6
    arena.assert_unharmed()


# Rights


def test_a_command_has_no_capability_and_can_get_none(arena: Arena) -> None:
    status = arena.server.bash(arena.a, "cat /proc/self/status")["stdout"]
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(fields[name], 16) == 0, name
    assert fields["NoNewPrivs"] == "1"
    assert "0" not in fields["Uid"].split()
    assert "0" not in fields["Gid"].split()
    assert "0" not in fields["Groups"].split()


ESCALATE = r"""
import subprocess
MS_BIND, NEWUSER, NEWNS = 4096, 0x10000000, 0x20000
O_EXCL = os.O_EXCL

def call(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), "")

def unshared():
    pid = os.fork()
    if pid == 0:
        ok = libc.unshare(NEWUSER | NEWNS) == 0
        os._exit(0 if ok else 1)
    if os.waitpid(pid, 0)[1] != 0:
        raise OSError("unshare")

def run(*argv):
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=10)
    if done.returncode:
        raise OSError(done.stdout)

def writes(path):
    with open(path, "r+b", 0) as f:
        same = f.read(4096)
        f.seek(0)
        f.write(same)  # nothing changes, even if it may be written

os.mkdir("m")
ways = {
    "setuid": lambda: os.setuid(0),
    "setresuid": lambda: os.setresuid(0, 0, 0),
    "setgid": lambda: os.setgid(0),
    "setgroups": lambda: os.setgroups([0]),
    "chroot": lambda: os.chroot("."),
    "mknod": lambda: os.mknod("null", 0o600 | stat.S_IFCHR, os.makedev(1, 3)),
    "mknod-disk": lambda: os.mknod("disk", 0o600 | stat.S_IFBLK, os.makedev(8, 0)),
    "mount": lambda: call(libc.mount(b"none", b"m", b"tmpfs", 0, None)),
    "bind": lambda: call(libc.mount(b"/usr", b"m", None, MS_BIND, None)),
    "remount": lambda: call(libc.mount(None, b"/", None, 32, None)),
    "umount": lambda: call(libc.umount2(b"/proc", 2)),
    "pivot_root": lambda: call(libc.syscall(155 if os.uname().machine == "x86_64" else 41, b".", b"m")),
    "chown": lambda: os.chown("m", 0, 0),
    "sethostname": lambda: call(libc.sethostname(os.uname().nodename.encode(), len(os.uname().nodename))),
    "nice": lambda: os.setpriority(os.PRIO_PROCESS, 0, -5),
    "raw": lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP).close(),
    "packet": lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close(),
    "su": lambda: run("su", "-c", "true"),
    "mount-binary": lambda: run("mount", "-t", "tmpfs", "none", "m"),
    "unshare-mount": lambda: run("unshare", "-m", "true"),
    "nsenter": lambda: run("nsenter", "-t", "1", "-m", "true"),
    "setns": lambda: call(libc.setns(os.open("/proc/%d/ns/mnt" % given["server"], os.O_RDONLY), 0)),
    "kmem": lambda: os.open("/dev/kmsg", os.O_RDONLY),
    "mem": lambda: os.open("/dev/mem", os.O_RDONLY),
    "kcore": lambda: os.read(os.open("/proc/kcore", os.O_RDONLY), 16),
    "sysrq": lambda: os.close(os.open("/proc/sysrq-trigger", os.O_WRONLY)),
    "shadow": lambda: open("/etc/shadow").close(),
    "passwd": lambda: open("/etc/passwd", "a").close(),
    "usr": lambda: open("/usr/planted", "w").close(),
    "root": lambda: os.mkdir("/planted"),
    "proc-1-root": lambda: open("/proc/1/root/etc/shadow").close(),
    "disk": lambda: [os.open(path, os.O_RDONLY) for path in glob.glob("/dev/[svx]d[a-z]*") or ["/none"]],
    "cgroup": lambda: os.mkdir("/sys/fs/cgroup/planted"),
}
if given["namespaces"]:
    ways["unshare"] = unshared
    ways["unshare-binary"] = lambda: run("unshare", "-U", "true")
for name, way in ways.items():
    try:
        way()
    except (OSError, subprocess.TimeoutExpired):
        print("denied", name)
    else:
        print("DONE", name)
"""


def test_no_right_can_be_had(arena: Arena) -> None:
    # With Landlock no mount can be made in any namespace; without it and in user mode, one of its own is no way to others.
    given = {"namespaces": arena.mode != "user", "server": arena.server.process.pid}
    told = arena.run(arena.a, LOOK + ESCALATE, given=given)
    assert "DONE" not in told
    assert told.count("denied") > 30
    assert not Path("/usr/planted").exists()
    arena.assert_unharmed()


def test_a_user_namespace_of_ones_own_leads_nowhere(arena: Arena, victim: Path) -> None:
    """Where one can be made at all, it maps no one else."""
    code = f"""
unshare -Urm sh -c '
mount -t tmpfs none /mnt && echo MOUNTED
mount --bind / . && echo MOUNTED
mount -o remount,rw / && echo MOUNTED
cat {arena.outside(arena.name)} /etc/shadow
echo x > {victim}
cat /proc/{arena.server.process.pid}/environ
[ {arena.mode} = user ] && kill -0 {arena.server.process.pid} && echo SIGNALLED'
true"""
    arena.server.bash(arena.a, "touch sleeper")
    result = arena.server.bash(arena.a, code)
    assert arena.secret not in result["stdout"]
    for word in ("SIGNALLED", "root:"):
        assert word not in result["stdout"], result
    if arena.mode != "user" or arena.landlock:
        assert "MOUNTED" not in result["stdout"], result
    arena.assert_unharmed()


WRITE_SYSTEM = r"""
for top in ("/proc/sys", "/sys"):
    for directory, _, names in os.walk(top):
        if time.monotonic() > deadline:
            sys.exit("it takes too long")
        for name in names:
            path = os.path.join(directory, name)
            try:
                fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                same = os.read(fd, 4096)
                os.lseek(fd, 0, 0)
                os.write(fd, same)  # nothing changes, even if it may be written
                print("WRITTEN", path)
            except OSError:
                pass
            finally:
                os.close(fd)
"""


# ipc_namespaces(7); pid_max is each PID namespace's own as of Linux 6.14, and not for slots to write before that.
OWN_SETTINGS = re.compile(
    r"WRITTEN /proc/sys/(fs/mqueue/\w+|kernel/(msgmax|msgmnb|msgmni|auto_msgmni|sem|shmall|shmmax|shmmni|shm_rmid_forced"
    r"|pid_max))\Z"
)


def test_no_setting_of_the_kernel_can_be_written(arena: Arena) -> None:
    told = arena.run(arena.a, LOOK + WRITE_SYSTEM)
    written = [line for line in told.splitlines() if line.startswith("WRITTEN")]
    if arena.mode != "user":  # those of its own namespaces concern nobody else
        inside = arena.server.bash(arena.a, "readlink /proc/self/ns/ipc /proc/self/ns/pid")["stdout"].split()
        assert not {*inside} & {os.readlink("/proc/self/ns/ipc"), os.readlink("/proc/self/ns/pid")}
        written = [line for line in written if not OWN_SETTINGS.match(line)]
    assert written == []


# Network


@pytest.mark.parametrize("mode", ["bwrap", "bwrap-as-user"])
def test_without_network_there_is_only_a_loopback_of_the_slots_own(start_server: StartServer, mode: str) -> None:
    server = start_server(mode)
    a, b = server.lease(2)
    assert not a["network"]
    connect = f"""{PYTHON} -c 'import socket, sys
try:
    socket.create_connection(("127.0.0.1", int(sys.argv[1])), 3); print("CONNECTED")
except OSError as e:
    print("refused", e)' """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port), 3).close()
        assert "refused" in server.bash(a, f"{connect} {port}")["stdout"]
    listen = f"""{PYTHON} -c 'import socket, time
s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1], flush=True); time.sleep(1000)' > port 2>&1 &
until [ -s port ]; do sleep 0.05; done; cat port"""
    port = int(server.bash(b, listen)["stdout"])
    assert server.bash(b, f"{connect} {port}")["stdout"] == "CONNECTED\n"
    assert "refused" in server.bash(a, f"{connect} {port}")["stdout"]
    devices = server.bash(a, "tail -n +3 /proc/net/dev")["stdout"].splitlines()
    assert [line.partition(":")[0].strip() for line in devices] == ["lo"]
    assert server.bash(a, "tail -n +2 /proc/net/route")["stdout"] == ""


# One lease after another

LEAVE = r"""
secret = ("B-SEC" + "RET-" + "0" * 32).encode()
name = given["name"]
here = os.getcwd()
os.makedirs("deep/" * 50)
os.mkdir("closed")
for directory in {here, here + "/closed", os.environ["TMPDIR"], "/tmp", "/var/tmp", "/dev/shm"}:
    for file in (name, "." + name):
        with open(f"{directory}/{file}", "wb") as f:
            f.write(secret)
        os.chmod(f"{directory}/{file}", 0o666)
    inner = f"{directory}/{name}.d"
    os.mkdir(inner)
    with open(inner + "/file", "wb") as f:
        f.write(secret)
    os.chmod(inner, 0)
os.chmod("closed", 0)
shm = libc.shmget(given["key"], 4096, 0o1666)
ctypes.memmove(libc.shmat(shm, None, 0), secret, len(secret))
libc.semget(given["key"], 1, 0o1666)
if given["queue"]:
    libc.msgget(given["key"], 0o1666)
listener = socket.create_server(("127.0.0.1", 0))
abstract = socket.socket(socket.AF_UNIX)
abstract.bind("\0" + name)
abstract.listen()
for act in ("ignore", "stop", "plain"):
    if os.fork() == 0:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        for fd in range(3):
            os.dup2(os.open("/dev/null", os.O_RDWR), fd)
        if act == "ignore":
            for number in range(1, 32):
                if number not in (9, 19):
                    signal.signal(number, signal.SIG_IGN)
        open(f"running-{act}", "w").close()
        if act == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        os.execv("/usr/bin/python3", ["/usr/bin/python3", "-c", "import time; time.sleep(1000)", name])
while not all(os.path.exists(f"running-{act}") for act in ("ignore", "stop", "plain")):
    time.sleep(0.01)
print(json.dumps({"port": listener.getsockname()[1], "uid": os.getuid()}))
if os.fork() == 0:
    for fd in range(3):
        os.dup2(os.open("/dev/null", os.O_RDWR), fd)
    time.sleep(1000)
"""

FIND = r"""
name, key = given["name"], given["key"]
for path in os.listdir("."):
    print("LEFT", path)
for directory in (".", os.environ["TMPDIR"], "/tmp", "/var/tmp", "/dev/shm"):
    for file in (name, "." + name, name + ".d"):
        if os.path.lexists(f"{directory}/{file}"):
            print("LEFT", directory, file)
    for file in attempt(os.listdir, directory) or []:
        if directory == os.environ["TMPDIR"] or name in file:
            print("LEFT", directory, file)
for pid in visible():
    look_in(f"/proc/{pid}/environ")
    if name.encode() in (attempt(read, f"/proc/{pid}/cmdline") or b""):
        print("LEFT process", pid)
for kind, get, args in (("shm", libc.shmget, (0, 0)), ("sem", libc.semget, (0, 0)), ("msg", libc.msgget, (0,))):
    if get(key, *args) >= 0:
        print("LEFT", kind)
    with open(f"/proc/sysvipc/{kind}") as f:
        for line in f.readlines()[1:]:
            if int(line.split()[0]) == key:
                print("LEFT", kind, line)
for family, address in ((socket.AF_INET, ("127.0.0.1", given["port"])), (socket.AF_UNIX, "\0" + name)):
    with socket.socket(family) as sock:
        sock.settimeout(3)
        if sock.connect_ex(address) == 0:
            print("LEFT socket", address)
with open("/proc/net/unix") as f:
    if name in f.read():
        print("LEFT abstract socket")
"""


@pytest.mark.parametrize("queue", [False, True], ids=["", "queue"])
@pytest.mark.parametrize("end", ["release", "reset"])
@pytest.mark.parametrize("mode", ISOLATED)
def test_the_next_lease_finds_nothing_of_the_last(
    start_server: StartServer, remains: list[str], mode: str, end: str, queue: bool
) -> None:
    server = start_server(mode, slots=1)
    (lease,) = server.lease()
    name, key = f"of-b-{secrets.token_hex(8)}", secrets.randbelow(1 << 30) + 1
    arena = Arena(server, mode, lease, lease, "", name, key, 0)
    given: dict[str, Any] = {"name": name, "key": key, "port": 0, "queue": queue}
    remains += [name, str(key)]
    told = json.loads(arena.run(lease, LOOK + LEAVE, given=given))
    given["port"] = told["port"]
    left = arena.run(lease, LOOK + FIND, given=given)
    for what in (
        "LEFT process",
        "LEFT shm",
        "LEFT sem",
        "LEFT msg"[: 8 if queue else 4],
        "LEFT /tmp",
        "LEFT /var/tmp",
        "LEFT /dev/shm",
        "LEFT socket",
    ):
        assert what in left, f"the search finds no {what}"
    if end == "release":
        server.client.lease("test", 30.0, 0, [lease["token"]])
        (lease,) = server.lease()
    else:
        server.client.reset(lease["slot"], lease["token"])
    assert arena.run(lease, LOOK + FIND, given=given) == ""
    # In user mode the directories are the machine's own; nothing may be left where the next lease can't see it either.
    alive = [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if name in _text(path)]
    assert alive == []
    for directory in SHARED:
        assert not [path for path in os.listdir(directory) if name in path]


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


@pytest.fixture
def remains() -> Iterator[list[str]]:
    """Names and System V keys of what a test's slots make for all to see: removed at its end, if the server failed to."""
    names: list[str] = []
    yield names
    for directory in map(Path, SHARED):
        for path in [path for name in names if name.startswith("of-b-") for path in directory.glob(f"*{name}*")]:
            if path.is_dir():
                path.chmod(0o700)
                shutil.rmtree(path)
            else:
                path.unlink()
    for name in filter(str.isdigit, names):
        for option in ("-M", "-S", "-Q"):
            subprocess.run(["ipcrm", option, name], check=False, capture_output=True)


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory in /tmp in which everybody may write, like /tmp/.X11-unix of a machine with a desktop."""
    path = Path(tempfile.mkdtemp(prefix="test-isolation-", dir="/tmp"))
    path.chmod(0o1777)
    yield path
    shutil.rmtree(path)


def test_what_a_lease_leaves_in_open_directories_below_shared_ones_is_removed_too(
    start_server: StartServer, open_directory: Path
) -> None:
    server = start_server("user", slots=1)
    (lease,) = server.lease()
    path = open_directory / "left"
    if server.bash(lease, f"umask 0; echo secret > {path}; mkdir {open_directory}/d; echo x > {open_directory}/d/x")[
        "exit_code"
    ]:
        return  # it can't be written at all
    server.client.lease("test", 30.0, 0, [lease["token"]])
    (lease,) = server.lease()
    assert server.bash(lease, f"cat {path} {open_directory}/d/x")["stdout"] == ""
    assert os.listdir(open_directory) == []


def test_a_slot_cannot_keep_another_from_being_made_clean(start_server: StartServer) -> None:
    """By files in a directory that the other one has opened to all."""
    server = start_server("user")
    a, b = server.lease(2)
    name = f"/tmp/of-b-{secrets.token_hex(8)}"
    try:
        assert server.bash(b, f"mkdir -m 777 {name}")["exit_code"] == 0
        server.bash(a, f"mkdir -p {name}/a/a && echo x > {name}/a/a/file && chmod 700 {name}/a")
        server.client.lease("test", 30.0, 0, [b["token"]])
        assert wait_until(lambda: server.client.health()["counts"]["preparing"] == 0)
        assert server.client.health()["counts"]["quarantined"] == 0
    finally:
        shutil.rmtree(name, ignore_errors=True)
