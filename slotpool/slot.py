"""What a lease hands out: the slot, and what running something in it gives."""

from __future__ import annotations

import enum
import os
import secrets
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attr

from .errors import CommandFailed, InvalidRequest, shown
from .preparing import prepare

if TYPE_CHECKING:
    from types import TracebackType

    from .pool import SlotPool
    from .preparing import Step
    from .sandbox.protocol import Result
    from .tenure import Tenure


class SlotState(enum.Enum):
    """Where a slot is, as its holder sees it."""

    AVAILABLE = "available"
    ACQUIRED = "acquired"
    EXECUTING = "executing"
    RELEASING = "releasing"
    ERROR = "error"


@attr.s(frozen=True, auto_attribs=True, kw_only=True)
class ExecutionResult:
    """How a command, or a tool, ended. A non-zero exit is data, not an exception; see :meth:`check`.

    Two are equal if all but where, when and for how long they ran is: ``slot_id``, ``execution_id`` and ``duration``.

    :ivar success: it ended with exit code 0, in time.
    :ivar stdout: what it printed, as UTF-8; other bytes are U+FFFD. Of more than the limit, head and tail are kept with a
        line between them that says how much was left out, and ``stdout_truncated`` is set.
    :ivar stderr: likewise.
    :ivar exit_code: the exit code; 128 + the signal's number if a signal killed it, as shells count.
    :ivar signal: the number of the signal that killed it, else None.
    :ivar timed_out: it was killed, with all it had started, as its time was up. What it had printed until then is there.
    :ivar duration: seconds, as the container measured it.
    :ivar error: why a tool failed, or could not be run, in words; empty for a command that ran.
    :ivar output: stdout and stderr joined; the content, for ``read_file``.
    :ivar metadata: ``isolation``, ``network``, ``restarted`` (the slot's other processes had to be ended with it).
    """

    success: bool
    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None
    signal: int | None = None
    timed_out: bool = False
    stdout_truncated: bool = False
    stderr_truncated: bool = False
    duration: float = attr.ib(default=0.0, eq=False)
    error: str = ""
    execution_id: str = attr.ib(default="", eq=False)
    slot_id: str = attr.ib(default="", eq=False)
    metadata: dict[str, Any] = attr.ib(factory=dict)
    _raw_stdout: str | None = attr.ib(default=None, repr=False, eq=False)
    _raw_stderr: str | None = attr.ib(default=None, repr=False, eq=False)

    @property
    def stdout_bytes(self) -> bytes:
        """``stdout`` as it was printed, where that is not UTF-8."""
        return _encoded(self.stdout if self._raw_stdout is None else self._raw_stdout)

    @property
    def stderr_bytes(self) -> bytes:
        """``stderr`` as it was printed, where that is not UTF-8."""
        return _encoded(self.stderr if self._raw_stderr is None else self._raw_stderr)

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    @property
    def truncated(self) -> bool:
        """Whether something was left out of ``stdout`` or ``stderr``."""
        return self.stdout_truncated or self.stderr_truncated

    def check(self) -> ExecutionResult:
        """This result, if it is a success.

        :raises CommandFailed: if not.
        """
        if not self.success:
            raise CommandFailed(self)
        return self

    def to_dict(self) -> dict[str, Any]:
        """All fields, ``output`` and ``truncated`` too, ready for JSON."""
        fields = attr.asdict(self, filter=lambda field, _: not field.name.startswith("_"))
        return {**fields, "output": self.output, "truncated": self.truncated}

    def _repr_html_(self) -> str:
        from .html import of_result  # needed in notebooks alone

        return of_result(self)

    @classmethod
    def of(cls, result: Result, slot_id: str) -> ExecutionResult:
        """From a server's answer."""
        return cls(
            success=result["exit_code"] == 0 and not result["timed_out"] and not result["error"],
            stdout=_readable(result["stdout"]),
            stderr=_readable(result["stderr"]),
            raw_stdout=result["stdout"],
            raw_stderr=result["stderr"],
            exit_code=result["exit_code"],
            signal=result["signal"],
            timed_out=result["timed_out"],
            stdout_truncated=result["stdout_truncated"],
            stderr_truncated=result["stderr_truncated"],
            duration=result["duration"],
            error=result["error"],
            execution_id=result["execution_id"],
            slot_id=slot_id,
            metadata={key: result[key] for key in ("isolation", "network", "restarted")},
        )

    @classmethod
    def failed(cls, error: BaseException, execution_id: str, slot_id: str) -> ExecutionResult:
        """For a call of a batch that could not be carried out."""
        metadata = {"exception": type(error).__name__, "may_have_run": getattr(error, "may_have_run", False)}
        return cls(success=False, error=str(error), execution_id=execution_id, slot_id=slot_id, metadata=metadata)


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _readable(text: str) -> str:
    """``text`` with U+FFFD for what stands for bytes that are not UTF-8."""
    return text if text.isascii() else _encoded(text).decode("utf-8", "replace")


