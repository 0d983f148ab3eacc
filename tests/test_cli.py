"""The command line, typed as a user types it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from arena import serving
from conftest import DEFECT, PACKAGE

from slotpool import SlotPool, SlotPoolError
from slotpool.sandbox.client import SandboxClient


def slotpool(*args: str, **more: Any) -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "PYTHONPATH": PACKAGE}
    return subprocess.run([sys.executable, "-m", "slotpool", *args], capture_output=True, env=env, cwd="/", check=False, **more)


def test_exec_passes_everything_on() -> None:
    done = slotpool("exec", "--", "bash", "-c", r"printf 'out\xff\n'; echo err >&2; exit 7")
    assert (done.stdout, done.stderr, done.returncode) == (b"out\xff\n", b"err\n", 7)
    assert slotpool("exec", "echo a | tr a b").stdout == b"b\n"
    assert slotpool("exec", "--", "echo", "a b", "$HOME").stdout == b"a b $HOME\n"
    assert slotpool("exec", "-i", "--", "wc", "-c", input=b"\x00" * 70_000).stdout == b"70000\n"
    assert slotpool("exec", "-e", "A=1 2", "echo $A").stdout == b"1 2\n"
    assert len(slotpool("exec", "seq 100000").stdout) == 588895


def test_exec_tells_what_went_wrong() -> None:
    timed_out = slotpool("exec", "--timeout", "0.3", "--", "sleep", "100")
    assert (timed_out.returncode, timed_out.stderr) == (124, b"slotpool: timed out after 0.3 s\n")
    killed = slotpool("exec", "kill -9 $$")
    assert killed.returncode == 137
    assert slotpool("exec", "--timeout", "-1", "true").returncode == 125
    refused = slotpool("exec", "--isolation", "none", "--no-network", "true")
    assert refused.returncode == 125
    assert b"network" in refused.stderr
    assert slotpool("nonsense").returncode == 2


def test_verbose_tells_of_containers_and_more_so_of_each_lease_and_execution() -> None:
    told = [slotpool(*options, "exec", "--", "echo", "out") for options in ((), ("-v",), ("-vv",))]
    assert [done.stdout for done in told] == [b"out\n"] * 3
    for said, in_whom in (
        (b"INFO slotpool.upkeep: ", [False, True, True]),
        (b"has come, with 1 slots", [False, True, True]),
        (b"DEBUG slotpool.pool: slot_0, lease ", [False, False, True]),
        (b"(bash) ended with exit code 0", [False, False, True]),
    ):
        assert [said in done.stderr for done in told] == in_whom, said


@pytest.mark.parametrize("opened", ["", "3</dev/null", "3</dev/null 4</dev/null"])
def test_serve_serves_a_pool_until_interrupted(opened: str) -> None:
    env = {**os.environ, "PYTHONPATH": PACKAGE, "SLOTPOOL_TOKEN": "a-token"}
    command = [
        "bash",
        "-c",
        f'exec "$0" "$@" {opened}',
        sys.executable,
        "-m",
        "slotpool",
        "serve",
        "--port",
        "0",
        "--slots",
        "2",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd="/")
    assert server.stdout is not None
    address = server.stdout.readline().decode().strip()
    assert address.startswith("http://127.0.0.1:")
    with SlotPool(servers=address, token="a-token") as pool, pool.slot() as s:
        assert s.bash("echo well").stdout == "well\n"
        assert s.container_addr == address
    server.send_signal(signal.SIGINT)
    _, err = server.communicate(timeout=30)
    assert server.returncode == 0
    assert b"a-token" not in err
    assert DEFECT.encode() not in err


def test_serve_has_the_token_of_a_file_and_workspaces_where_it_is_told(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("another-token\n")
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory())  # a shorter path than tmp_path, for sockets in it
        options = ["--slots=3", f"--token-file={file}", f"--state-dir={state}", "--name=mine"]
        server = stack.enter_context(serving("none", *options))
        with pytest.raises(SlotPoolError, match="token"):  # that of the environment
            server.client.health()
        client = stack.enter_context(contextlib.closing(SandboxClient(server.address, "another-token")))
        assert client.health()["name"] == "mine"
        pool = stack.enter_context(SlotPool(servers=server.address, token="another-token"))
        assert pool.total_slots == 3
        with pool.slot() as s:
            assert Path(s.workspace_dir).is_relative_to(state)


def test_serve_says_that_it_has_no_token_and_stays_on_loopback() -> None:
    refused = slotpool("serve", "--host", "0.0.0.0")
    assert refused.returncode == 125
    assert b"SLOTPOOL_TOKEN" in refused.stderr
    env = {**os.environ, "PYTHONPATH": PACKAGE}
    command = [sys.executable, "-m", "slotpool", "serve", "--port", "0", "--slots", "1"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd="/")
    assert server.stdout is not None
    assert server.stdout.readline().startswith(b"http://127.0.0.1:")
    server.terminate()
    _, err = server.communicate(timeout=30)
    assert b"without a token" in err
    assert DEFECT.encode() not in err


@pytest.mark.timeout(300)
def test_bench_prints_figures_beside_their_baselines(tmp_path: Path) -> None:
    kept, broken = str(tmp_path / "kept"), tmp_path / "broken"
    done = slotpool("bench", "--rounds", "1", "--save", kept)
    assert done.returncode == 0, done.stderr
    done = slotpool("bench", "--rounds", "1", "--json", "--compare", kept)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    before = json.loads(Path(kept).read_text())
    assert [figure["before"] for figure in told["figures"]] == [figure["value"] for figure in before["figures"]]
    broken.write_text("{}")
    for words in (["--compare", str(broken)], ["--compare", str(tmp_path / "missing")], ["--save", str(tmp_path)]):
        refused = slotpool("bench", *words)
        assert (refused.returncode, refused.stdout) == (125, b"")
        assert refused.stderr.startswith(f"slotpool: {words[0]}: expected a file".encode())
    names = [figure["name"] for figure in told["figures"]]
    for part in (
        's.bash("true"), 10 ms apart',
        "back to back",
        "at once",
        "acquire + release",
        "hand-over",
        "batch",
        "100 MiB",
        "memory",
    ):
        assert any(part in name for name in names), part
    beside = {figure["name"] for figure in told["figures"] if figure["ratio"] is not None}
    for part in ("apart", "back to back", "slots at once", "execute_batch", "hand-over", "write 100 MiB", "read 100 MiB"):
        assert any(part in name for name in beside), part
    assert all(figure["value"] is None or figure["value"] > 0 for figure in told["figures"])


def test_settings_that_can_not_be_used_are_named() -> None:
    for words, said in (
        (["up", "--set", "drivr=docker"], b"drivr: expected a setting of SlotPoolConfig (did you mean driver?)"),
        (["up", "--set", "cpu=much"], b"cpu: expected an integer"),
        (["status", "--set", "privileged=yes"], b"privileged: expected True or False, got 'yes'"),
        (["up", "--set", "memory"], b"--set: expected NAME=VALUE, got 'memory'"),
        (["down", "--job", "a", "--set", "job_id=b"], b"job_id: expected one value"),
        (["up", "--set", "cpu=1", "--set", "cpu=2"], b"cpu: expected one value"),
        (["up", "--set", "backend=local"], b"backend: expected nomad"),
        (["up", "--set", 'nomad_token="two words"'], b"nomad_token: expected printable"),
        (["up", "--nomad", "nowhere"], b"nomad_address: expected an address"),
        (["exec", "--job", "a", "true"], b"--job: expected --nomad"),
        (["bench", "--set", "cpu=1"], b"--set: expected --nomad"),
        (["bench", "--nomad", "--set", "prefetch=1"], b"prefetch: expected at least 10"),
        (["build", "--image", ""], b"image: expected a non-empty string"),
    ):
        refused = slotpool(*words)
        assert (refused.returncode, refused.stdout) == (125, b""), words
        assert refused.stderr.startswith(b"slotpool: " + said), refused.stderr
        assert b"two words" not in refused.stderr


def test_a_cluster_that_does_not_answer() -> None:
    for words in (["status"], ["exec", "true"]):
        refused = slotpool(*words[:1], "--nomad", "http://127.0.0.1:1", *words[1:])
        assert (refused.returncode, refused.stdout) == (125, b""), words
        assert b"Nomad at http://127.0.0.1:1 can't be reached" in refused.stderr


def test_build_passes_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/sh\n[ "$1" = build ] || exit 1\nprintf "%s\\n" "$@"\n[ "$3" != bad:local ]\n')
    docker.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    options = ["--base", "b", "--dockerfile", "d", "--context", "c", "--package", "p", "q", "--package", "r"]
    built = slotpool("build", "--image", "good:local", *options)
    assert (built.returncode, built.stdout) == (0, b"good:local\n"), built.stderr
    wanted = ["build", "-t", "good:local", "--build-arg", "BASE=b", "--build-arg", "EXTRA_PACKAGES=p q r"]
    said = built.stderr.decode().splitlines()
    assert said[: len(wanted)] == wanted
    assert said[-3:] == ["-f", "d", "c"]
    failed = slotpool("build", "--image", "bad:local")
    assert (failed.returncode, failed.stdout) == (125, b"")
    assert b"slotpool: building bad:local failed with exit code 1" in failed.stderr
