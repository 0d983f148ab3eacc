"""Files that are larger than what a server holds of them at once."""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import socket
import time
from pathlib import Path

import pytest
from conftest import Server, StartServer

from slotpool.errors import FileError
from slotpool.sandbox import loan, tools, transfer
from slotpool.sandbox.host import Host
from slotpool.sandbox.nursery_process import NurseryProcess
from slotpool.sandbox.protocol import LEASE_HEADER, Lease
from slotpool.sandbox.tenancies import HostConfig

LARGE = bytes(range(256)) * 65536  # 16 MiB, more than all buffers on the way; the server writes it itself
LARGER = LARGE * 2  # a process in the slot does

of_both_sizes = pytest.mark.parametrize("content", [pytest.param(LARGE, id="large"), pytest.param(LARGER, id="larger")])


def _most_memory(server: Server) -> int:
    """MiB that the server has ever used."""
    lines = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) // 1024


def test_a_large_file_comes_and_goes_whole_and_the_server_does_not_hold_it(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    server.client.write_file(lease["slot"], lease["token"], "small", b"x")
    assert server.client.read_file(lease["slot"], lease["token"], "small") == b"x"
    before = _most_memory(server)
    content = LARGE * 6
    server.client.write_file(lease["slot"], lease["token"], "big", content)
    assert server.client.read_file(lease["slot"], lease["token"], "big") == content
    assert _most_memory(server) - before < 16
    server.bash(lease, "truncate -s 300M big")
    with pytest.raises(FileError, match="limit"):
        server.client.read_file(lease["slot"], lease["token"], "big")


def _connect(server: Server) -> http.client.HTTPConnection:
    """For requests that take their time."""
    connection = http.client.HTTPConnection("localhost", timeout=30)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(server.address.partition("://")[2])
    return connection


def _begin(server: Server, lease: Lease, method: str, size: int = 0, path: str = "big") -> http.client.HTTPConnection:
    connection = _connect(server)
    connection.putrequest(method, f"/v1/slots/{lease['slot']}/file?path={path}")
    connection.putheader("Authorization", f"Bearer {server.token}")
    connection.putheader(LEASE_HEADER, lease["token"])
    if size:
        connection.putheader("Content-Length", str(size))
    connection.endheaders()
    return connection


def test_a_slow_reader_and_a_slow_writer_are_not_taken_for_a_slot_that_hangs(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1, file_patience=0.2)
    (lease,) = server.lease()
    writing = _begin(server, lease, "PUT", len(LARGE))
    writing.send(LARGE[: len(LARGE) // 2])
    time.sleep(0.5)
    writing.send(LARGE[len(LARGE) // 2 :])
    assert writing.getresponse().status == 204
    writing.close()
    reading = _begin(server, lease, "GET")
    answer = reading.getresponse()
    begin = answer.read(1)
    time.sleep(0.5)
    assert begin + answer.read() == LARGE
    reading.close()


def test_a_file_that_becomes_shorter_while_it_is_read_is_never_taken_for_whole(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    server.client.write_file(lease["slot"], lease["token"], "big", LARGE)
    reading = _begin(server, lease, "GET")
    answer = reading.getresponse()
    server.bash(lease, ": >big")
    with pytest.raises(http.client.IncompleteRead):
        answer.read()
    reading.close()
    assert server.client.read_file(lease["slot"], lease["token"], "big") == b""


def test_what_a_slot_says_of_its_file_is_in_the_log_on_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def hostile(*_: object) -> str:
        raise tools.file_failure(b'[5, "short\\nWARNING all is well"]', "f")

    monkeypatch.setattr(loan, "to_read", lambda *_: None)
    monkeypatch.setattr(tools, "file_error", hostile)
    host = Host(HostConfig(slots=1, isolation="none"), NurseryProcess())
    try:
        (lease,) = host.lease("test", 60, 1, (), 20)["leases"]
        path = Path(lease["workspace"], "f")
        path.write_bytes(bytes(16 << 20))
        with contextlib.closing(transfer.read(host, lease["slot"], lease["token"], "f")) as reading:
            path.write_bytes(b"")
            with pytest.raises(ConnectionAbortedError):
                list(reading)
    finally:
        host.close()
    assert r"could not be sent to its end: 'short\nWARNING all is well'" in caplog.text


@of_both_sizes
def test_a_content_that_breaks_off_leaves_the_file_as_it_was(start_server: StartServer, content: bytes) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    server.client.write_file(lease["slot"], lease["token"], "big", b"before")
    writing = _begin(server, lease, "PUT", len(content))
    writing.send(content[: len(content) // 2])
    assert server.bash(lease, "ls -A | wc -l")["stdout"] == "2\n"  # it is on its way
    writing.close()
    assert server.bash(lease, "until [ $(ls -A | wc -l) = 1 ]; do sleep 0.01; done; cat big")["stdout"] == "before"


def test_a_lease_that_ends_while_its_file_is_read_ends_the_reading(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    server.client.write_file(lease["slot"], lease["token"], "big", LARGE)
    reading = _begin(server, lease, "GET")
    answer = reading.getresponse()
    server.client.lease("test", 30, 0, [lease["token"]])
    (following,) = server.lease()
    assert server.bash(following, "ls -A")["stdout"] == ""
    with pytest.raises(http.client.IncompleteRead):
        answer.read()
    reading.close()


@of_both_sizes
def test_a_file_whose_place_is_taken_while_it_is_written_is_an_error_and_leaves_nothing(
    start_server: StartServer, content: bytes
) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    with contextlib.closing(_begin(server, lease, "PUT", len(content))) as writing:
        writing.send(content[: len(content) // 2])
        server.bash(lease, "until [ $(ls -A | wc -l) = 1 ]; do sleep 0.01; done; mkdir -p big/in/the/way")
        writing.send(content[len(content) // 2 :])
        error = json.loads(writing.getresponse().read())["error"]
    assert (error["code"], error["errno"]) == ("file_error", errno.EISDIR)
    assert server.bash(lease, "ls -A")["stdout"] == "big\n"


@of_both_sizes
def test_a_lease_that_ends_while_its_file_is_written_ends_that(start_server: StartServer, content: bytes) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    with contextlib.closing(_begin(server, lease, "PUT", len(content))) as writing:
        writing.send(content[: len(content) // 2])
        server.bash(lease, "until [ $(ls -A | wc -l) = 1 ]; do sleep 0.01; done")
        server.client.lease("test", 30, 0, [lease["token"]])
        (following,) = server.lease()
        with contextlib.suppress(OSError):  # it may have been refused already
            writing.send(content[len(content) // 2 :])
        assert json.loads(writing.getresponse().read())["error"]["code"] == "lease_lost"
    assert server.bash(following, "ls -A")["stdout"] == ""


def test_room_for_a_file_is_asked_for_once(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1, max_disk=20 << 20)
    (lease,) = server.lease()
    for _ in range(10):
        server.client.write_file(lease["slot"], lease["token"], "big", LARGE[: 12 << 20])
        server.bash(lease, "rm big")


def test_a_partial_file_that_can_not_be_removed_ends_nothing_else(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    server.bash(lease, "mkdir d; sleep 1000 & echo")
    server.client.write_file(lease["slot"], lease["token"], "d/big", b"before")
    with contextlib.closing(_begin(server, lease, "PUT", len(LARGE), "d/big")) as writing:
        writing.send(LARGE[:1000])
        server.bash(lease, "until [ $(ls -A d | wc -l) = 2 ]; do sleep 0.01; done; chmod 500 d")
        writing.send(LARGE[1000:])
        error = json.loads(writing.getresponse().read())["error"]
    assert (error["code"], error["errno"]) == ("file_error", errno.EACCES)
    assert server.bash(lease, "pgrep -c sleep; cat d/big")["stdout"] == "1\nbefore"


def test_a_link_that_leads_to_itself_is_an_error_that_says_so(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    server.bash(lease, "ln -s loop loop")
    for call in (
        lambda: server.client.read_file(lease["slot"], lease["token"], "loop"),
        lambda: server.client.write_file(lease["slot"], lease["token"], "loop", b"x"),
    ):
        with pytest.raises(FileError) as failed:
            call()
        assert failed.value.errno == errno.ELOOP
