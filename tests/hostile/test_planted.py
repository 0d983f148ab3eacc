"""What a slot makes for the server to trip over, before its files are read or written, and before it is made clean."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import pytest
from arena import LOOK, Arena, standing_with
from attacks import Figure, attack

from slotpool.errors import ContainerLost, FileError

pytestmark = pytest.mark.arenas("bwrap", "user", "docker")
ENTRIES = int(os.environ.get("SLOTPOOL_ENTRIES", "6000"))  # read here, as every test's environment is cleared of it
MOST_GROWTH = 64 << 20  # bytes of the server's memory
standing = standing_with(slots=3)


def do(arena: Arena, command: str) -> str:
    """In the attacker's slot."""
    result = arena.server.bash(arena.a, command, timeout=60.0)
    assert result["exit_code"] == 0, result
    return str(result["stdout"])


def read(arena: Arena, path: str) -> bytes | int:
    """A file's content, or the error's number."""
    try:
        return arena.server.client.read_file(arena.a["slot"], arena.a["token"], path)
    except FileError as e:
        return e.errno or -1


def write(arena: Arena, path: str, content: bytes = b"planted") -> int:
    try:
        arena.server.client.write_file(arena.a["slot"], arena.a["token"], path, content)
    except FileError as e:
        return e.errno or -1
    return 0


def reset(arena: Arena) -> None:
    """It comes back clean, and works."""
    arena.server.client.reset(arena.a["slot"], arena.a["token"])
    assert do(arena, "ls -A; echo well") == "well\n"


LINK = r"""
for n, path in enumerate(given):
    try:
        os.link(path, f"hard{n}")
        print("LINKED", path)
    except OSError:
        pass
"""


@attack(
    "hard links to another's, the server's and the machine's files, before write_file and reset", "those files stay as they are"
)
def test_hard_links_lead_the_file_api_to_nobody(arena: Arena) -> None:
    outside = Path(arena.outside(arena.name))
    paths = [str(outside), str(outside.with_name("ready")), str(arena.state / "lock"), "/etc/passwd", "/usr/bin/env"]
    told = arena.run(
        arena.a, LOOK + LINK, given=[*paths, *(f"{directory}/{arena.name}" for directory in arena.directories[1:])]
    )
    assert "LINKED" not in told
    do(arena, "echo mine > a; ln a b; ln a d 2>&1; mkdir dir; ln a dir/c")
    assert write(arena, "a", b"changed") == 0
    assert do(arena, "cat b dir/c; stat -c %h b") == "mine\nmine\n3\n"  # the name was given to another file
    reset(arena)
    arena.assert_unharmed()


@attack("FIFOs, sockets, devices and links to them, before read_file, write_file and reset", "refused at once, nothing hangs")
def test_only_regular_files_are_read_and_written(arena: Arena) -> None:
    do(
        arena,
        "mkfifo fifo; ln -s fifo to-fifo; ln -s fifo/x through-fifo; mkdir directory; "
        "for d in zero null full random tty ptmx stdin stdout fd/0 fd/1; do ln -s /dev/$d dev-${d/\\//-}; done; "
        "ln -s /proc/self/fd/0 fd0; ln -s /proc/self/fd/1 fd1; ln -s /proc/self/fd/2 fd2; ln -s loop loop; "
        f"{arena.python} -c 'import socket; s = socket.socket(socket.AF_UNIX); s.bind(\"socket\"); s.listen()'",
    )
    allowed = {
        errno.EINVAL,
        errno.ENXIO,
        errno.ENODEV,
        errno.EACCES,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.ENOENT,
    }
    names = do(arena, "ls").split()
    assert len(names) == 19
    for name in names:
        for got in (read(arena, name), write(arena, name)):
            assert got in allowed, (name, got)  # and not ETIMEDOUT, or a content
    assert do(arena, "timeout 1 cat fifo || echo hangs") == "hangs\n", "the attack does not work"
    assert write(arena, "fine") == 0
    reset(arena)
    arena.assert_unharmed()


