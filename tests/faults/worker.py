"""A client as a process of its own: a pool, and threads that lease, use and give back, and write down what they see.

It is told what to do by one line of JSON on its standard input, see :class:`Orders`. Another line asks it to come to an end.
"""

from __future__ import annotations

import errno
import json
import logging
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any, Callable

import attr
from history import History

import slotpool.container
from slotpool import Slot, SlotPool, SlotPoolError
from slotpool.errors import FileError, StartFailed
from slotpool.sandbox.client import SandboxClient
from slotpool.sandbox.protocol import LeaseAnswer
from slotpool.slot import ExecutionResult

PATIENCE = 60.0  # seconds in which a thread must get a slot, and a command done in it, once there are no more faults

# Tells the witness what it found, leaves a file, and prints its call; without a process more than there must be.
BEGIN = """shopt -s dotglob nullglob; there=(*)
tell() { echo "$1 $CALL $EPOCHREALTIME ${there[*]}" >/dev/udp/127.0.0.1/$WITNESS; }
tell begin || exit 4
: >"$CALL" || exit 3
"""
BEATS = "there=(); while tell beat; do sleep 0.05; done"
APART = "</dev/null >/dev/null 2>&1"
SCRIPTS = {
    "quick": "echo $CALL",
    "slow": "sleep 0.$((RANDOM % 4)); tell end; echo $CALL",
    "background": f"({BEATS}) {APART} & echo $CALL",
    "daemon": f"export -f tell; setsid bash -c '{BEATS}' {APART} & echo $CALL",
    "endless": "sleep 60; echo $CALL",
}


@attr.s(auto_attribs=True)
class Orders:
    client: str
    seed: int
    servers: list[str]
    token: str
    threads: int
    ttl: float
    prefetch: int
    network: bool
    witness: int  # port
    mark: str  # what the slots' processes have in their environment
    directory: str


def recording(history: History) -> type[SandboxClient]:
    """Clients that write down each lease that servers grant to them."""

    class Recording(SandboxClient):
        def lease(self, *args: Any, **more: Any) -> LeaseAnswer:
            answer = super().lease(*args, **more)
            for one in answer["leases"]:
                history.write("grant", boot=answer["boot_id"], slot=one["slot"], lease=one["token"])
            return answer

    return Recording


class Caller:
    """One thread of a client."""

    def __init__(self, orders: Orders, history: History, pool: SlotPool, number: int) -> None:
        self._orders = orders
        self._history = history
        self._pool = pool
        self._number = number
        self._random = random.Random(f"{orders.seed} {orders.client} {number}")
        self._leases = 0

    def run(self, ending: threading.Event) -> None:
        try:
            while not ending.is_set():
                self._once(5.0, None)
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline:
                if self._once(PATIENCE, ["quick"]):
                    self._history.write("last", client=self._orders.client, thread=self._number)
                    return
        except Exception as e:
            logging.exception("raised")
            self._history.write("raised", client=self._orders.client, error=repr(e))

    def _once(self, timeout: float, whats: list[str] | None) -> bool:
        """A lease, and what is done in it; whether all went well."""
        try:
            with self._pool.slot(timeout=timeout, network=True if self._orders.network else None) as slot:
                self._leases += 1
                holder = Holder(self._orders, self._history, slot, f"{self._orders.client}-{self._number}-{self._leases}")
                for what in whats or self._random.choices(*zip(*WHATS.items()), k=self._random.randint(0, 4)):
                    if not holder.do(what):
                        return False
        except SlotPoolError as e:
            logging.info("no slot: %s", e)
            time.sleep(0.05)  # as where none is, none will be in a moment
            return False
        return True


class Holder:
    """One lease's use."""

    def __init__(self, orders: Orders, history: History, slot: Slot, name: str) -> None:
        self._orders = orders
        self._history = history
        self._slot = slot
        self._name = name
        self._part = 0
        self._calls = 0
        history.write("hold", holder=name, lease=slot._tenure.token)

    def do(self, what: str) -> bool:
        """Whether the slot can be used on."""
        try:
            getattr(self, what, self._command)(what)
        except SlotPoolError as e:
            logging.info("%s: %s", what, e)
            return False
        return True

    def _call(self) -> dict[str, Any]:
        self._calls += 1
        told = {"holder": self._name, "part": self._part, "call": f"{self._name}.{self._part}.{self._calls}"}
        self._history.write("call", **told)
        return told

    def _args(self, what: str, call: str) -> dict[str, Any]:
        env = {"CALL": call, "WITNESS": str(self._orders.witness), "FAULTS": self._orders.mark}
        return {"command": BEGIN + SCRIPTS[what], "env": env}

    def _command(self, what: str) -> None:
        call = self._call()["call"]
        args = self._args(what, call)
        try:
            result = self._slot.bash(**args, timeout=0.3 if what == "endless" else 10)
        except SlotPoolError as e:
            self._history.write("error", call=call, error=repr(e), may_have_run=getattr(e, "may_have_run", False))
            raise
        self._result(call, result)

    def batch(self, what: str) -> None:
        calls = [self._call()["call"] for _ in range(3)]
        entries: list[Any] = [(self._slot, "bash", self._args("slow", call)) for call in calls]
        failed = []
        for call, result in zip(calls, self._slot._pool.execute_batch(entries, timeout=10)):
            if "exception" in result.metadata:
                failed.append(result.error)
                self._history.write("error", call=call, error=result.error, may_have_run=result.metadata["may_have_run"])
            else:
                self._result(call, result)
        if failed:
            raise SlotPoolError(failed[0])

    def _result(self, call: str, result: ExecutionResult) -> None:
        self._history.write("result", call=call, out=result.stdout.strip(), well=result.success)

    def write(self, what: str) -> None:
        call = self._call()
        well = False
        try:
            self._slot.write_file("file", call["call"])
            well = True
        finally:
            self._history.write("wrote", well=well, **call)

    def read(self, what: str) -> None:
        call = self._call()
        try:
            content = self._slot.read_file("file")
        except FileError as e:
            if e.errno != errno.ENOENT:
                raise
            content = ""
        self._history.write("read", content=content, **call)

    def reset(self, what: str) -> None:
        self._slot.reset()
        self._part += 1


WHATS = {"quick": 6, "slow": 3, "background": 2, "daemon": 2, "endless": 1, "batch": 2, "write": 3, "read": 3, "reset": 1}


def _start(pool: Callable[[], SlotPool], ending: threading.Event) -> SlotPool:
    while True:
        try:
            return pool().start()
        except StartFailed as e:
            logging.info("not started: %s", e)
            if ending.is_set():
                raise


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(threadName)s %(message)s")
    orders = Orders(**json.loads(sys.stdin.readline()))
    history = History(Path(orders.directory) / f"{orders.client}.history")
    slotpool.container.SandboxClient = recording(history)  # type: ignore[attr-defined]
    ending = threading.Event()

    def await_end() -> None:
        sys.stdin.readline()
        ending.set()

    threading.Thread(target=await_end, daemon=True).start()
    settings: dict[str, Any] = {"servers": orders.servers, "token": orders.token, "lease_ttl": orders.ttl}
    pool = _start(lambda: SlotPool(**settings, prefetch=orders.prefetch, start_timeout=10), ending)
    with pool:
        callers = [Caller(orders, history, pool, i) for i in range(orders.threads)]
        threads = [threading.Thread(target=caller.run, args=(ending,), name=f"caller-{i}") for i, caller in enumerate(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        held = pool.acquired_slots
    history.write("stopped", client=orders.client, held=held)


if __name__ == "__main__":
    main()
