"""The command line, typed as a user types it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest
from conftest import PACKAGE

from slotpool import SlotPool


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


def test_serve_serves_a_pool_until_interrupted() -> None:
    env = {**os.environ, "PYTHONPATH": PACKAGE, "SLOTPOOL_TOKEN": "a-token"}
    command = [sys.executable, "-m", "slotpool", "serve", "--port", "0", "--slots", "2"]
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


@pytest.mark.timeout(300)
def test_bench_prints_figures_beside_their_baselines() -> None:
    done = slotpool("bench", "--rounds", "1", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    names = [figure["name"] for figure in told["figures"]]
    for part in ('s.bash("true"), 10 ms apart', "back to back", "at once", "acquire + release", "batch", "1 MiB", "memory"):
        assert any(part in name for name in names), part
    assert all(figure["value"] is None or figure["value"] > 0 for figure in told["figures"])
