"""The tools that an execution can name: their arguments, how they start in a cell, what their end means."""

from __future__ import annotations

import errno
import json
import posixpath
import re
import secrets
from collections.abc import Mapping
from typing import Any, Protocol

import attr

from . import protocol, zygote
from .call import Call
from .capture import Outcome
from .cell import Cell
from .protocol import RequestFailed

MAX_COMMAND = 1024 * 1024  # bytes
MAX_FAILURE = 4096  # bytes in which a file tool tells what went wrong
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_USES_HIGH_DESCRIPTORS = re.compile(rb"\d\d[<>]|[<>]&-")
_TO_ESCAPE = re.compile(rb"[^ -~]|['\\]")
_BASH_ARGS = dict.fromkeys("command cwd env stdin allow_network require_sandbox".split())
_READ_ARGS = dict.fromkeys(["path"])
_WRITE_ARGS = dict.fromkeys(["path", "content"])
# Bash does not let these be set.
_READONLY = frozenset("BASHOPTS BASH_VERSINFO EUID PPID SHELLOPTS UID".split())


@attr.s(slots=True, auto_attribs=True, frozen=True)
class Setting:
    """What a tool is used in."""

    workspace: str
    isolation: str
    network: bool
    max_output: int
    max_file: int


class Tool(Protocol):
    """One use of a tool, its arguments checked."""

    stdout_limit: int  # bytes kept of what it prints
    stderr_limit: int

    def start(self, cell: Cell) -> Call:
        """Begin; the caller drives the call to its end.

        :raises OSError: if the sandbox takes no orders.
        """

    def error(self, outcome: Outcome) -> str:
        """Why it failed, empty if it did not; what it printed may be amended.

        :raises RequestFailed: if it could not be carried out as asked.
        """


class Bash:
    """``bash {command, cwd?, env?, stdin?, allow_network?, require_sandbox?}``"""

    def __init__(self, args: Mapping[str, Any], setting: Setting) -> None:
        _refuse_unknown(args, _BASH_ARGS)
        command = _text(args, "command")
        if len(command) > MAX_COMMAND:
            raise protocol.invalid(
                "command", f"at most {MAX_COMMAND} bytes (write longer ones to a file)", f"{len(command)} bytes"
            )
        self.stdout_limit = setting.max_output
        self._stdin = _text(args, "stdin", nul=True) if args.get("stdin") is not None else None
        # What bash evaluates before the command, see zygote.BOOTSTRAP. If the directory can't be entered, the nonce says so.
        parts = [b"unset REPLY;SECONDS=0"]
        self._cwd, self._nonce = "", b""
        self.stderr_limit = setting.max_output
        if args.get("cwd") is not None:
            cwd = _text(args, "cwd")
            self._nonce = secrets.token_hex(16).encode()
            self.stderr_limit = max(setting.max_output, 2 * len(self._nonce))
            self._cwd = args["cwd"]
            target = b"./" + cwd if cwd.startswith(b"-") else cwd  # `cd -` is another matter
            parts.append(b"cd -- %s||{ printf %%s %s >&2;exit 1;}" % (_quote(target), self._nonce))
        if args.get("env") is not None:
            for name, value in self._env(args["env"]).items():
                parts.append(b"export %s=%s" % (name.encode(), _quote(value)))
        parts.append(b"set -- " + _quote(command))
        if _USES_HIGH_DESCRIPTORS.search(command):
            parts.append(zygote.ALONE)
        self._script = b";".join(parts)
        if "allow_network" in args or "require_sandbox" in args:
            self._check_wishes(args, setting)

    @staticmethod
    def _env(env: object) -> dict[str, bytes]:
        if not isinstance(env, dict):
            raise protocol.invalid("env", "an object of strings", env)
        for name in env:
            if not isinstance(name, str) or not _NAME.match(name) or name in _READONLY:
                raise protocol.invalid("env", "names that a shell can set: letters, digits and _, not read-only in bash", name)
        return {name: _text(env, name, field=f"env.{name}") for name in env}

    @staticmethod
    def _check_wishes(args: Mapping[str, Any], setting: Setting) -> None:
        for name in ("allow_network", "require_sandbox"):
            if not isinstance(args.get(name), (bool, type(None))):
                raise protocol.invalid(name, "a boolean", args[name])
        if args.get("require_sandbox") and setting.isolation == "none":
            raise protocol.invalid("require_sandbox", 'false, as this container\'s isolation is "none"', True)
        allow = args.get("allow_network")
        if allow is not None and allow != setting.network:
            has = "has" if setting.network else "has no"
            raise protocol.invalid("allow_network", f"what the lease has been given, and it {has} network", allow)

    def start(self, cell: Cell) -> Call:
        return cell.shell(self._script, self._stdin)

    def error(self, outcome: Outcome) -> str:
        if self._cwd and outcome.stderr.ends_with(self._nonce):
            raise protocol.invalid("cwd", "a directory that can be entered in the slot", self._cwd)
        return ""


