"""The nursery's process, as the server has it. Little is imported here, so that it can be started before all else is."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SandboxStartFailed, StartFailed
from .undertaker import Undertaker

if TYPE_CHECKING:
    from .order import Order


class NurseryProcess:
    """The running nursery. Thread-safe.

    :ivar others: children that this process had before, of the program that it was then, say.
    """

    def __init__(self) -> None:
        """Start it. It does nothing but prepare until :meth:`begin`, which takes as long as the server needs to be imported.

        :raises OSError, StartFailed: nothing is left then.
        """
        self.others = _children()
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with near, far:
            package_root = str(Path(__file__).resolve().parents[2])
            bootstrap = (
                "import sys; sys.path.append(sys.argv.pop(1)); from slotpool.sandbox import nursery; nursery.main(sys.argv[1:])"
            )
            of = os.environ.get("TMPDIR", "")  # is of no use to it, and tells who looks at processes whose this one is
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", bootstrap, package_root, str(far.fileno()), of],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[far.fileno()],
                start_new_session=True,
                # Python itself may need that one; nothing else of the server's environment goes into sandboxes.
                env={name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ},
                cwd="/",
            )
            self._control = near.dup()
        try:
            self.undertaker = Undertaker()
        except RuntimeError as e:
            self._control.close()
            self.wait()
            raise StartFailed(f"this server needs more threads than it may have: {e}") from e

    def begin(self, directory: str, groups: Sequence[str], locks: Sequence[int]) -> None:
        """Have it serve. When it ends, after every sandbox, it removes ``directory`` and ``groups``, and lets go of ``locks``.

        :raises StartFailed: it is gone already.
        """
        try:
            socket.send_fds(self._control, [json.dumps([directory, *groups]).encode()], locks)
        except OSError as e:
            raise StartFailed(f"the process that makes sandboxes ended at once: {e}") from e

    def order(self, order: Order, control: socket.socket, lifeline: socket.socket) -> None:
        """Ask for a sandbox, with the far ends of its sockets.

        :raises SandboxStartFailed: nobody is there to make it.
        """
        try:
            socket.send_fds(self._control, [json.dumps(order).encode()], [control.fileno(), lifeline.fileno()])
        except OSError as e:
            raise SandboxStartFailed(f"the process that makes sandboxes is gone: {e}") from e

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self) -> None:
        """Wait until it has ended."""
        self._process.wait()

    @property
    def has_failed(self) -> bool:
        """Whether it has ended and may have left processes of sandboxes."""
        return self._process.returncode not in (None, 0)

    def close(self) -> None:
        """End every sandbox and the nursery; returns when it has ended. Repeatable."""
        self.undertaker.stop()  # first, as the nursery removes all that there is at its end, and does not expect others who do
        self._control.close()
        self.wait()


def _children() -> frozenset[int]:
    """Those of this process's only thread."""
    try:
        with open("/proc/thread-self/children") as f:
            return frozenset(map(int, f.read().split()))
    except FileNotFoundError:  # the kernel lacks CONFIG_PROC_CHILDREN
        from .killing import children

        return frozenset(children(os.getpid()))
