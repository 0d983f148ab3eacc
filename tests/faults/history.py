"""What happened, as each process saw it: a file for each, to which it appends one JSON object a line.

Events have the fields ``kind``, ``at`` (seconds on the monotonic clock, which the machine's processes share) and, by kind:

``grant``      boot, slot, lease: a server has leased that slot to this client
``hold``       holder, lease: a caller got a slot; ``holder`` is new for each
``call``       holder, part, call: about to be made; ``part`` counts the holder's resets
``result``     call, out, well: its result has come; ``well``, it says that all has been done
``error``      call, error, may_have_run: it raised
``wrote``      holder, part, call, well: a file was written; its content is the call
``read``       holder, part, call, content: the same file was read, while no write was under way
``effect``     what, holder, part, call, stamp, files: told by what runs in the slot itself, ``begin``, ``end`` or ``beat`` of a
               process in the background; with the time there, and what was in the workspace
``raised``     client, error: something else than the library's own errors
``last``       client, thread: it was told to come to an end, and could do its work once more
``stopped``    client, held: its pool has been stopped, with so many slots still held
``asked``      client, threads: it was told to come to an end, and was not killed since
``slots``      server, wanted, slots: in the end, once nobody has any; so many are wanted, as ``GET /v1/slots`` shows them
``exited``     server, code, why: the process ended; ``why`` is what was done to it, if anything
``left``       process: it is still there in the end
``fault``      what, whom
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

Event = dict[str, Any]


class History:
    """One process's file. Thread-safe. What is written is there even if the process is killed at once."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def write(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, "at": time.monotonic(), **fields}) + "\n"
        assert os.write(self._fd, line.encode()) == len(line)

    def close(self) -> None:
        os.close(self._fd)


def read(directory: Path) -> list[Event]:
    """All that was written, in the order of time."""
    lines = [line for path in sorted(directory.glob("*.history")) for line in path.read_text().splitlines()]
    return sorted((json.loads(line) for line in lines), key=lambda event: float(event["at"]))
