"""A zygote that has turned on its server, as one whose place a slot's own process has taken could: real servers and sandboxes.

What serves calls here is a slot's process with the zygote's own sockets. It does as told, until a command bids it to attack.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from arena import Arena, Standing, contained_server, docker
from attacks import attack
from conftest import PACKAGE, started_servers, wait_until

from slotpool.errors import ContainerLost, SlotPoolError

pytestmark = pytest.mark.arenas("bwrap", "docker")  # in a container it is mode user
TRIES = 4
REFUSING = ["refusing", "before 6.16"]  # whether the server's kernel lets it refuse descriptors
MOST_GROWTH = 32 << 20  # bytes of the server's memory

# Put at the end of slotpool/sandbox/zygote.py.
IMPOSTOR = r"""

import re, time, fcntl


class Impostor(Zygote):
    def _start(self):
        message, fds = linux.receive(self._control, 65536, 8)
        if not message:
            os._exit(0)
        order = json.loads(message)
        named = dict(zip(order["fds"], fds))
        if os.fork() == 0:
            try:
                self.answer(order, named, socket.socket(fileno=named.pop("call")))
            finally:
                os._exit(0)
        for fd in fds:
            os.close(fd)

    def answer(self, order, fds, sock):
        if order["op"] in ("open", "create"):
            if b"HOSTILE-lend" in order["path"].encode():
                self.attack(order["path"].encode(), fds, sock)
            return
        if order["op"] != "shell":
            self.attack(order["path"].encode(), fds, sock)
            pid = self._fork_tool(sock.fileno(), order, fds)
        else:
            script = b""
            while len(script) < 9 or len(script) < 9 + int(script[:9]):
                part = os.read(fds["script"], 1 << 20)
                if not part:
                    return
                script += part
            self.attack(script, fds, sock)
            fds["script"] = os.memfd_create("script")
            os.write(fds["script"], script)
            os.lseek(fds["script"], 0, 0)
            pid = self._start_shell(order, fds)
        _tell(sock.detach(), os.waitpid(pid, 0)[1])

    def attack(self, text, fds, sock):
        found = re.search(rb"HOSTILE-(\w+)", text)
        self.port = re.search(rb"PORT-(\d+)|$", text)[1]
        if found:
            open("attacked", "w").close()
            getattr(self, found[1].decode())(fds, sock, self._control)
            os._exit(0)

    def garbage(self, fds, sock, control):
        for _ in range(200):
            for at in (sock, control):
                try:
                    at.send(os.urandom(1000), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
                except OSError:
                    pass

    def descriptors(self, fds, sock, control):
        null = [os.open("/dev/null", os.O_RDONLY)] * 250
        for _ in range(4):
            for at in (sock, control):
                try:
                    socket.send_fds(at, [STATUS.pack(0)], null, socket.MSG_DONTWAIT)
                except OSError:
                    pass

    def slow(self):
        with socket.create_server(("127.0.0.1", 0)) as listening:
            slow = socket.create_connection(("127.0.0.1", self.port or listening.getsockname()[1]))
            never_read = listening if self.port else listening.accept()[0]
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30_000))
        slow.setblocking(False)
        try:
            while True:
                slow.send(bytes(1 << 16))
        except BlockingIOError:
            return slow, never_read

    def linger(self, fds, sock, control):
        slow, never_read = self.slow()
        sock.send(STATUS.pack(0))
        self.send_only(sock, b"unread", slow)  # so that who closes that closes this
        self.silence(fds, sock, control)

    def linger_as_told(self, fds, sock, control):
        slow, never_read = self.slow()
        self.send_only(sock, STATUS.pack(0), slow)
        sock.send(STATUS.pack(0))
        self.silence(fds, sock, control)

    def linger_in_control(self, fds, sock, control):
        slow, never_read = self.slow()
        self.send_only(control, b"unread", slow)
        sock.send(STATUS.pack(0))
        self.silence(fds, sock, control)

    def send_only(self, at, message, sent):
        try:
            socket.send_fds(at, [message], [sent.fileno()])
        except OSError:  # it is refused; who closes it waits
            return
        sent.close()

    def silence(self, fds, sock, control):
        while True:
            time.sleep(1000)

    def stopped(self, fds, sock, control):
        os.kill(os.getppid(), signal.SIGSTOP)
        self.silence(fds, sock, control)

    def flood(self, fds, sock, control):
        data = bytes(1 << 20)
        while True:
            os.write(fds["stdout"], data)
            os.write(fds["stderr"], data)

    def ended_and_going_on(self, fds, sock, control):
        sock.send(STATUS.pack(0))
        self.flood(fds, sock, control)

    def half(self, fds, sock, control):
        sock.send(STATUS.pack(0)[:2])
        self.silence(fds, sock, control)

    def urgent(self, fds, sock, control):
        for _ in range(100):
            sock.send(b"u", socket.MSG_OOB)
        self.silence(fds, sock, control)

    def numbers(self, fds, sock, control):
        sock.send(STATUS.pack(-1) + STATUS.pack(2**31 - 1) * 100)

    def hung_up(self, fds, sock, control):
        sock.close()
        control.shutdown(socket.SHUT_RDWR)
        self.silence(fds, sock, control)

    def more(self, fds, sock, control):
        os.write(fds["stdout"], files.SIZE.pack(10))
        self.flood(fds, sock, control)

    def much_more(self, fds, sock, control):
        os.write(fds["stdout"], files.SIZE.pack(10 << 20))
        self.flood(fds, sock, control)

    def less(self, fds, sock, control):
        os.write(fds["stdout"], files.SIZE.pack(1000) + b"x")
        sock.send(STATUS.pack(0))

    def endless(self, fds, sock, control):
        os.write(fds["stdout"], files.SIZE.pack(2**63))
        self.flood(fds, sock, control)

    def claim(self, fds, sock, control):
        os.write(fds["stderr"], b'[{"a": 1e999}, ' + b"[" * 100_000)
        sock.send(STATUS.pack(256))

    def name(self, fds, sock, control):
        os.write(fds["stderr"], b'[2, "' + b"\\u0000\xff" * 10_000 + b'"]')
        sock.send(STATUS.pack(256))

    def lend(self, sock, fd, *more):
        socket.send_fds(sock, [lender.ANSWER.pack(0)], [fd, *more])
        return sock.recv(1)

    def lend_slow(self, fds, sock, control):
        slow, never_read = self.slow()
        for _ in range(2):
            socket.send_fds(sock, [lender.ANSWER.pack(0)], [slow.fileno()])
        slow.close()
        self.silence(fds, sock, control)

    def lend_and_put_slow(self, fds, sock, control):
        slow, never_read = self.slow()
        self.lend(sock, os.open("own", os.O_RDWR | os.O_CREAT))  # until that is to be put in place
        self.send_only(sock, lender.ANSWER.pack(0), slow)
        sock.send(lender.ANSWER.pack(0))
        self.silence(fds, sock, control)

    def lend_nothing_slow(self, fds, sock, control):
        slow, never_read = self.slow()
        sock.send(lender.ANSWER.pack(1))
        sock.recv(1)
        self.send_only(sock, lender.ANSWER.pack(0), slow)
        sock.send(lender.ANSWER.pack(0))
        self.silence(fds, sock, control)

    def lend_fifo(self, fds, sock, control):
        os.mkfifo("fifo")
        self.lend(sock, os.open("fifo", os.O_RDWR))

    def lend_directory(self, fds, sock, control):
        self.lend(sock, os.open(".", os.O_RDONLY))

    def lend_device(self, fds, sock, control):
        self.lend(sock, os.open("/dev/zero", os.O_RDWR))

    def lend_memory(self, fds, sock, control):
        fd = os.memfd_create("mine")
        os.truncate(fd, 1 << 40)
        self.lend(sock, fd)

    def lend_proc(self, fds, sock, control):
        self.lend(sock, os.open("/proc/version", os.O_RDONLY))

    def lend_path(self, fds, sock, control):
        self.lend(sock, os.open("own", os.O_PATH | os.O_CREAT | os.O_RDWR))

    def lend_path_of_socket(self, fds, sock, control):
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("socket")
        self.lend(sock, os.open("socket", os.O_PATH))

    def lend_for_writing(self, fds, sock, control):
        self.lend(sock, os.open("own", os.O_WRONLY | os.O_CREAT | os.O_APPEND))

    def lend_for_reading(self, fds, sock, control):
        self.lend(sock, os.open("own", os.O_RDONLY | os.O_CREAT))

    def lend_endless(self, fds, sock, control):
        fd = os.open("own", os.O_RDWR | os.O_CREAT)
        os.truncate(fd, 1 << 40)
        self.lend(sock, fd)

    def lend_shrinking(self, fds, sock, control):
        fd = os.open("own", os.O_RDWR | os.O_CREAT)
        os.truncate(fd, 100 << 20)
        socket.send_fds(sock, [lender.ANSWER.pack(0)], [fd])
        for _ in range(10_000):
            os.truncate(fd, 0)
            os.truncate(fd, 100 << 20)

    def lend_many(self, fds, sock, control):
        self.lend(sock, *[os.open("own", os.O_RDWR | os.O_CREAT)] * 250)

    def lend_nothing(self, fds, sock, control):
        sock.send(lender.ANSWER.pack(0))
        sock.recv(1)

    def lend_and_hang_up(self, fds, sock, control):
        self.lend(sock, os.open("own", os.O_RDWR | os.O_CREAT))

    def lend_and_talk(self, fds, sock, control):
        self.lend(sock, os.open("own", os.O_RDWR | os.O_CREAT))
        for _ in range(100):
            sock.send(b"u", socket.MSG_OOB)
        sock.send(os.urandom(1000))
        socket.send_fds(sock, [lender.ANSWER.pack(-1)], [0] * 250)


