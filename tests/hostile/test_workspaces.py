"""Another slot's files, by its code and by the server's own hand."""

from __future__ import annotations

import os
import re
from pathlib import Path

from arena import LOOK, SHARED, Arena
from attacks import attack

from slotpool.errors import FileError


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


@attack("read another's workspace: paths, .., links, /proc/*/root, openat", "nothing of it is read or listed", docker=True)
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


@attack("read a workspace that its owner has opened to all (chmod 777)", "nothing of it is read or listed", docker=True)
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


@attack(
    "write, truncate, link, rename, chmod another's, the server's and the machine's files", "nothing is changed", docker=True
)
def test_another_slots_files_cannot_be_changed(arena: Arena, victim: Path) -> None:
    path = Path(arena.outside(arena.name))
    server_files = [str(arena.state / "lock"), str(arena.state / "http.sock"), str(arena.state / "etc" / "passwd")]
    told = arena.run(arena.a, LOOK + WRITE_FILES, given=[str(path), str(path.with_name("ready")), *server_files, str(victim)])
    assert "DONE" not in told
    arena.assert_unharmed()
    again = LOOK + "import shutil; shutil.rmtree('mine'); os.unlink('root')\n" + WRITE_FILES
    if not arena.own_users:  # there is a directory of that name for A too, but it's A's
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


@attack("read and change another's files, FIFOs in /tmp, /var/tmp, /dev/shm", "nothing is read or changed", docker=True)
def test_files_in_shared_directories_are_their_slots_own(arena: Arena) -> None:
    given = {"directories": SHARED, "name": arena.name}
    told = arena.steal(READ_SHARED, given)
    if not arena.own_users or arena.landlock:
        assert "LISTED" not in told
    paths = [f"{directory}/{arena.name}" for directory in SHARED]
    told = arena.run(arena.a, LOOK + WRITE_FILES, given=paths)
    if arena.own_users:  # in bwrap mode the attacker has such directories of its own
        assert not re.search(rf"DONE \w+ .*{arena.name}", told)
    arena.assert_unharmed()


@attack("have read_file follow symbolic links out of the workspace", "only what the slot's own code can read", docker=True)
def test_the_file_api_reads_nothing_that_the_slots_code_could_not(arena: Arena) -> None:
    client, a = arena.server.client, arena.a
    b_file = arena.outside(arena.name)
    server = arena.pid
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
        assert not arena.own_users
        seen = arena.server.bash(a, f"od -An -v -tx1 {path} | tr -d ' \\n'")["stdout"]
        assert content.hex() == seen
        assert arena.secret.encode() not in content
        assert b"SLOTPOOL" not in content
    arena.assert_unharmed()


@attack("have write_file follow symbolic links out of the workspace", "nothing outside is written", docker=True)
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
    before = arena.listing([str(arena.state)]), arena.as_root(["cat", str(arena.state / "lock")])
    paths = ["victim", "victim_directory/new", "victim_directory/victim", "b", "b_directory/new", f"b_directory/{arena.name}"]
    paths += ["lock", "state/new", "state/a/b", "proc/core_pattern", "proc/new", f"root{b_file}", f"root{victim}"]
    for path in paths:
        try:
            client.write_file(a["slot"], a["token"], path, b"planted")
        except FileError:
            continue
        assert not arena.own_users, path  # a bwrap slot can have such a path in a /tmp of its own
        assert not path.startswith("proc/")
    assert (arena.listing([str(arena.state)]), arena.as_root(["cat", str(arena.state / "lock")])) == before
    arena.assert_unharmed()
    client.write_file(a["slot"], a["token"], "own", b"x")
    arena.server.bash(a, "ln -s own link")
    client.write_file(a["slot"], a["token"], "link", b"through")
    assert client.read_file(a["slot"], a["token"], "own") == b"through"


@attack(
    "swap a directory for a link while files are read and written (race)", "nothing outside is read or written", docker=True
)
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
    arena.server.bash(a, f"{arena.python} swap.py >/dev/null 2>&1 & until [ -e swapping ]; do sleep 0.01; done")
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
    assert arena.as_root(["cat", str(arena.state / "lock")]) == ""
    arena.assert_unharmed()
