"""How many files each process of a slot may have open, by whose server it is and what that may have itself."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest
from conftest import ORDINARY_USER, PACKAGE, ROOT, can_run, why_not


@pytest.mark.parametrize(
    ("user", "hard", "most"),
    [("root", 4000, 4000), ("root", 20_000, 16_384), (ORDINARY_USER, 4000, 1000), (ORDINARY_USER, 80_000, 16_384)],
)
def test_of_an_ordinary_users_server_at_most_a_quarter_of_what_it_may_have(user: str, hard: int, most: int) -> None:
    if why_not("bwrap"):
        pytest.skip(why_not("bwrap"))
    if user == "root" and not ROOT:
        pytest.skip("not root")
    if hard > resource.getrlimit(resource.RLIMIT_NOFILE)[1]:
        pytest.skip("this process may not have so many itself")
    become: list[str] = []
    if ROOT and user != "root":
        if not can_run({"user": user, "group": "nogroup", "extra_groups": []}):
            pytest.skip(f"user {user} can't run {sys.executable} with {PACKAGE}")
        become = ["setpriv", f"--reuid={user}", "--regid=nogroup", "--clear-groups"]
    command = ["sh", "-c", f'ulimit -n {hard} && exec "$@"', "sh", *become, sys.executable, "-m", "slotpool", "exec"]
    command += ["--isolation", "bwrap", "--", "ulimit -Sn; ulimit -Hn"]
    environment = {**os.environ, "PYTHONPATH": PACKAGE}
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout.split(), done.stderr) == ([str(most)] * 2, "")
