"""What all tests share: a clean environment, real servers, and the check that nothing is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any, Callable

import attr
import hypothesis.configuration
import pytest

from slotpool import SlotPool
from slotpool.sandbox.client import SandboxClient
from slotpool.sandbox.protocol import CallRequest, Lease

# A shell starts what runs in its background with Ctrl-C ignored, and children would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest_plugins = ["nomads", "attacks", "arena"]
ROOT = os.geteuid() == 0
PACKAGE = str(Path(sys.modules["slotpool"].__file__ or "").resolve().parents[1])


def why_not(mode: str) -> str:
    if mode == "user" and not ROOT:
        return "user mode needs root"
    if mode == "bwrap-as-user" and not ROOT:
        return "already an ordinary user"
    if mode == "bwrap" and shutil.which("bwrap") is None:
        return "bubblewrap is not installed"
    return ""


ISOLATED = ["bwrap", "user", "bwrap-as-user"]
MODES = [*ISOLATED, "none"]
DEFECT = "this is a defect of slotpool"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a server, a nursery or this process has logged as a defect fails the test, whatever became of its calls."""
    report = yield
    if report.passed and any(DEFECT in text for _, text in report.sections):
        report.outcome = "failed"
        report.longrepr = "expected no defect to be logged, got one: see what was captured"
    return report


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("NOMAD_", "SLOTPOOL_")):
            monkeypatch.delenv(name)


# Everything that these tests make on disk is in here, and every process of theirs has it in its command line or its
# environment. So a test run sees its own processes, and none of another run's beside it.
SESSION = tempfile.mkdtemp(prefix="slotpool-test-")
os.chmod(SESSION, 0o1777)
os.environ["TMPDIR"] = tempfile.tempdir = SESSION

