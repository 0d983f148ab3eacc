"""The zygote, which starts a slot's commands as the slot's own user, and what leads from it to the server."""

from __future__ import annotations

import os

import pytest
from arena import LOOK, PYTHON, Arena, Standing
from attacks import attack
from conftest import ISOLATED, StartServer

from slotpool.errors import SlotBroken
from slotpool.sandbox import zygote

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


@attack("take the server's descriptors, its log, from the slot's own helpers", "none but pipes")
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


TALK_FOR_SHELLS = (
    f"tell = {zygote.TELL}"
    + r"""
taken = []
for pid in visible():
    pidfd = attempt(os.pidfd_open, pid)
    fd = libc.syscall(438, pidfd, tell, 0) if pidfd is not None else -1  # pidfd_getfd
    if fd >= 0 and stat.S_ISFIFO(os.fstat(fd).st_mode):
        taken.append(fd)
for fd in taken:
    os.set_blocking(fd, False)
    while attempt(os.write, fd, b"1234\n" * 1000):
        pass
print("TOLD", len(taken))
"""
)


@attack("take what a waiting shell tells its end by, tell nonsense in its name, without end", "calls go on as before")
@pytest.mark.parametrize("mode", ISOLATED)
def test_what_is_told_in_a_shells_name_is_bounded_and_needs_no_trust(standing: Standing, mode: str) -> None:
    server = standing(mode)
    (lease,) = server.lease()
    arena = Arena(server, mode, lease, lease, "", "", 0, 0)
    descriptors = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    told = arena.run(lease, LOOK + TALK_FOR_SHELLS)
    assert "TOLD" in told
    assert "TOLD 0" not in told, "the attack does not work"
    for _ in range(5):
        result = server.bash(lease, "echo well; exit 3")
        assert (result["stdout"], result["exit_code"]) == ("well\n", 3)
    assert len(os.listdir(f"/proc/{server.process.pid}/fd")) < descriptors + 50
    server.client.lease("test", 30.0, 0, [lease["token"]])
    assert server.free(3)


# Another process in the slot also has the nursery's socket, if it inherits it: what a slot could do with that.
BE_THE_NURSERY = r"""
import select
pidfd, taken = os.pidfd_open(given), []
for n in range(256):
    fd = libc.syscall(438, pidfd, n, 0)  # pidfd_getfd
    if fd >= 0 and stat.S_ISSOCK(os.fstat(fd).st_mode):
        taken.append(socket.socket(fileno=fd))
with open("orders", "ab", 0) as log:
    log.write(f"tried {n + 1} descriptors of {given}, took {len(taken)} sockets\n".encode())
    while taken:
        for sock in select.select(taken, [], [])[0]:
            message = sock.recv(1 << 18)
            if message:
                log.write(b"STOLEN " + message + b"\n")
            else:
                taken.remove(sock)
"""

HOLD_AN_ORDER = r"""
libc.prctl(0x59616D61, ctypes.c_ulong(-1), 0, 0, 0)  # PR_SET_PTRACER, see arena.HOLDER
ours, theirs = socket.socketpair()
ours.send(b"an order")
ours.close()
open("held", "x").close()
signal.pause()
"""


@attack("read the nursery's orders from its inherited socket", "no order is read")
@pytest.mark.parametrize("mode", ["bwrap", "bwrap-as-user"])
def test_a_slot_cannot_take_the_servers_orders_for_other_slots(start_server: StartServer, mode: str) -> None:
    server = start_server(mode)
    a, b = server.lease(2)
    for name, code in (("thief.py", BE_THE_NURSERY), ("holder.py", HOLD_AN_ORDER)):
        server.client.write_file(a["slot"], a["token"], name, (LOOK + code).encode())
    env = {"NEEDLE": "x", "GIVEN": "null"}
    own = f"{PYTHON} holder.py & until [ -e held ]; do sleep 0.05; done; GIVEN=$! {PYTHON} thief.py; kill $!; cat orders"
    assert "STOLEN an order" in server.bash(a, own, env=env)["stdout"], "the attack does not work"
    thieves = f"rm orders; for i in 1 2 3 4; do GIVEN=1 {PYTHON} thief.py & done"
    tried = server.bash(a, f"{thieves}; until [ $(grep -c tried orders) = 4 ]; do sleep 0.05; done", env=env)
    assert tried["exit_code"] == 0, tried
    for _ in range(5):
        server.client.lease("test", 30.0, 0, [b["token"]])
        (b,) = server.lease()
        assert server.bash(b, "echo alive")["stdout"] == "alive\n"
    orders = server.bash(a, "cat orders")["stdout"]
    assert orders.count("tried") == 4
    assert "STOLEN" not in orders


@attack("read, trace and take descriptors of the zygote, which has the same user", "denied", docker=True)
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


@pytest.mark.parametrize("mode", [*ISOLATED, "docker"])
@attack("kill the zygote, again and again", "the slot has a new one each time, and is clean at its end, not quarantined")
def test_a_slot_whose_zygote_is_killed_in_quick_succession_comes_back(standing: Standing, mode: str) -> None:
    """So that what sees to one's death meets the next one's."""
    server = standing(mode)
    (lease,) = server.lease()
    for _ in range(40):
        with pytest.raises(SlotBroken):
            server.bash(lease, "kill -9 -1; sleep 60")
    assert server.bash(lease, "echo well")["stdout"] == "well\n"
    server.client.lease("test", 30.0, 0, [lease["token"]])
    assert server.free(3)