from . import lender

Zygote = Impostor
"""


@pytest.fixture(scope="module")
def standing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    """Servers with impostors; with the parameter False, of a kernel that lets nobody refuse descriptors."""
    package = Path(tmp_path_factory.mktemp("impostor"))
    for path in (package, *list(package.parents)[:3]):
        path.chmod(0o755)
    shutil.copytree(Path(PACKAGE, "slotpool"), package / "slotpool", ignore=shutil.ignore_patterns("__pycache__"))
    turned = package / "slotpool" / "sandbox" / "zygote.py"
    turned.write_text(turned.read_text() + IMPOSTOR)
    if not getattr(request, "param", True):
        calls = package / "slotpool" / "sandbox" / "linux.py"
        calls.write_text(re.sub("(?m)^_SO_PASSRIGHTS = .*", "_SO_PASSRIGHTS = -1", calls.read_text()))
    with contextlib.ExitStack() as stack:
        start = stack.enter_context(started_servers())

        @functools.cache
        def stand(mode: str) -> Any:
            if mode != "docker":
                return start(mode, slots=3, package=str(package))
            image = request.getfixturevalue("sandbox_image")
            where = "import slotpool; print(slotpool.__path__[0])"
            inside = docker("run", "--rm", "--entrypoint", "python3", image, "-c", where)
            return stack.enter_context(contained_server(image, volume=f"{turned}:{inside}/sandbox/zygote.py:ro"))

        yield stand


def case(name: str, act: str) -> Any:
    return pytest.param(act, id=act, marks=attack(f"a zygote turned on its server: {name}", HOLDS))


HOLDS = "the call ends, the neighbour's go on, no descriptor, thread or memory is kept, the slot comes back clean"

SLOW = [
    case("no answer, ever", "silence"),
    case("it is stopped (SIGSTOP)", "stopped"),
    case("no end of output, and no status", "flood"),
]
CALLS = [
    case("garbage, 200 times, on all its sockets", "garbage"),
    case("1,000 descriptors on each of its sockets", "descriptors"),
    case("a status, and output that goes on", "ended_and_going_on"),
    case("half a status", "half"),
    case("urgent bytes", "urgent"),
    case("statuses that are none", "numbers"),
    case("it hangs up", "hung_up"),
]
READS = [
    case("more of a file than it said, without an end", "more"),
    case("more of a large file than it said, without an end", "much_more"),
    case("less of a file than it said", "less"),
    case("a file of 2**63 bytes", "endless"),
    case("an error that is none", "claim"),
    case("an error of 80,000 bytes", "name"),
]
LOANS = [
    case("a FIFO lent for a file", "lend_fifo"),
    case("a directory lent for a file", "lend_directory"),
    case("a device lent for a file", "lend_device"),
    case("memory lent for a file", "lend_memory"),
    case("a file of /proc lent for its own", "lend_proc"),
    case("a descriptor lent that only stands for a path", "lend_path"),
    case("a descriptor lent that only stands for a socket's path", "lend_path_of_socket"),
    case("a file lent that can only be appended to", "lend_for_writing"),
    case("a file lent that can only be read", "lend_for_reading"),
    case("a file of a terabyte lent", "lend_endless"),
    case("a file lent that grows and shrinks", "lend_shrinking"),
    case("250 files lent for one", "lend_many"),
    case("nothing lent", "lend_nothing"),
    case("a file lent, and nothing more heard", "lend_and_hang_up"),
    case("a file lent, then garbage", "lend_and_talk"),
]
SLOW_TO_CLOSE = [
    case("a socket that takes 30,000 s to close", "linger"),
    case("a status, and with it a socket that takes 30,000 s to close", "linger_as_told"),
    case("on its control socket one that takes 30,000 s to close", "linger_in_control"),
]
SLOW_LOANS = [
    case("a socket lent that takes 30,000 s to close", "lend_slow"),
    case("a file lent, and as it is put in place a socket that takes 30,000 s to close", "lend_and_put_slow"),
    case("nothing lent, and then a socket that takes 30,000 s to close", "lend_nothing_slow"),
]
SAID = {"more": 10, "much_more": 10 << 20}


@pytest.mark.parametrize("act", CALLS)
def test_a_call_of_an_impostors_ends(arena: Arena, act: str) -> None:
    check_call(arena, act)


@pytest.mark.arenas("user")
@pytest.mark.parametrize("standing", [True, False], indirect=True, ids=REFUSING)
@pytest.mark.parametrize("act", SLOW_TO_CLOSE)
def test_a_call_of_an_impostors_that_sends_what_is_slow_to_close_ends(arena: Arena, act: str) -> None:
    before, _ = arena.held()
    with socket.create_server(("127.0.0.1", 0)) as never_read:  # also when the slot has ended
        for _ in range(10):
            with contextlib.suppress(SlotPoolError):
                arena.server.bash(arena.a, f": HOSTILE-{act} PORT-{never_read.getsockname()[1]}")
            assert arena.outside("attacked")
            for _ in range(5):  # else what each of them leaves to be closed would wait behind that
                assert arena.server.bash(arena.b, "echo well")["stdout"] == "well\n"
            restore(arena)
        assert wait_until(lambda: arena.held()[0] < before + 60), arena.held()
    arena.assert_unharmed()


@pytest.mark.arenas("user")
@pytest.mark.parametrize("act", SLOW)
def test_a_call_of_a_silent_impostors_ends(arena: Arena, act: str) -> None:
    check_call(arena, act)


def check_call(arena: Arena, act: str) -> None:
    def call() -> None:
        try:  # a result or an error; what it says is the slot's own affair
            result = arena.server.bash(arena.a, f"echo ran > ran; : HOSTILE-{act}", timeout=1.0)
            assert len(result["stdout"]) + len(result["stderr"]) < 120_000
        except ContainerLost as e:
            raise AssertionError("the server did not answer") from e
        except SlotPoolError:
            pass

    check(arena, call)


@pytest.mark.parametrize("act", READS)
def test_a_file_of_an_impostors_ends(arena: Arena, act: str) -> None:
    def call() -> None:
        with contextlib.suppress(SlotPoolError):
            content = arena.server.client.read_file(arena.a["slot"], arena.a["token"], f"HOSTILE-{act}")
            assert len(content) == SAID[act]

    check(arena, call)


@pytest.mark.parametrize("act", LOANS)
def test_what_an_impostor_lends_does_no_harm(arena: Arena, act: str) -> None:
    check_loan(arena, act)


@pytest.mark.arenas("user")
@pytest.mark.parametrize("standing", [True, False], indirect=True, ids=REFUSING)
@pytest.mark.parametrize("act", SLOW_LOANS)
def test_what_an_impostor_lends_that_is_slow_to_close_does_no_harm(arena: Arena, act: str) -> None:
    check_loan(arena, act)


def check_loan(arena: Arena, act: str) -> None:
    path = f"HOSTILE-{act}"

    def call() -> None:
        with contextlib.suppress(SlotPoolError):
            content = arena.server.client.read_file(arena.a["slot"], arena.a["token"], path)
            assert content.strip(b"\0") == b""
        with contextlib.suppress(SlotPoolError):
            arena.server.client.write_file(arena.a["slot"], arena.a["token"], path, bytes(1 << 20))

    check(arena, call)


def check(arena: Arena, call: Any) -> None:
    """What is kept of a call is kept of each; one shell more may wait than before because the machine was busy."""
    for _ in range(5):  # so that as many shells wait as ever will
        assert arena.server.bash(arena.b, "echo well")["stdout"] == "well\n"
    restore(arena)
    memory = arena.memory()
    held = [arena.held()]
    while len(held) < 2 or (held[-1] != held[-2] and len(held) < TRIES):
        call()
        assert arena.outside("attacked")
        assert arena.server.bash(arena.b, "echo well")["stdout"] == "well\n"
        restore(arena)
        held.append(arena.held())
    assert held[-1] == held[-2], held
    assert arena.memory() - memory < MOST_GROWTH
    arena.assert_unharmed()


def restore(arena: Arena) -> None:
    """A slot with a zygote that is as it was: clean, and at work."""
    arena.server.client.reset(arena.a["slot"], arena.a["token"])
    assert arena.server.bash(arena.a, "ls -A; echo well")["stdout"] == "well\n"
