"""A server with a certificate: pools that check it use it, and nobody talks to it in the clear."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme
from conftest import DEFECT, PACKAGE, wait_until

from slotpool import SlotPool
from slotpool.errors import SlotPoolError


class Serving:
    """``slotpool serve`` with a certificate that ``ca`` has signed."""

    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        self.cacert = str(directory / "ca.pem")
        authority.cert_pem.write_to_path(self.cacert)
        both = str(directory / "server.pem")
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(both)
        words = ["-vv", "serve", "--port", "0", "--slots", "2", "--tls-cert", both]
        self.log: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "slotpool", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": PACKAGE, "SLOTPOOL_TOKEN": "a-token"},
            cwd="/",
        )
        assert self._process.stdout is not None
        told = self._process.stdout.readline().strip()
        assert told.startswith("https://127.0.0.1:")
        self.port = int(told.rpartition(":")[2])
        self.address = f"https://localhost:{self.port}"
        self._reader = threading.Thread(target=self._read_log)
        self._reader.start()

    def _read_log(self) -> None:
        assert self._process.stderr is not None
        self.log.extend(iter(self._process.stderr.readline, ""))

    def stop(self) -> int:
        self._process.terminate()
        self._process.wait(30)
        self._reader.join()
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._process.stdout.close()
        self._process.stderr.close()
        return self._process.returncode


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    started = Serving(tmp_path)
    try:
        yield started
    finally:
        code = started.stop()
    assert code == 0, started.log
    assert DEFECT not in "".join(started.log)


def test_a_pool_that_knows_who_signed_uses_it(serving: Serving) -> None:
    content = os.urandom(3_000_000)
    with SlotPool(servers=serving.address, token="a-token", cacert=serving.cacert) as pool, pool.slot() as s:
        assert s.bash("echo well").stdout == "well\n"
        s.write_file("large", content)
        assert s.read_bytes("large") == content


def test_the_variable_names_who_signed(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLOTPOOL_CACERT", serving.cacert)
    with SlotPool(servers=serving.address, token="a-token") as pool, pool.slot() as s:
        assert s.bash("true").exit_code == 0


@pytest.mark.parametrize("trusted", [None, "another"])
def test_a_server_that_cannot_be_checked_gets_no_request(serving: Serving, tmp_path: Path, trusted: str | None) -> None:
    cacert = None
    if trusted is not None:
        cacert = str(tmp_path / "another.pem")
        trustme.CA().cert_pem.write_to_path(cacert)
    pool = SlotPool(servers=serving.address, token="a-token", cacert=cacert, start_timeout=1)
    with pytest.raises(SlotPoolError, match="certificate"):
        pool.start()


def test_the_name_must_be_the_certificates(serving: Serving) -> None:
    address = f"https://127.0.0.1:{serving.port}"
    with pytest.raises(SlotPoolError, match=r"127\.0\.0\.1"):
        SlotPool(servers=address, token="a-token", cacert=serving.cacert, start_timeout=1).start()


def test_nothing_is_answered_in_the_clear(serving: Serving) -> None:
    with socket.create_connection(("127.0.0.1", serving.port), 10) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert b"HTTP" not in plain.recv(1000)
    assert wait_until(lambda: any("could not be encrypted" in line for line in serving.log))


def test_who_never_greets_keeps_nobody_out(serving: Serving) -> None:
    silent = [socket.create_connection(("127.0.0.1", serving.port), 10) for _ in range(50)]
    with SlotPool(servers=serving.address, token="a-token", cacert=serving.cacert) as pool, pool.slot() as s:
        assert s.bash("echo well").stdout == "well\n"
    for one in silent:
        one.close()


def test_old_versions_of_tls_are_refused(serving: Serving) -> None:
    context = ssl.create_default_context(cafile=serving.cacert)
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # which Python gives from 3.10 on
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", serving.port), 10) as plain, pytest.raises(ssl.SSLError):
        context.wrap_socket(plain, server_hostname="localhost")


@pytest.mark.parametrize("content", [None, "no certificate"])
def test_a_certificate_that_is_none_is_refused(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "server.pem"
    if content is not None:
        file.write_text(content)
    words = [sys.executable, "-m", "slotpool", "serve", "--port", "0", "--tls-cert", str(file)]
    refused = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONPATH": PACKAGE}, cwd="/", timeout=60)
    assert (refused.returncode, refused.stdout) == (125, b"")
    assert b"expected a certificate and its key" in refused.stderr
    assert str(file).encode() in refused.stderr


def test_a_key_alone_is_refused(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "slotpool", "serve", "--port", "0", "--tls-key", str(tmp_path)]
    refused = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONPATH": PACKAGE}, cwd="/", timeout=60)
    assert (refused.returncode, refused.stdout) == (125, b"")
    assert b"--tls-cert" in refused.stderr


def test_tokens_are_in_no_log_no_error_and_no_representation(serving: Serving, caplog: pytest.LogCaptureFixture) -> None:
    """At the most talkative level, through a lease's whole life and through failures."""
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    with SlotPool(servers=serving.address, token="a-token", cacert=serving.cacert, lease_ttl=1.0) as pool, pool.slot() as s:
        lease = s._tenure.token
        said += [repr(s), repr(s.bash("env; false")), repr(s._tenure), repr(pool.config), repr(pool)]
        s._tenure.container.client.lease("other", 1.0, 0, release=[lease])
        with pytest.raises(SlotPoolError) as lost:
            s.bash("true")
        said += [str(lost.value), repr(lost.value), repr(vars(lost.value))]
    wrong = SlotPool(servers=serving.address, token="another-secret", cacert=serving.cacert, start_timeout=1)
    with pytest.raises(SlotPoolError) as refused:
        wrong.start()
    serving.stop()
    said += [str(refused.value), repr(refused.value), caplog.text, *serving.log]
    assert any(f"lease {s.lease_id}: execution " in line for line in serving.log)
    for secret in ("a-token", "another-secret", lease):
        assert not [one for one in said if secret in one]
