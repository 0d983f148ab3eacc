"""However often a command is asked for, it runs once; and its caller gets its result, or learns what can be known."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from typing import Any, Callable

import pytest
from conftest import Server, StartServer, call_of, wait_until
from proxy import Cut, CuttingProxy

from slotpool.errors import ContainerLost, InvalidRequest, LeaseLost, SlotBroken
from slotpool.sandbox import protocol
from slotpool.sandbox.client import SandboxClient
from slotpool.sandbox.host import Host
from slotpool.sandbox.nursery_process import NurseryProcess
from slotpool.sandbox.protocol import Lease, RequestFailed
from slotpool.sandbox.tenancies import HostConfig

Through = Callable[[Server, Cut], SandboxClient]


@pytest.fixture
def through() -> Iterator[Through]:
    """A client whose connections are cut."""
    opened: list[tuple[CuttingProxy, SandboxClient]] = []

    def make(server: Server, cut: Cut) -> SandboxClient:
        proxy = CuttingProxy(server.address, cut)
        client = SandboxClient(proxy.address, server.token)
        opened.append((proxy, client))
        return client

    yield make
    for proxy, client in opened:
        client.close()
        proxy.close()


def first_only(direction: str, marker: bytes) -> Cut:
    """Cut the first connection in which ``marker`` comes by."""
    done = threading.Event()

    def cut(where: str, seen: bytes) -> bool:
        if where == direction and marker in seen and not done.is_set():
            done.set()
            return True
        return False

    return cut


def runs(server: Server, lease: Lease) -> str:
    return str(server.bash(lease, "cat runs")["stdout"])


@pytest.mark.parametrize(
    ("direction", "marker"), [("request", b'"bash"'), ("answer", b"HTTP/1.1 200")], ids=["request-sent", "answer-on-its-way"]
)
@pytest.mark.parametrize("duration", ["0", "1"])
def test_a_cut_connection_runs_it_once_and_gives_its_result(
    start_server: StartServer, through: Through, direction: str, marker: bytes, duration: str
) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    client = through(server, first_only(direction, marker))
    command = {"command": f"echo run >> runs; sleep {duration}; echo result"}
    assert client.execute(lease["slot"], lease["token"], "bash", command, 20)["stdout"] == "result\n"
    assert runs(server, lease) == "run\n"


def test_a_cut_batch_runs_each_once(start_server: StartServer, through: Through) -> None:
    server = start_server("bwrap", slots=2)
    leases = server.lease(2)
    client = through(server, first_only("answer", b"HTTP/1.1 200"))
    calls: Any = [
        {"slot": x["slot"], "lease": x["token"], "execution_id": x["slot"], "tool": "bash", "timeout": 9.0, "args": args}
        for x in leases
        for args in [{"command": "echo run >> runs; echo $PWD"}]
    ]
    answers: list[Any] = client.batch(calls)
    assert [answer["stdout"] for answer in answers] == ["/workspace\n"] * 2, answers
    assert [runs(server, lease) for lease in leases] == ["run\n"] * 2


def test_connections_that_are_always_cut_end_in_a_typed_error(start_server: StartServer, through: Through) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    client = through(server, lambda where, _: where == "answer")
    with pytest.raises(ContainerLost) as lost:
        client.execute(lease["slot"], lease["token"], "bash", {"command": "echo run >> runs"}, 20)
    assert lost.value.may_have_run
    assert wait_until(lambda: runs(server, lease) == "run\n"), "it ran, and once"


def test_a_command_may_run_longer_than_a_request_is_held(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slotpool.sandbox.client._HOLD", 0.2)
    server = start_server("bwrap", slots=2)
    one, other = server.lease(2)
    asked: list[str] = []
    forward = server.client._http.json

    def count(*args: Any) -> tuple[int, Any]:
        asked.append(args[1])
        return forward(*args)

    monkeypatch.setattr(server.client._http, "json", count)
    assert server.bash(one, "echo run >> runs; sleep 1.5; cat runs")["stdout"] == "run\n"
    assert len(asked) > 3
    args = {"command": "echo run >> runs; sleep 1; cat runs"}
    calls: Any = [
        {"slot": x["slot"], "lease": x["token"], "execution_id": "b", "tool": "bash", "args": args, "timeout": 9.0}
        for x in (one, other)
    ]
    answers: list[Any] = server.client.batch(calls)
    assert [answer["stdout"] for answer in answers] == ["run\nrun\n", "run\n"]


def test_many_who_ask_for_the_same_execution_get_the_same_result(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    results: list[str] = []
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        command = {"command": "echo run >> runs; sleep 0.5; echo $RANDOM"}
        results.append(server.client.execute(lease["slot"], lease["token"], "bash", command, 20, "the-id")["stdout"])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert len(set(results)) == 1
    assert runs(server, lease) == "run\n"


def test_an_id_is_not_used_for_two_requests(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    server.client.execute(lease["slot"], lease["token"], "bash", {"command": "echo one"}, 20, "the-id")
    with pytest.raises(InvalidRequest, match="execution_id"):
        server.client.execute(lease["slot"], lease["token"], "bash", {"command": "echo two"}, 20, "the-id")


def test_an_old_result_is_dropped_but_its_command_never_runs_again(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    server.client.execute(lease["slot"], lease["token"], "bash", {"command": "echo run >> runs"}, 20, "the-id")
    for _ in range(260):
        server.bash(lease, "true")
    with pytest.raises(SlotBroken, match="no longer kept") as gone:
        server.client.execute(lease["slot"], lease["token"], "bash", {"command": "echo run >> runs"}, 20, "the-id")
    assert gone.value.may_have_run
    assert runs(server, lease) == "run\n"


def test_a_failure_that_is_kept_keeps_nothing_of_where_it_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*_: object) -> bool:
        try:
            raise OSError("why")
        except OSError as e:
            raise protocol.processes_lost() from e

    monkeypatch.setattr(Host, "check", check)
    host = Host(HostConfig(slots=1, isolation="none"), NurseryProcess())
    try:
        (lease,) = host.lease("test", 60, 1, (), 20)["leases"]
        call = call_of(lease, "x", "true")
        for _ in range(2):
            (failure,), afterwards = host.execute([call], 20.0)
            afterwards()
            assert isinstance(failure, RequestFailed)
            assert failure.body["code"] == "slot_broken"
            assert (failure.__traceback__, failure.__cause__, failure.__context__) == (None, None, None)
    finally:
        host.close()


def test_a_lease_that_ends_under_a_command_is_told(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            server.bash(lease, "touch begun; sleep 100", timeout=200)
        except LeaseLost as e:
            failures.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    assert wait_until(lambda: server.bash(lease, "ls")["stdout"] == "begun\n")
    server.client.lease("test", 30, 0, release=[lease["token"]])
    thread.join()
    assert len(failures) == 1
    assert isinstance(failures[0], LeaseLost)
    assert failures[0].may_have_run


def test_a_server_that_dies_under_a_command_is_told(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    failures: list[ContainerLost] = []

    def run() -> None:
        try:
            server.bash(lease, "touch begun; sleep 100", timeout=200)
        except ContainerLost as e:
            failures.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    assert wait_until(lambda: server.bash(lease, "ls")["stdout"] == "begun\n")
    server.process.send_signal(signal.SIGKILL)
    thread.join()
    assert failures[0].may_have_run


def test_processes_killed_from_inside_are_told_and_replaced(start_server: StartServer) -> None:
    server = start_server("user", slots=1)
    (lease,) = server.lease()
    server.bash(lease, "echo kept > file")
    with pytest.raises(SlotBroken) as broken:
        server.bash(lease, "kill -9 -1; sleep 100", timeout=200)
    assert broken.value.may_have_run
    assert server.bash(lease, "cat file")["stdout"] == "kept\n"


KILL_SHELLS = "(sleep 0.00$((RANDOM % 9)); pkill -9 bash) >/dev/null 2>&1 &"
RUN = "echo run >> runs; sleep 0.00$((RANDOM % 9)); echo well"


def assert_ran_once(server: Server, lease: Lease, before: int, result: Any) -> int:
    """Or, if its shell was killed, at most once. How often all have run, read by no shell, as that might be killed too."""
    now = server.client.read_file(lease["slot"], lease["token"], "runs").count(b"run\n")
    if result["stdout"] == "well\n":
        assert now == before + 1
    else:
        assert result["signal"] == 9
        assert before <= now <= before + 1
    return now


def test_a_waiting_shell_killed_from_inside_costs_nothing(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    server.bash(lease, ": > runs")
    ran = 0
    for _ in range(30):
        server.bash(lease, KILL_SHELLS)
        ran = assert_ran_once(server, lease, ran, server.bash(lease, RUN))
        server.bash(lease, "while pgrep pkill; do :; done; true")


def test_a_call_of_a_batch_that_was_cancelled_before_it_came_never_runs(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    server.client.cancel_quietly(lease["slot"], lease["token"], "x")
    call = call_of(lease, "x", "touch ran")
    (failure,) = server.client.batch([call])
    assert isinstance(failure, SlotBroken)
    assert not failure.may_have_run
    assert server.bash(lease, "ls -A")["stdout"] == ""


def test_nor_does_one_killed_before_a_batch(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    server.bash(lease, ": > runs")
    ran = 0
    for i in range(30):
        server.bash(lease, KILL_SHELLS)
        call = call_of(lease, f"x{i}", RUN)
        (result,) = server.client.batch([call])
        assert isinstance(result, dict), result
        ran = assert_ran_once(server, lease, ran, result)
        server.bash(lease, "while pgrep pkill; do :; done; true")
