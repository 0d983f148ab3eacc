"""The client of Nomad's API: what is asked, what is repeated, and what a status becomes."""

from __future__ import annotations

import http.server
import json
import socket
import socketserver
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import requests
import responses

from slotpool.errors import ConfigError, NomadDenied, NomadError, NomadUnreachable
from slotpool.fleet.nomad import http as nomad_http
from slotpool.fleet.nomad.client import NomadClient
from slotpool.fleet.nomad.connection import Connection
from slotpool.fleet.nomad.types import Allocation, AllocationStatus, address_of

URL = "http://nomad.test:4646"
NO_LEADER = responses.Response("GET", f"{URL}/v1/job/j", body="No cluster leader", status=500)


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nomad_http, "_PAUSES", (0.0, 0.0))


def client(**settings: Any) -> NomadClient:
    return NomadClient(Connection.of({"address": URL, **settings}, environ={}))


def asked() -> list[str]:
    return [f"{call.request.method} {str(call.request.url)[len(URL) :]}" for call in responses.calls]


@responses.activate
def test_every_request_carries_token_namespace_and_region() -> None:
    responses.get(f"{URL}/v1/job/a%2Fb", json={"ID": "a/b", "JobModifyIndex": 7, "TaskGroups": [{"Name": "g", "Count": 3}]})
    job = client(token="secret", namespace="n", region="r").job("a/b")
    assert job is not None
    assert (job.id, job.modify_index, job.count("g"), job.count("h"), job.stopped) == ("a/b", 7, 3, None, False)
    assert asked() == ["GET /v1/job/a%2Fb?namespace=n&region=r"]
    assert responses.calls[0].request.headers["X-Nomad-Token"] == "secret"


@responses.activate
def test_what_is_not_there_is_none() -> None:
    responses.get(f"{URL}/v1/job/j", body="job not found", status=404)
    responses.get(f"{URL}/v1/allocation/a", body="alloc not found", status=404)
    responses.get(f"{URL}/v1/var/nomad/jobs/j", body="", status=404)
    responses.delete(f"{URL}/v1/job/j", body="job not found", status=404)
    assert client().job("j") is None
    assert client().allocation("a") is None
    assert client().variable("nomad/jobs/j") is None
    client().stop("j")


@responses.activate
def test_a_blocking_query_tells_its_index_and_is_not_repeated() -> None:
    headers = {"X-Nomad-Index": "9"}
    responses.get(f"{URL}/v1/job/j/allocations", json=[{"ID": "a", "Name": "j.g[4]"}], headers=headers)
    (found,), index = client().allocations("j", 8, 60)
    assert (found.index, found.status, index) == (4, AllocationStatus.UNKNOWN, 9)
    assert asked() == ["GET /v1/job/j/allocations?index=8&wait=60s"]
    responses.reset()
    responses.get(f"{URL}/v1/job/j/allocations", body="No cluster leader", status=500)
    with pytest.raises(NomadError):
        client().allocations("j", 8, 60)
    assert len(responses.calls) == 1


@responses.activate
def test_allocations_that_have_not_changed_are_not_parsed_again() -> None:
    responses.get(f"{URL}/v1/job/j/allocations", json=[{"ID": "a", "ModifyIndex": 5}, {"ID": "b", "ModifyIndex": 6}])
    known = {id_: Allocation.parse({"ID": id_, "ModifyIndex": 5}) for id_ in ("a", "b")}
    found, _ = client().allocations("j", known=known)
    assert found[0] is known["a"]
    assert found[1] is not known["b"]


@responses.activate
def test_a_read_is_repeated_until_there_is_a_leader() -> None:
    responses.add(NO_LEADER)
    responses.add(NO_LEADER)
    responses.get(f"{URL}/v1/job/j", json={"ID": "j"})
    assert client().job("j") is not None


@responses.activate
def test_a_write_is_repeated_only_if_it_had_no_effect() -> None:
    responses.post(f"{URL}/v1/jobs", body="No cluster leader", status=500)
    responses.post(f"{URL}/v1/jobs", json={"JobModifyIndex": 7})
    assert client().submit({"ID": "j"}) == 7
    responses.reset()
    responses.post(f"{URL}/v1/jobs", body=requests.ConnectionError("cut in the middle"))
    with pytest.raises(NomadUnreachable):
        client().submit({"ID": "j"})
    assert len(responses.calls) == 1
    responses.reset()
    responses.post(f"{URL}/v1/jobs", body="raft apply failed: leadership lost while committing log", status=500)
    with pytest.raises(NomadError, match="leadership lost"):
        client().submit({"ID": "j"})
    assert len(responses.calls) == 1


def test_a_write_to_where_nobody_listens_is_repeated() -> None:
    request = requests.Session.request
    with socket.socket() as sock, mock.patch.object(requests.Session, "request", autospec=True, side_effect=request) as sent:
        sock.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(NomadUnreachable, match="nomad agent -dev"):
            NomadClient(Connection.of({"address": address}, environ={})).submit({"ID": "j"})
    assert sent.call_count == 3


