"""The example of a task and a reward runs as its page says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import PACKAGE

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_every_program_is_repaired() -> None:
    command = [sys.executable, str(EXAMPLES / "repairing.py"), "2"]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": PACKAGE}, cwd="/", capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.stderr, done.returncode) == ("", 0)
    assert re.sub(r"[\d.]+ s$", "t s", done.stdout, flags=re.M) == (
        "1 at once: 4 of 4 solved in t s\n2 at once: 4 of 4 solved in t s\n"
    )
