"""Where slots attack: a server with two leases, of which one has secrets, and what the attacks' code shares.

Each attack is run as well where it must succeed, in the attacked slot itself or as the server's own user, so that one that
has no effect is noticed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Callable

import attr
import pytest
from agents import why_no_docker
from conftest import ISOLATED, PACKAGE, Server, started_servers, why_not

from slotpool.fleet.nomad import image
from slotpool.sandbox.client import SandboxClient
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
    python: str = PYTHON
    before: str = ""

    @property
    def own_users(self) -> bool:
        """Whether nothing but their users keeps slots apart."""
        return self.mode in ("user", "docker")

    @property
    def state(self) -> Path:
        """The server's directory."""
        return Path(self.server.address[len("unix://") :]).parent

    @property
    def pid(self) -> int:
        """The server's process, as slots without a PID namespace see it."""
        return self.server.process.pid

    @property
    def pid_here(self) -> int:
        """The server's process, as this machine sees it."""
        return self.server.process.pid

    def processes(self) -> dict[int, int | None]:
        """The server's and all its descendants, those of slots too, with their users."""
        return {pid: _uid(pid) for pid in family(self.server.process.pid)}

    def as_root(self, command: list[str]) -> str:
        """What a command prints that root runs where the server is."""
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def listing(self, places: list[str]) -> list[str]:
        """What is where the server is, as root sees it."""
        return [name for place in places for name in sorted(os.listdir(place))]

    def held(self) -> tuple[int, int]:
        """Descriptors and threads of the server, once they don't change any more."""
        same, last, deadline = 0, (0, 0), time.monotonic() + 10
        while same < 20 and time.monotonic() < deadline:
            now = len(os.listdir(f"/proc/{self.pid_here}/fd")), self.threads()
            same, last = same + 1 if now == last else 0, now
            time.sleep(0.01)
        return last

    def threads(self) -> int:
        return len(os.listdir(f"/proc/{self.pid_here}/task"))

    def memory(self) -> int:
        """Bytes that the server has resident."""
        with open(f"/proc/{self.pid_here}/statm", encoding="ascii") as f:
            return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

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
        result = self.server.bash(lease, f"exec {self.python} -", timeout=60.0, stdin=code, env=env)
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
            f"{self.python} holder.py >log 2>&1 & "
            "for i in {1..400}; do [ -e ready ] && exit; sleep 0.05; done; cat log; exit 1",
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


class Contained(Arena):
    """A server in a default Docker container."""

    @property
    def state(self) -> Path:
        return Path(self.outside("ready")).parents[3]

    @property
    def pid(self) -> int:
        return 1

    @functools.cached_property
    def pid_here(self) -> int:
        return int(docker("inspect", "-f", "{{.State.Pid}}", _name_of(self.server)))

    def outside(self, name: str) -> str:
        return self.inside(f"find / -xdev -path '*/slots/*/workspace/{name}'").splitlines()[0]

    def as_root(self, command: list[str]) -> str:
        return docker("exec", _name_of(self.server), *command)

    def listing(self, places: list[str]) -> list[str]:
        return self.inside(f"ls -A {' '.join(places)}").splitlines()

    def processes(self) -> dict[int, int | None]:
        told = self.inside("ps -e -o pid=,uid=").splitlines()
        return {int(pid): int(uid) for pid, uid in map(str.split, told)}

    def inside(self, command: str) -> str:
        """What a command of root's prints in the container."""
        return docker("exec", _name_of(self.server), "sh", "-c", command)