@responses.activate
def test_a_refusal_names_the_capability() -> None:
    responses.post(f"{URL}/v1/job/j/scale", body="Permission denied", status=403)
    with pytest.raises(NomadDenied, match="scale-job") as denied:
        client(token="secret").scale("j", "g", 3, "why")
    assert denied.value.status == 403
    assert "secret" not in str(denied.value)
    with pytest.raises(NomadDenied, match="anonymous"):
        client().scale("j", "g", 3, "why")


@responses.activate
def test_nomads_plain_text_reaches_the_user() -> None:
    text = "job scaling blocked due to active deployment"
    responses.post(f"{URL}/v1/job/j/scale", body=text, status=400)
    with pytest.raises(NomadError, match=text):
        client().scale("j", "g", 3, "why", if_unchanged_since=12)
    assert json.loads(responses.calls[0].request.body or "")["JobModifyIndex"] == 12


@pytest.mark.parametrize("body", [b"<html></html>", b"{", b""])
@responses.activate
def test_something_else_than_json_is_told(body: bytes) -> None:
    responses.get(f"{URL}/v1/job/j", body=body, status=200)
    with pytest.raises(NomadError, match="something else than JSON"):
        client().job("j")


@responses.activate
def test_a_variable_is_made_by_one_only() -> None:
    responses.put(f"{URL}/v1/var/nomad/jobs/j", json={})
    responses.put(f"{URL}/v1/var/nomad/jobs/j", json={}, status=409)
    assert client().create_variable("nomad/jobs/j", {"token": "t"})
    assert not client().create_variable("nomad/jobs/j", {"token": "t"})
    assert asked()[0] == "PUT /v1/var/nomad/jobs/j?cas=0"


def test_ports_are_found_in_either_place() -> None:
    shared = {"Ports": [{"Label": "http", "Value": 25000, "HostIP": "10.0.0.1"}]}
    assert address_of({"AllocatedResources": {"Shared": shared}}, "http") == "10.0.0.1:25000"
    network = {"IP": "fd00::1", "DynamicPorts": [{"Label": "http", "Value": 25000}]}
    assert address_of({"AllocatedResources": {"Shared": {"Networks": [network]}}}, "http") == "[fd00::1]:25000"
    assert address_of({"AllocatedResources": {"Shared": shared}}, "other") is None
    assert address_of({}, "http") is None


def test_the_environment_says_what_is_not_given(tmp_path: Path) -> None:
    for name in ("ca", "cert", "key"):
        (tmp_path / name).write_text("")
    environ = {
        "NOMAD_ADDR": "https://n:4646",
        "NOMAD_TOKEN": "t",
        "NOMAD_NAMESPACE": "ns",
        "NOMAD_REGION": "",
        "NOMAD_CACERT": str(tmp_path / "ca"),
        "NOMAD_CLIENT_CERT": str(tmp_path / "cert"),
        "NOMAD_CLIENT_KEY": str(tmp_path / "key"),
        "NOMAD_TLS_SERVER_NAME": "server.global.nomad",
        "NOMAD_SKIP_VERIFY": "true",
        "NOMAD_HTTP_AUTH": "user:password",
    }
    found = Connection.of({"token": "given"}, environ)
    assert (found.address, found.token, found.namespace, found.region) == ("https://n:4646", "given", "ns", None)
    assert (found.verify, found.tls_server_name) == (False, "server.global.nomad")
    session = found.session(set())
    assert (session.auth, session.cert) == (("user", "password"), (str(tmp_path / "cert"), str(tmp_path / "key")))
    assert "given" not in repr(found)
    assert "password" not in repr(found)
    assert Connection.of({}, {"NOMAD_CACERT": str(tmp_path / "ca")}).verify == str(tmp_path / "ca")
    with pytest.raises(ConfigError, match="nomad_cacert"):
        Connection.of({"cacert": "/nowhere"}, {})
    with pytest.raises(ConfigError, match="both"):
        Connection.of({"client_cert": str(tmp_path / "cert")}, {})


class _OverUnix(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class _Leader(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = json.dumps(f"1.2.3.4:{self.path}").encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def address_string(self) -> str:
        return "unix"


def test_over_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with _OverUnix(str(path), _Leader) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        nomad = NomadClient(Connection.of({"address": f"unix://{path}"}, environ={}))
        try:
            assert [nomad.leader(), nomad.leader()] == ["1.2.3.4:/v1/status/leader"] * 2
        finally:
            nomad.close()
            server.shutdown()
            thread.join()
    with pytest.raises(NomadUnreachable):
        NomadClient(Connection.of({"address": f"unix://{tmp_path}/nobody"}, environ={})).leader()


@responses.activate
def test_a_redirect_is_not_followed_with_the_token() -> None:
    responses.get(f"{URL}/v1/job/j", status=307, headers={"Location": "http://elsewhere.test/"})
    with pytest.raises(NomadError, match=r"redirect to http://elsewhere\.test/"):
        client(token="secret").job("j")
    assert len(responses.calls) == 1


@pytest.mark.parametrize("token", ["secret\n", "s\u00e9cret", "se cret"])
def test_a_token_that_no_header_can_carry_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Connection.of({}, {"NOMAD_TOKEN": token})
    assert "cret" not in str(refused.value)
