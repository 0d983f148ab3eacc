"""What a pool's user is warned of, and what not."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from typing import Any

import pytest
from conftest import PACKAGE

from slotpool import SlotPool
from slotpool.security import SecurityWarning

TOKEN = "SLOTPOOL_TEST_token"
STATIC = {"backend": "static", "token": TOKEN}
NOMAD = {"backend": "nomad", "nomad_token": TOKEN}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"isolation": "none"}, 'isolation="none"'),
        ({**STATIC, "servers": "http://user:SLOTPOOL_TEST_token@build7:8080"}, "build7 unencrypted"),
        ({**STATIC, "servers": ["http://127.0.0.1:1", "http://10.0.0.1:1", "http://10.0.0.1:2"]}, "10.0.0.1 unencrypted"),
        ({**STATIC, "servers": "http://[fd00::1]:8080"}, "fd00::1 unencrypted"),
        ({**NOMAD, "nomad_address": "http://nomad.example:4646"}, "nomad.example unencrypted"),
        ({"nomad_address": "http://nomad.example:4646", "nomad_http_auth": f"user:{TOKEN}"}, "nomad.example unencrypted"),
    ],
)
def test_a_danger_is_warned_of_once_where_the_pool_is_made(settings: dict[str, Any], said: str) -> None:
    with pytest.warns(SecurityWarning) as caught:
        SlotPool(**settings)
    (warning,) = caught
    assert said in str(warning.message)
    assert TOKEN not in str(warning.message)
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"isolation": "user"},
        {"isolation": "none", "backend": "static", "servers": "http://127.0.0.1:1"},  # it is the server's to choose
        {**STATIC, "servers": ["http://127.8.8.8:1", "http://localhost:1", "http://[::1]:1", "https://build7:1", "unix:///s"]},
        {"servers": "http://build7:8080"},
        {**NOMAD, "nomad_address": "https://nomad.example:4646"},
        {**NOMAD, "nomad_address": "unix:///run/nomad"},
        {"nomad_address": "http://nomad.example:4646"},
    ],
)
def test_what_is_safe_is_not(settings: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SlotPool(**settings)


@pytest.mark.parametrize("variable", ["NOMAD_TOKEN", "NOMAD_HTTP_AUTH"])
def test_a_token_of_the_environment_is_in_danger_too(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, f"user:{TOKEN}")
    with pytest.warns(SecurityWarning, match=r"nomad\.example unencrypted"):
        SlotPool(nomad_address="http://nomad.example:4646")


def test_the_command_line_says_it_in_a_line() -> None:
    command = [sys.executable, "-m", "slotpool", "exec", "--isolation", "none", "--", "echo well"]
    env = {**os.environ, "PYTHONPATH": PACKAGE}
    done = subprocess.run(command, cwd="/", env=env, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("well\n", 0)
    (line,) = done.stderr.splitlines()
    assert line.startswith('slotpool: isolation="none": ')
