"""Requests that make no sense get an error that names the field, and lose nothing."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import Server, StartServer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slotpool.errors import FileError, InvalidRequest
from slotpool.sandbox.host import Host
from slotpool.sandbox.nursery_process import NurseryProcess
from slotpool.sandbox.protocol import LEASE_HEADER, RequestFailed
from slotpool.sandbox.tenancies import HostConfig


def raw(server: Server, method: str, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    """Without the client's own checks."""
    status, content = server.client._http.request(method, path, body, 20, headers)
    return status, json.loads(content)["error"]


def test_a_call_of_a_batch_that_can_not_even_be_told_of_leaves_the_others_alone() -> None:
    host = Host(HostConfig(slots=1, isolation="none"), NurseryProcess())
    try:
        (lease,) = host.lease("test", 60, 1, (), 20)["leases"]
        nested: list[Any] = []
        for _ in range(100_000):
            nested = [nested]
        common = {"slot": lease["slot"], "lease": lease["token"], "timeout": 20.0, "args": {"command": "echo well"}}
        calls: Any = [{**common, "execution_id": "a", "tool": "bash"}, {**common, "execution_id": "b", "tool": nested}]
        (well, failed), afterwards = host.execute(calls, 20.0)
        afterwards()
        assert isinstance(well, dict)
        assert well["stdout"] == "well\n"
        assert isinstance(failed, RequestFailed)
        assert failed.body["code"] == "internal"
    finally:
        host.close()


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ({}, "command"),
        ({"command": 7}, "command"),
        ({"command": "a\0b"}, "command"),
        ({"command": "x" * (1024 * 1024 + 1)}, "command"),
        ({"command": "true", "cwd": "/no/such/place"}, "cwd"),
        ({"command": "true", "cwd": ["a"]}, "cwd"),
        ({"command": "true", "env": {"A B": "c"}}, "env"),
        ({"command": "true", "env": {"UID": "0"}}, "env"),
        ({"command": "true", "env": {"A": 1}}, "env.A"),
        ({"command": "true", "env": "A=1"}, "env"),
        ({"command": "true", "stdin": 5}, "stdin"),
        ({"command": "true", "shell": "zsh"}, "args"),
        ({"command": "true", "allow_network": True}, "allow_network"),
        ({"command": "true", "require_sandbox": "yes"}, "require_sandbox"),
    ],
)
def test_bad_arguments_are_named(start_server: StartServer, args: dict[str, Any], field: str) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    server.bash(lease, "echo kept > file")
    with pytest.raises(InvalidRequest) as error:
        server.client.execute(lease["slot"], lease["token"], "bash", args, 20)
    assert error.value.field == field
    assert error.value.expected
    assert error.value.got
    assert server.bash(lease, "cat file")["stdout"] == "kept\n"


def test_bad_requests_are_named(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1, max_file=1000)
    (lease,) = server.lease()
    slot, held = lease["slot"], {LEASE_HEADER: lease["token"]}
    good = {"execution_id": "a", "tool": "bash", "args": {"command": "echo ran > file"}, "timeout": 5, "wait": 5}
    execute = f"/v1/slots/{slot}/execute"
    for body, field in [
        (b"", "body"),
        (b"{", "body"),
        (b"[1]", "body"),
        (b"[" * 100_000, "body"),
        (b"\xff\xfe", "body"),
        (json.dumps({**good, "extra": 1}).encode(), "body"),
        (json.dumps({**good, "tool": "python"}).encode(), "tool"),
        (json.dumps({**good, "tool": None}).encode(), "tool"),
        (json.dumps({**good, "args": []}).encode(), "args"),
        (json.dumps({**good, "timeout": 0}).encode(), "timeout"),
        (json.dumps({**good, "timeout": float("inf")}).encode(), "timeout"),
        (json.dumps({**good, "timeout": True}).encode(), "timeout"),
        (json.dumps({**good, "wait": 1e9}).encode(), "wait"),
        (json.dumps({**good, "execution_id": ""}).encode(), "execution_id"),
        (json.dumps({**good, "execution_id": 5}).encode(), "execution_id"),
    ]:
        status, error = raw(server, "POST", execute, body, **held)
        assert (status, error["code"], error["field"]) == (400, "invalid_request", field), error
    for fields, field in [
        ({"owner": 1, "ttl": 5, "take": 1, "wait": 0}, "owner"),
        ({"owner": "a", "ttl": -1, "take": 1, "wait": 0}, "ttl"),
        ({"owner": "a", "ttl": 5, "take": 1.5, "wait": 0}, "take"),
        ({"owner": "a", "ttl": 5, "take": 1, "wait": 0, "release": "x"}, "release"),
    ]:
        status, error = raw(server, "POST", "/v1/leases", json.dumps(fields).encode())
        assert (status, error["field"]) == (400, field)
    status, error = raw(server, "POST", execute, b" " * (16 * 1024 * 1024 + 1), **held)
    assert status == 413
    status, error = raw(server, "PUT", f"/v1/slots/{slot}/file?path=big", b"x" * 1001, **held)
    assert (status, error["field"]) == (413, "content")
    status, error = raw(server, "GET", f"/v1/slots/{slot}/file?file=a", b"", **held)
    assert (status, error["field"]) == (400, "query")
    assert server.bash(lease, "ls -A")["stdout"] == "", "none of them has done anything"