def docker(*args: str, check: bool = True) -> str:
    done = subprocess.run(["docker", *args], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 or not check, f"docker {args}: {done.stderr}"
    return done.stdout.strip()


def _name_of(server: Server) -> str:
    """Of a server's container."""
    args = server.process.args
    assert isinstance(args, list)
    return str(args[args.index("--name") + 1])


@contextlib.contextmanager
def contained_server(image: str, *args: str, volume: str = "", memory: str = "") -> Iterator[Server]:
    """A server in a container of its own, with Docker's own settings but for these."""
    name = f"slotpool-test-{secrets.token_hex(4)}"
    token = "SLOTPOOL_TEST_" + "server_token"
    command = ["docker", "run", "--rm", "--name", name, "-e", "SLOTPOOL_TOKEN", "-p", "127.0.0.1::8080"]
    command += ["-v", volume] if volume else []
    command += ["--memory", memory, "--memory-swap", memory] if memory else []
    options = ["--host", "0.0.0.0", *args]
    # It is no process of this session's in the sense of slotpool_processes().
    environment = {key: value for key, value in os.environ.items() if key != "TMPDIR"} | {"SLOTPOOL_TOKEN": token}
    process = subprocess.Popen(
        [*command, image, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
    )
    assert process.stdout is not None
    with process.stdout:
        if not process.stdout.readline().startswith(b"http://"):
            raise AssertionError(f"the container has ended at once, with {process.wait(30)}")
    address = "http://" + docker("port", name, "8080/tcp").splitlines()[0]
    server = Server(process, SandboxClient(address, token, connections=100), address, token, "user")
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def serving(mode: str, *args: str, general: Sequence[str] = ()) -> Iterator[Server]:
    """``slotpool serve`` on a port of this machine's loopback.

    :param general: options that all commands have, before this one's.
    """
    if why_not(mode):
        pytest.skip(why_not(mode))
    token = "SLOTPOOL_TEST_" + "server_token"
    process = subprocess.Popen(
        [sys.executable, "-m", "slotpool", *general, "serve", "--port", "0", "--isolation", mode, *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": PACKAGE, "SLOTPOOL_TOKEN": token},
        cwd="/",
    )
    assert process.stdout is not None
    with process.stdout:
        address = process.stdout.readline().decode().strip()
    assert address.startswith("http://127.0.0.1:"), address
    server = Server(process, SandboxClient(address, token, connections=100), address, token, mode)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def sandbox_image() -> Iterator[str]:
    """The image as a checkout makes it; once for all tests, as that takes a while."""
    if why_no_docker():
        pytest.skip(why_no_docker())
    dockerfile = Path(__file__).resolve().parents[1] / "docker" / "Dockerfile"  # the package may be installed elsewhere
    base = re.search(r"^ARG BASE=(\S+)", dockerfile.read_text(), re.MULTILINE)
    assert base is not None
    if not image.exists(base[1]):
        pytest.skip(f"the base image {base[1]} is not here, and tests don't pull")
    name = f"slotpool-test-{secrets.token_hex(4)}:local"  # another test run may remove its own beside this one
    image.ensure(name)
    assert image.exists(name)
    yield name
    docker("image", "rm", "-f", name)


Standing = Callable[[str], Server]


def standing_with(tcp: bool = False, **settings: Any) -> Any:
    """A fixture: servers by mode that a module's tests share, each with leases of its own.

    :param tcp: they listen on a port, not on a Unix socket.
    """

    @pytest.fixture(scope="module")
    def standing(request: pytest.FixtureRequest) -> Iterator[Standing]:
        with contextlib.ExitStack() as stack:
            start = stack.enter_context(started_servers())

            @functools.cache
            def stand(mode: str) -> Server:
                options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
                if tcp and mode != "docker":
                    return stack.enter_context(serving(mode, *options))
                if mode == "docker":
                    image = request.getfixturevalue("sandbox_image")
                    return stack.enter_context(contained_server(image, *options))
                return start(mode, **settings)

            yield stand

    return standing


standing = standing_with(slots=3)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "arenas(mode, ...): instead of every isolation, and a container where an attack asks for it"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """An arena in every isolation, and in a container for those attacks that ask for one."""
    if "arena" in metafunc.fixturenames:
        cases = [mark for many in metafunc.definition.iter_markers("parametrize") for mark in _marks_of_cases(many)]
        marks = [*metafunc.definition.iter_markers("attack"), *cases]
        modes = [*ISOLATED, "docker"] if any(mark.kwargs["docker"] for mark in marks) else ISOLATED
        arenas = metafunc.definition.get_closest_marker("arenas")
        modes = list(arenas.args) if arenas is not None else modes
        metafunc.parametrize("arena", modes, indirect=True)


def _marks_of_cases(parametrize: pytest.Mark) -> list[pytest.Mark]:
    sets = [case.marks for case in parametrize.args[1] if isinstance(case, type(pytest.param()))]
    marks = [mark if isinstance(mark, pytest.Mark) else mark.mark for case in sets for mark in case]
    return [mark for mark in marks if mark.name == "attack"]


@pytest.fixture
def arena(request: pytest.FixtureRequest, standing: Standing) -> Iterator[Arena]:
    server = standing(request.param)
    leases = server.lease(2)
    try:
        yield make_arena(server, request.param, *leases)
    finally:
        server.client.lease("test", 30.0, 0, [lease["token"] for lease in leases])
    assert server.free(server.client.health()["slots"]), server.client.health()["counts"]


def make_arena(server: Server, mode: str, a: Lease, b: Lease) -> Arena:
    name = f"of-b-{secrets.token_hex(8)}"
    secret = "B-SECRET-" + secrets.token_hex(16)
    landlock = server.client.health()["landlock"]
    kind = Contained if mode == "docker" else Arena
    arena = kind(server, mode, a, b, secret, name, secrets.randbelow(1 << 30) + 1, landlock)
    arena.python = "python3" if mode == "docker" else PYTHON
    arena.settle()
    return arena


@pytest.fixture
def victim(arena: Arena) -> Iterator[Path]:
    """A file where the server is that everybody may read, and only the server's administrator write."""
    directory = Path("/var/tmp", f"test-isolation-{secrets.token_hex(4)}")
    path = directory / "victim"
    arena.as_root(["sh", "-c", f"umask 022; mkdir {directory}; printf unharmed >{path}"])
    yield path
    assert arena.as_root(["cat", str(path)]) == "unharmed"
    assert arena.listing([str(directory)]) == ["victim"]
    arena.as_root(["rm", "-r", str(directory)])


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


def _uid(pid: int) -> int | None:
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None