# How long an example takes says how busy the machine is.
hypothesis.settings.register_profile(
    "slotpool", deadline=None, database=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("slotpool")
hypothesis.configuration.set_hypothesis_home_dir(f"{SESSION}/hypothesis")


def slotpool_processes() -> list[str]:
    """The command lines of all processes of servers, nurseries, sandboxes and slots of this test run."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace").strip()
            owned = SESSION in line or SESSION.encode() in (directory / "environ").read_bytes()
        except OSError:
            continue
        if owned and int(directory.name) != os.getpid():
            found.append(f"{directory.name}: {line[:200]}")
    return found


def servers() -> list[int]:
    """The process ids of this test run's embedded servers."""
    return [int(line.split(":")[0]) for line in slotpool_processes() if "-m slotpool.sandbox" in line]


OURS = f".{os.getpid()}"  # what a sleep of this run's adds to its seconds, to be told from another run's


def sleepers(seconds: str) -> int:
    """How many processes, in slots too, run ``sleep`` with so many seconds, a regular expression, and OURS behind."""
    counted = subprocess.run(["pgrep", "-c", "-f", f"^sleep {seconds}{OURS}$"], capture_output=True, check=False)
    return int(counted.stdout)


def state_directories() -> list[str]:
    return sorted(str(path) for path in Path(SESSION).glob("*slotpool-*"))


def wait_until(true: Callable[[], Any], limit: float = 10.0) -> bool:
    """Wait for something that another process does and that has no handle to wait on."""
    deadline = time.monotonic() + limit
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    yield
    wait_until(lambda: not slotpool_processes() and not state_directories())
    assert slotpool_processes() == []
    assert state_directories() == []
    assert [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if SESSION in line] == []
    shutil.rmtree(SESSION)


@attr.s(auto_attribs=True)
class Server:
    """A real sandbox server in a process of its own."""

    process: subprocess.Popen[bytes]
    client: SandboxClient
    address: str
    token: str
    isolation: str

    def lease(self, count: int = 1, ttl: float = 30.0, owner: str = "test") -> list[Lease]:
        """Exactly ``count`` leases."""
        leases: list[Lease] = []
        while len(leases) < count:
            got = self.client.lease(owner, ttl, count - len(leases), wait=20)["leases"]
            assert got, f"only {len(leases)} of {count} slots became free"
            leases += got
        return leases

    def bash(self, lease: Lease, command: str, timeout: float = 20.0, **args: Any) -> Any:
        return self.client.execute(lease["slot"], lease["token"], "bash", {"command": command, **args}, timeout)

    def free(self, count: int, limit: float = 10.0) -> bool:
        """Wait until so many slots are free."""
        return wait_until(lambda: self.client.health()["counts"]["free"] == count, limit)

    def stop(self) -> None:
        self.client.close()
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.terminate()
        self.process.wait(30)


def describe_slots(client: SandboxClient) -> list[dict[str, str]]:
    """What a server tells of each of its slots."""
    _, told = client._http.json("GET", "/v1/slots", None, 10)
    return list(told["slots"])


def call_of(lease: Lease, execution_id: str, command: str, timeout: float = 20.0) -> CallRequest:
    """A command in a lease's slot, for a batch."""
    return {
        "slot": lease["slot"],
        "lease": lease["token"],
        "execution_id": execution_id,
        "tool": "bash",
        "args": {"command": command},
        "timeout": timeout,
    }


def can_run(identity: dict[str, Any]) -> bool:
    """Whether this Python, and slotpool with it, can be run by that user; not if they are in somebody's own directory."""
    check = [sys.executable, "-c", "import slotpool.sandbox.serve"]
    try:
        done = subprocess.run(check, cwd="/", env={"PYTHONPATH": PACKAGE}, capture_output=True, check=False, **identity)
    except PermissionError:
        return False
    return done.returncode == 0


StartServer = Callable[..., Server]

ORDINARY_USER = "nobody"


@contextlib.contextmanager
def started_servers() -> Iterator[StartServer]:
    """What starts servers; ``start(mode, slots=2, **settings)``, see MODES. All are stopped at the end.

    They run the code of ``package``, in control groups that are joined by ``groups``, see cgroups.Groups.make().
    """
    servers: list[Server] = []
    directories: list[str] = []

    def start(
        mode: str = "bwrap", slots: int = 2, package: str = PACKAGE, groups: Sequence[str] = (), **settings: Any
    ) -> Server:
        if why_not(mode):
            pytest.skip(why_not(mode))
        more: dict[str, Any] = {}
        state_dir: str | None = None
        if mode == "bwrap-as-user":
            user = pwd.getpwnam(ORDINARY_USER)
            state_dir = tempfile.mkdtemp(prefix="test-slotpool-")
            directories.append(state_dir)
            os.chown(state_dir, user.pw_uid, user.pw_gid)
            more = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
            if not can_run(more):
                pytest.skip(f"user {ORDINARY_USER} can't run {sys.executable} with {PACKAGE}")
        options = {
            "slots": slots,
            "isolation": mode.partition("-")[0],
            "readonly_paths": [],
            "state_dir": state_dir,
            **settings,
            "token": "SLOTPOOL_TEST_server_token",
            "parent": os.getpid(),
        }
        process = subprocess.Popen(
            ["sh", "-c", 'for file; do echo 0 >"$file"; done; exec "$0" -m slotpool.sandbox', sys.executable, *groups],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": package},
            cwd="/",
            start_new_session=True,
            **more,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(options).encode() + b"\n")
        process.stdin.flush()
        told: dict[str, str] = {}
        for line in process.stdout:
            if line.startswith(b"{"):
                told = json.loads(line)
                break
        process.stdout.close()
        assert "ready" in told, told
        client = SandboxClient(told["ready"], options["token"], connections=100)
        server = Server(process, client, told["ready"], options["token"], options["isolation"])
        servers.append(server)
        return server

    try:
        yield start
    finally:
        for server in servers:
            server.stop()
        for directory in directories:
            shutil.rmtree(directory)


@pytest.fixture
def start_server() -> Iterator[StartServer]:
    """Servers of one test's own."""
    with started_servers() as start:
        yield start


@pytest.fixture
def bubblewrap(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where to put a script that is run in place of bubblewrap."""
    if why_not("bwrap"):
        pytest.skip(why_not("bwrap"))
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
        script = Path(directory, "bwrap")
        script.touch(0o755)
        yield script


@pytest.fixture
def pool() -> Iterator[SlotPool]:
    """An embedded pool of four slots."""
    with SlotPool(slots_per_container=4, max_containers=1) as pool:
        yield pool