class Slot:
    """One isolated workspace, held by one lease. Made by :meth:`SlotPool.acquire`; use it in a ``with`` block, or release it.

    Thread-safe; commands of several threads run side by side. Once it is released, or its lease is lost, every call raises
    :class:`LeaseLost`. A slot that is dropped without being released is given back when it is collected.

    :ivar slot_id: its name in its container, ``slot_0`` and so on.
    :ivar alloc_id: the container: a Nomad allocation's id, or one made up for a local server.
    :ivar container_addr: the server's address.
    :ivar workspace_dir: the workspace's path, as commands in the slot see it.
    :ivar trajectory_id: what the caller uses the slot for; made up if none was given.
    :ivar metadata: the caller's own; not looked at.
    """

    def __init__(self, pool: SlotPool, tenure: Tenure, trajectory_id: str | None, setup: tuple[Step, ...]) -> None:
        self._pool = pool
        self._setup = setup
        self._tenure = tenure
        self.slot_id = tenure.slot
        self.alloc_id = tenure.container.id
        self.container_addr = tenure.container.address
        self.workspace_dir = tenure.workspace
        self.trajectory_id = trajectory_id or f"trajectory-{secrets.token_hex(8)}"
        self.metadata: dict[str, Any] = {}
        self._finalizer = weakref.finalize(self, pool._abandon, tenure)
        tenure.claimed = True
        self._finalizer.atexit = False  # the pool itself sees to that

    @property
    def state(self) -> SlotState:
        return self._tenure.state

    @property
    def lease_id(self) -> str:
        """What logs, the server's too, call the slot's lease. Nobody can use the lease by it."""
        return self._tenure.lease_id

    @property
    def network(self) -> bool:
        """Whether the slot can reach the network."""
        return self._tenure.network

    def bash(
        self,
        command: str,
        *,
        timeout: float | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        stdin: str | bytes | None = None,
        check: bool = False,
    ) -> ExecutionResult:
        """Run a command in bash; returns when the shell exits, even if background processes live on.

        The command runs at most once. Each runs in a shell of its own: ``cd`` and variables don't outlive it, files and
        background processes do, until the lease ends.

        :param timeout: seconds after which everything that the command started is killed; default ``command_timeout``.
        :param cwd: directory to run in, default the workspace; relative ones start there.
        :param env: variables to add to the slot's few.
        :param stdin: its standard input; empty if not given.
        :param check: raise :class:`CommandFailed` if it does not succeed.
        :raises InvalidRequest: an argument can't be used; nothing was run.
        :raises SlotError: the lease, the slot or the container was lost; ``may_have_run`` tells whether it is safe to try
            again elsewhere.
        """
        args: dict[str, Any] = {"command": command}
        if cwd is not None:
            args["cwd"] = _path(cwd, "cwd")
        if env is not None:
            if not isinstance(env, Mapping):
                raise InvalidRequest("env", "a mapping of names to strings, or None", shown(env))
            args["env"] = dict(env)
        if stdin is not None:
            args["stdin"] = stdin.decode("utf-8", "surrogateescape") if isinstance(stdin, bytes) else stdin
        result = self._pool.execute(self, "bash", args, timeout)
        return result.check() if check else result

    def read_file(self, path: str) -> str:
        """The content of a file as UTF-8 text; other bytes are U+FFFD. See :meth:`read_bytes`."""
        return self.read_bytes(path).decode("utf-8", "replace")

    def read_bytes(self, path: str) -> bytes:
        """The content of a file. Safe to repeat.

        :param path: inside the workspace, absolute or relative to it. Links are followed with the slot's own rights.
        :raises FileError: it can't be read; an ``OSError`` with ``errno``.
        :raises InvalidRequest, SlotError: as :meth:`bash`.
        """
        with self._tenure.use() as client:
            return client.read_file(self.slot_id, self._tenure.token, _path(path))

    def write_file(self, path: str, content: str | bytes) -> None:
        """Replace a file as a whole, or leave it as it was; directories on the way are made. Safe to repeat.

        :param path: as for :meth:`read_bytes`.
        :param content: text is written as UTF-8.
        :raises FileError: it can't be written; an ``OSError`` with ``errno``.
        :raises InvalidRequest, SlotError: as :meth:`bash`.
        """
        if not isinstance(content, (str, bytes, bytearray, memoryview)):
            raise InvalidRequest("content", "str or bytes", shown(content))
        try:
            data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else bytes(content)
        except UnicodeEncodeError as e:
            raise InvalidRequest("content", "text that can be UTF-8", str(e)) from e
        limit = self._pool.config.max_file_size
        if len(data) > limit:
            raise InvalidRequest("content", f"at most max_file_size, {limit} bytes", f"{len(data)} bytes")
        with self._tenure.use() as client:
            client.write_file(self.slot_id, self._tenure.token, _path(path), data)

    def reset(self) -> None:
        """Empty the workspace, kill every process and carry out the slot's setup again, keeping the lease.

        :raises SetupFailed: a step of the setup failed; the slot stays with the caller.
        :raises SlotError: as :meth:`bash`.
        """
        self._tenure.prepared = ()
        with self._tenure.use() as client:
            client.reset(self.slot_id, self._tenure.token)
        self._prepare()

    def _prepare(self) -> None:
        """Carry out what is still to be done of its setup."""
        prepare(self, self._setup, self._pool.config.setup_timeout)

    def release(self) -> None:
        """Give the slot back; returns at once, the cleaning is done in the background. Repeatable."""
        self._pool.release(self)

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()

    def to_dict(self) -> dict[str, Any]:
        """What identifies the slot and its use, ready for JSON. The right to it is not in there."""
        return {
            "slot_id": self.slot_id,
            "alloc_id": self.alloc_id,
            "container_addr": self.container_addr,
            "workspace_dir": self.workspace_dir,
            "state": self.state.value,
            "trajectory_id": self.trajectory_id,
            "metadata": self.metadata,
        }

    def _repr_html_(self) -> str:
        from .html import of_slot  # needed in notebooks alone

        return of_slot(self)

    def __repr__(self) -> str:
        return f"<Slot {self.slot_id} of {self.alloc_id}, {self.state.value}>"


def _path(path: object, field: str = "path") -> str:
    if isinstance(path, os.PathLike):
        path = os.fspath(path)
    if not isinstance(path, str):
        raise InvalidRequest(field, "a path as str", shown(path))
    return path
