"""One lease after another: nothing of the last is left for the next."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from arena import LOOK, PYTHON, SHARED, Arena, Contained, Standing, standing_with
from attacks import attack
from conftest import ISOLATED, StartServer, wait_until

single = standing_with(slots=1)

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
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)", name])
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


@attack(
    "leave files, closed directories, IPC objects, sockets and hidden daemons (setsid, double fork, deaf to signals, stopped)",
    "the next lease finds none, none lives",
)
@pytest.mark.parametrize("queue", [False, True], ids=["", "queue"])
@pytest.mark.parametrize("end", ["release", "reset"])
@pytest.mark.parametrize("mode", [*ISOLATED, "docker"])
def test_the_next_lease_finds_nothing_of_the_last(
    single: Standing, remains: list[str], mode: str, end: str, queue: bool
) -> None:
    server = single(mode)
    (lease,) = server.lease()
    name, key = f"of-b-{secrets.token_hex(8)}", secrets.randbelow(1 << 30) + 1
    kind, python = (Contained, "python3") if mode == "docker" else (Arena, PYTHON)
    arena = kind(server, mode, lease, lease, "", name, key, 0, python)
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
    assert not [path for path in arena.listing(list(SHARED)) if name in path]
    server.client.lease("test", 30.0, 0, [lease["token"]])
    assert server.free(1)


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


@attack("leave files in open directories below /tmp", "removed")
def test_what_a_lease_leaves_in_open_directories_below_shared_ones_is_removed_too(
    start_server: StartServer, open_directory: Path
) -> None:
    server = start_server("user", slots=1)
    (lease,) = server.lease()
    path = open_directory / "left"
    write = f"umask 0; echo secret > {path}; mkdir {open_directory}/d; echo x > {open_directory}/d/x"
    if server.bash(lease, write)["exit_code"]:
        pytest.skip("slots can't write there at all")
    server.client.lease("test", 30.0, 0, [lease["token"]])
    (lease,) = server.lease()
    assert server.bash(lease, f"cat {path} {open_directory}/d/x")["stdout"] == ""
    assert os.listdir(open_directory) == []


@attack("fill another's open directory, so that it can't be removed", "it is made clean all the same")
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