class ReadFile:
    """``read_file {path}``"""

    def __init__(self, args: Mapping[str, Any], setting: Setting) -> None:
        _refuse_unknown(args, _READ_ARGS)
        self._path = inside(args, setting.workspace)
        self.stdout_limit = self._limit = setting.max_file
        self.stderr_limit = MAX_FAILURE

    def start(self, cell: Cell) -> Call:
        return cell.read(self._path, self._limit)

    def error(self, outcome: Outcome) -> str:
        return file_error(outcome, self._path)


class WriteFile:
    """``write_file {path, content}``"""

    def __init__(self, args: Mapping[str, Any], setting: Setting) -> None:
        _refuse_unknown(args, _WRITE_ARGS)
        self._path = inside(args, setting.workspace)
        self._content = _text(args, "content", nul=True)
        self.stdout_limit = self.stderr_limit = MAX_FAILURE
        if len(self._content) > setting.max_file:
            raise protocol.invalid("content", f"at most {setting.max_file} bytes", f"{len(self._content)} bytes")

    def start(self, cell: Cell) -> Call:
        return cell.write(self._path, len(self._content), self._content)

    def error(self, outcome: Outcome) -> str:
        return file_error(outcome, self._path)


TOOLS: dict[str, type[Any]] = {"bash": Bash, "read_file": ReadFile, "write_file": WriteFile}


def parse(name: object, args: object, setting: Setting) -> Tool:
    """The tool ``name`` with ``args``.

    :raises RequestFailed: if either can't be used.
    """
    kind = TOOLS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise protocol.invalid("tool", " or ".join(sorted(TOOLS)), name)
    if not isinstance(args, dict):
        raise protocol.invalid("args", "an object", args)
    tool: Tool = kind(args, setting)
    return tool


def _refuse_unknown(args: Mapping[str, Any], known: Mapping[str, None]) -> None:
    if not args.keys() <= known.keys():
        raise protocol.invalid("args", "only " + ", ".join(known), next(name for name in args if name not in known))


def _text(args: Mapping[str, Any], name: str, nul: bool = False, field: str | None = None) -> bytes:
    """The argument as bytes: UTF-8, where surrogate escapes stand for bytes that are not."""
    value = args.get(name)
    name = field or name
    if not isinstance(value, str):
        raise protocol.invalid(name, "a string", value)
    if not nul and "\0" in value:
        raise protocol.invalid(name, "a string without NUL bytes", value)
    try:
        return value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as e:
        raise protocol.invalid(name, "text that UTF-8 can express", value) from e


def _quote(value: bytes) -> bytes:
    """As a word of bash, in ASCII."""
    if value.isascii():
        return b"'" + value.replace(b"'", b"'\"'\"'") + b"'"
    return b"$'" + _TO_ESCAPE.sub(lambda found: b"\\%03o" % found[0][0], value) + b"'"


def inside(args: Mapping[str, Any], workspace: str) -> str:
    """The argument ``path`` as an absolute path below ``workspace``, as far as its letters go.

    Where links in it lead is no matter: it is opened by a process of the slot, with the slot's own rights.
    """
    _text(args, "path")
    path = args["path"]
    whole = posixpath.normpath(posixpath.join(workspace, path))
    if not path or len(whole.encode("utf-8", "surrogateescape")) > 4095 or not whole.startswith(workspace + "/"):
        raise protocol.invalid("path", f"the path of a file inside {workspace}, absolute or relative to it", path)
    return whole


def file_error(outcome: Outcome, path: str) -> str:
    if outcome.status == 0 and not outcome.stdout.truncated:
        return ""
    if outcome.timed_out or outcome.cancelled:
        return "it took too long" if outcome.timed_out else "it was cancelled"
    raise file_failure(outcome.stderr.kept(), path)


def file_failure(told: bytes, path: str) -> RequestFailed:
    """What the process in the slot told of its failure; it is not to be trusted to tell something sensible."""
    code, message = errno.EIO, "the slot's own process did not say why"
    try:
        values = json.loads(told)
        if isinstance(values, list) and len(values) == 2 and isinstance(values[0], int) and 0 < values[0] < 4096:
            code, message = values[0], str(values[1])[:500]
    except (ValueError, RecursionError):
        pass
    return RequestFailed("file_error", message, errno=code, path=path)