OUTSIDE = ["", ".", "..", "../x", "/etc/passwd", "a/../../x", "a\0b", "/workspace", "/workspacex/y", "x" * 5000]


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_outside_are_refused(start_server: StartServer, path: str) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    for call in (
        lambda: server.client.read_file(lease["slot"], lease["token"], path),
        lambda: server.client.write_file(lease["slot"], lease["token"], path, b"x"),
    ):
        with pytest.raises(InvalidRequest) as error:
            call()
        assert error.value.field == "path"


@pytest.mark.parametrize("mode", ["bwrap", "user"])
def test_files_that_are_no_files_are_told(start_server: StartServer, mode: str) -> None:
    server = start_server(mode, slots=1)
    (lease,) = server.lease()
    slot, token = lease["slot"], lease["token"]
    server.bash(lease, "mkdir dir; mkfifo fifo; ln -s /dev/zero zero; ln -s loop loop; echo x > closed; chmod 0 closed")
    for name in ("none", "dir", "fifo", "zero", "loop", "closed", "closed/x"):
        with pytest.raises(FileError) as error:
            server.client.read_file(slot, token, name)
        assert error.value.errno, name
    for name in ("dir", "fifo", "zero", "loop", "closed/x"):
        with pytest.raises(FileError):
            server.client.write_file(slot, token, name, b"x")
    server.client.write_file(slot, token, "new/deep/file", b"\x00\xff")
    assert server.client.read_file(slot, token, "new/deep/file") == b"\x00\xff"
    server.bash(lease, "chmod 755 new/deep/file; ln -s new/deep/file link")
    server.client.write_file(slot, token, "link", b"by link")
    assert server.bash(lease, "cat new/deep/file; stat -c %a new/deep/file; ls -A new/deep")["stdout"] == "by link755\nfile\n"
    odd = b"\xff odd \n name".decode("utf-8", "surrogateescape")
    server.client.write_file(slot, token, odd, b"odd")
    assert server.client.read_file(slot, token, odd) == b"odd"


@pytest.fixture
def small_disk() -> Iterator[str]:
    """A directory with room for 20 MB."""
    directory = tempfile.mkdtemp(prefix="test-slotpool-")
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m,mode=711", "tmpfs", directory]
    try:
        if subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("only root may mount a small disk")
        yield directory
        subprocess.run(["umount", directory], check=True)
    finally:
        os.rmdir(directory)


@pytest.mark.parametrize("mode", ["bwrap", "user"])
def test_a_full_disk_is_told_and_leaves_the_old_content(small_disk: str, start_server: StartServer, mode: str) -> None:
    server = start_server(mode, slots=2, state_dir=small_disk)
    lease, other = server.lease(2)
    slot, token = lease["slot"], lease["token"]
    server.client.write_file(slot, token, "f", b"old")
    with pytest.raises(FileError) as error:
        server.client.write_file(slot, token, "f", b"x" * 30_000_000)
    assert error.value.errno == errno.ENOSPC
    assert server.bash(lease, "cat f; ls -A")["stdout"] == "oldf\n"
    server.bash(lease, "head -c 100M /dev/zero > filler")
    assert server.bash(lease, "echo well; cat f")["stdout"] == "well\nold", "commands run on, and files can be read"
    assert server.bash(other, "echo well")["stdout"] == "well\n"
    server.client.lease("test", 30, 0, release=[token])
    assert server.free(1), "the cleaning makes room again"


def test_a_client_that_sends_half_a_request_holds_nothing_up(start_server: StartServer) -> None:
    server = start_server("bwrap", slots=1)
    (lease,) = server.lease()
    socks = []
    for _ in range(50):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(server.address[len("unix://") :])
        sock.sendall(b"POST /v1/leases HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n{")
        socks.append(sock)
    assert server.bash(lease, "echo well")["stdout"] == "well\n"
    for sock in socks:
        sock.close()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_FIELDS = "owner ttl take release wait tokens execution_id tool args timeout calls slot lease network command".split()


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    route=st.sampled_from("leases leases/renew batch slots/slot_0/execute slots/slot_0/cancel slots/slot_0/reset".split()),
    body=st.dictionaries(st.sampled_from(_FIELDS), _JSON, max_size=6) | _JSON,
)
def test_no_json_makes_the_server_fail(fuzzed: Server, route: str, body: Any) -> None:
    status, _ = fuzzed.client._http.request("POST", f"/v1/{route}", json.dumps(body).encode(), 20, {LEASE_HEADER: "x"})
    assert status in (200, 400, 409)


@pytest.fixture
def fuzzed(start_server: StartServer) -> Server:
    return start_server("bwrap", slots=1)