@attack("sparse files of terabytes, before read_file, write_file and reset", "bounded; the server's memory too")
def test_sparse_files_cost_nothing(arena: Arena) -> None:
    before = arena.memory()
    assert do(arena, "truncate -s 4T huge; truncate -s 200M large; stat -c %s huge") == f"{4 << 40}\n"
    assert read(arena, "huge") == errno.EFBIG
    content = read(arena, "large")
    assert isinstance(content, bytes)
    assert len(content) == 200 << 20
    assert write(arena, "huge", b"small now") == 0
    assert read(arena, "huge") == b"small now"
    do(arena, "truncate -s 4T huge")
    reset(arena)
    assert arena.memory() - before < MOST_GROWTH
    arena.assert_unharmed()


CHANGE = r"""
import itertools
for n in itertools.count():
    with open("file", "r+b") as f:
        f.truncate(0 if n % 3 == 0 else 1 << 24)
    if n == 10:
        open("changing", "x").close()
"""


@attack("a file that grows and shrinks while it is read", "read_file gives as much as it said, or an error")
def test_a_file_that_changes_meanwhile_ends_no_connection_and_no_slot(arena: Arena) -> None:
    assert write(arena, "change.py", CHANGE.encode()) == 0
    do(arena, f": > file; {arena.python} change.py >/dev/null 2>&1 & until [ -e changing ]; do sleep 0.01; done")
    seen: set[int | str] = set()
    while len(seen) < 2:  # else the race was not won
        try:
            got = read(arena, "file")
        except ContainerLost:  # the connection ended amid the content, each time that it was asked for
            seen.add("cut")
            continue
        seen.add(got if isinstance(got, int) else "whole")
        assert isinstance(got, bytes) or got == errno.EIO
        assert isinstance(got, int) or len(got) <= 1 << 24
    arena.assert_unharmed()
    reset(arena)


HOLD = r"""
fd = os.open("leased", os.O_RDWR | os.O_CREAT)
os.write(fd, b"leased")
signal.signal(signal.SIGIO, signal.SIG_IGN)
fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
locked = open("locked", "w+")
locked.write("locked")
locked.flush()
fcntl.flock(locked, fcntl.LOCK_EX)
fcntl.lockf(locked, fcntl.LOCK_EX)
open("held", "x").close()
signal.pause()
"""


@attack("file leases (F_SETLEASE) and locks on what is read, written and removed", "nobody waits for them")
def test_nobody_waits_for_a_slots_locks(arena: Arena) -> None:
    assert write(arena, "hold.py", (LOOK + HOLD).encode()) == 0
    env = "NEEDLE=x GIVEN=null"
    do(
        arena,
        f"{env} {arena.python} hold.py >log 2>&1 & for i in {{1..200}}; do [ -e held ] && exit; sleep 0.05; done; cat log",
    )
    assert do(arena, "timeout 1 cat leased; echo $?") == "124\n", "the attack does not work"
    assert read(arena, "leased") == errno.EAGAIN
    assert read(arena, "locked") == b"locked"
    assert write(arena, "leased") == 0
    assert write(arena, "locked") == 0
    reset(arena)
    arena.assert_unharmed()


PLANT = r"""
os.mkdir("many")
os.chdir("many")
for n in range(given // 2):
    os.mknod(f"{n}")
for n in range(given // 4):
    os.mkdir(f"d{n}")
    os.symlink("/etc", f"l{n}")
os.chdir("..")
for name in (b"\xff\xfe", b"new\nline", b"x" * 255, b"-rf", b" ", b"\x1b[2J", "é".encode()):
    os.mkdir(name)
    open(name + b"/" + name, "x").close()
    os.link(name + b"/" + name, name + b"/.hard")
top = os.getcwd()
for n in range(500):
    os.mkdir("n" * 200)
    os.chdir("n" * 200)
    os.mknod("f")
os.chdir(top)
for mode in (0, 0o100, 0o400, 0o7000):
    os.mkdir(f"m{mode}")
    os.mknod(f"m{mode}/f", 0)
    os.chmod(f"m{mode}", mode)
"""


