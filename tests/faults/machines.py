"""The processes of a run: servers, each started again whenever it ends, and clients, each with its own links to all servers."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import attr
from conftest import PACKAGE, SESSION, wait_until
from history import History
from weather import Link

from slotpool.sandbox.client import SandboxClient

HERE = Path(__file__).resolve().parent
TOKEN = "SLOTPOOL_TEST_server_token"

# Their wall clock is what a file says: so many seconds off. Nothing may depend on it. It is mapped, as descriptors may run out.
STEPPED_CLOCK = """
import mmap, struct, time
with open({path!r}, "rb") as file:
    steps = mmap.mmap(file.fileno(), 8, prot=mmap.PROT_READ)
def off():
    return struct.unpack("d", steps[:8])[0]
now, now_ns = time.time, time.time_ns
time.time = lambda: now() + off()
time.time_ns = lambda: now_ns() + int(off() * 1e9)
"""


def stepped_clock(directory: Path) -> tuple[Path, dict[str, str]]:
    """The file, and the environment of processes that go by it."""
    path = directory / "clock"
    set_clock(path, 0.0)
    (directory / "sitecustomize.py").write_text(STEPPED_CLOCK.format(path=str(path)))
    return path, {**os.environ, "PYTHONPATH": f"{directory}:{PACKAGE}"}


def set_clock(path: Path, off: float) -> None:
    with path.open("r+b" if path.exists() else "xb") as file:
        file.write(struct.pack("d", off))


class Server:
    """One sandbox server, or rather one after the other, behind the same links."""

    def __init__(
        self, name: str, mode: str, slots: int, state: str, environment: dict[str, str], history: History, seed: object
    ) -> None:
        self.name = name
        self.mode = mode
        self.slots = slots
        self._environment = {**environment, "SLOTPOOL_TOKEN": TOKEN}
        self._history = history
        self._random = random.Random(f"{seed} {name}")
        self.state = state
        os.chmod(state, 0o711)
        self.log = Path(self.state).with_suffix(".log")
        self._lock = threading.Lock()  # guards the next two
        self._address = "http://127.0.0.1:9"  # where nobody listens
        self._links: list[Link] = []
        self.why = ""  # it is about to end, if it does
        self.starts = 0
        self._ending = False
        self._up = threading.Event()
        self.process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep_up)
        self._thread.start()

    def _keep_up(self) -> None:
        command = ["serve", "--port", "0", "--slots", str(self.slots), "--isolation", self.mode, "--state-dir", self.state]
        while not self._ending:
            with self.log.open("ab") as log:
                self.process = process = subprocess.Popen(
                    [sys.executable, "-m", "slotpool", *command, "--name", self.name],
                    env=self._environment,
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )
            assert process.stdout is not None
            address = process.stdout.readline().decode().strip()
            if address:
                self.starts += 1
                with self._lock:
                    self._address = address
                    for link in self._links:
                        link.proxy.target = address
                self._up.set()
            code = process.wait()
            process.stdout.close()
            self._up.clear()
            why, self.why = self.why or ("" if address else "it could not start"), ""
            self._history.write("exited", server=self.name, code=code, why=why)
            if not self._ending:
                time.sleep(self._random.uniform(0.0, 0.5))

    @property
    def up(self) -> bool:
        return self._up.is_set()

    def wait_up(self) -> None:
        """Until one is up, and nothing has been done to it that it will end of."""
        assert wait_until(lambda: self.up and not self.why, 30), f"{self.name} does not start; {self.log} says why"

    def link(self, rng: random.Random, cut: Counter[str]) -> Link:
        """Another way to it, which leads to whatever server is up."""
        with self._lock:
            link = Link(self._address, rng, cut)
            self._links.append(link)
        return link

    def direct(self) -> SandboxClient:
        return SandboxClient(self._address, TOKEN)

    def stop(self) -> None:
        self._ending, self.why = True, "it was asked to end"
        if self.process is not None:
            self.process.terminate()
        self._thread.join()


@attr.s(auto_attribs=True)
class Client:
    """One client's process."""

    name: str
    threads: int
    process: subprocess.Popen[bytes]
    log: Path
    links: list[Link]

    def ask_to_end(self) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b"end\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it was killed
            pass

    def wait(self) -> int:
        assert self.process.stdin is not None
        code = self.process.wait()
        self.process.stdin.close()
        for link in self.links:
            link.close()
        return code


def start_client(orders: dict[str, Any], links: list[Link], environment: dict[str, str]) -> Client:
    log = Path(SESSION) / f"faults-{orders['client']}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")], env=environment, stdin=subprocess.PIPE, stdout=file, stderr=file
        )
    assert process.stdin is not None
    process.stdin.write(json.dumps(orders).encode() + b"\n")
    process.stdin.flush()
    return Client(orders["client"], orders["threads"], process, log, links)