@attack(
    "directories with very many entries, 500 deep, closed, with hostile names, before read_file, write_file and reset",
    "read, written, made clean; meanwhile the neighbour is served",
)
def test_a_slot_is_made_clean_whatever_is_in_it(arena: Arena, figure: Figure) -> None:
    quiet = p95(arena)
    memory = arena.memory()
    arena.run(arena.a, LOOK + PLANT, given=ENTRIES)
    assert int(do(arena, "ls -f many | wc -l")) >= ENTRIES // 4 * 4
    assert read(arena, "many/1") == b""
    assert write(arena, "many/1", b"x") == 0
    arena.server.client.lease("test", 30.0, 0, [arena.a["token"]])
    began = time.perf_counter()
    beside = p95(arena)
    assert arena.server.free(2, 60 + ENTRIES / 1000), arena.server.client.health()["counts"]
    took = time.perf_counter() - began
    assert arena.memory() - memory < MOST_GROWTH
    figure(f"{ENTRIES} entries clean in {took:.1f} s, p95 {quiet * 1000:.1f} ms quiet, {beside * 1000:.1f} ms meanwhile")
    arena.assert_unharmed()


def p95(arena: Arena) -> float:
    taken = []
    for _ in range(40):
        began = time.perf_counter()
        assert arena.server.bash(arena.b, "echo well")["stdout"] == "well\n"
        taken.append(time.perf_counter() - began)
    return sorted(taken)[37]


RACE = r"""
import itertools
os.mkdir("real")
os.mkdir("real/inner")
os.symlink(given, "link")
open("racing", "x").close()
for n in itertools.count():
    attempt(os.mkdir, f"new{n}")
    attempt(os.symlink, given, f"new{n}/link")
    for a, b in (("real", "d"), ("link", "d"), ("link", "real/inner/x")):
        attempt(os.rename, a, b)
        attempt(os.rename, b, a)
    attempt(os.mknod, f"new{n}/f")
"""


@attack(
    "directories swapped for links, and new ones made, while the slot is reset (race)",
    "nothing outside is removed; it is clean",
)
def test_a_reset_removes_nothing_outside(arena: Arena) -> None:
    outside = arena.outside(arena.name)
    places = [os.path.dirname(outside), str(arena.state)]
    before = arena.listing(places)
    for n in range(6):
        assert write(arena, "race.py", (LOOK + RACE).encode()) == 0
        env = f"NEEDLE=x GIVEN='\"{places[n % 2]}\"'"
        do(
            arena,
            f"for i in 1 2; do {env} {arena.python} race.py >/dev/null 2>&1 & done; until [ -e racing ]; do sleep 0.01; done",
        )
        reset(arena)
        assert do(arena, "sleep 0.02; ls -A") == "", "somebody lives"
    assert arena.listing(places) == before
    arena.assert_unharmed()


MODULES = ("json", "os", "stat", "errno", "struct", "posixpath", "encodings", "sitecustomize", "usercustomize", "signal")
STARTERS = (".bashrc", ".bash_profile", ".profile", ".bash_login", ".inputrc", "bash_env", ".pythonrc")


@attack("start-up files and Python modules planted for the slot's own helpers and waiting shells", "nobody runs them unasked")
def test_what_looks_like_a_helpers_own_code_is_not_run(arena: Arena) -> None:
    for name in MODULES:
        assert write(arena, f"{name}.py", b"open('/tmp/RAN', 'w')\nraise SystemExit\n") == 0
    for name in STARTERS:
        assert write(arena, name, b"touch /tmp/RAN\n") == 0
    do(arena, "cp /bin/true bash; cp /bin/true cat; mkdir -p .local/bin; cp /bin/true .local/bin/bash; rm -f /tmp/RAN")
    for _ in range(5):
        assert read(arena, "nothing") == errno.ENOENT
        assert write(arena, "something") == 0
        assert do(arena, "echo well; [ -e /tmp/RAN ] && echo RAN || true") == "well\n"
    assert do(arena, "bash -lc true; [ -e /tmp/RAN ] && echo RAN; rm /tmp/RAN") == "RAN\n", "the attack does not work"
    reset(arena)
    arena.assert_unharmed()
