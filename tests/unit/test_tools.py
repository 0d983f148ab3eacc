"""The tools' arguments: each bad one is named, and good ones reach bash byte for byte."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import attr
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from slotpool.sandbox import tools, zygote
from slotpool.sandbox.capture import Outcome, Output
from slotpool.sandbox.cell import Cell
from slotpool.sandbox.protocol import ErrorBody, RequestFailed

SETTING = tools.Setting("/workspace", "bwrap", network=False, max_output=50_000, max_file=1000)
ENV = {"PATH": os.defpath, "LANG": "C.UTF-8"}
FEW = settings(max_examples=60)


def refused(name: object, args: object, setting: tools.Setting = SETTING) -> ErrorBody:
    with pytest.raises(RequestFailed) as caught:
        tools.parse(name, args, setting)
    body = caught.value.body
    assert (body["code"], caught.value.status) == ("invalid_request", 400)
    assert body["expected"]
    assert body["got"]
    assert body["message"] == f"{body['field']}: expected {body['expected']}, got {body['got']}"
    return body


# Arguments


BAD_TEXT: list[Any] = [None, 5, True, b"x", ["x"], {"a": "b"}, "a\0b", "\ud800"]
BAD: list[tuple[str, str, Any]] = [
    *(
        ("bash", "command", value)
        for value in [*BAD_TEXT, "x" * (tools.MAX_COMMAND + 1), "\u00e9" * (tools.MAX_COMMAND // 2 + 1)]
    ),
    *(("bash", "cwd", value) for value in BAD_TEXT[1:]),
    *(("bash", "stdin", value) for value in [5, True, b"x", ["x"], "\ud800"]),
    *(("bash", "env", value) for value in [5, "A=b", ["A=b"], [], True]),
    *(
        ("bash", "env", {name: "x"})
        for name in ["", "1A", "A-B", "A B", "A=", "A\n", "\u00e9", "A\0", "BASH_FUNC_x%%", "$(x)", "UID", "PPID"]
    ),
    *(("bash", "env", {"A": value}) for value in BAD_TEXT),
    *(("bash", flag, value) for flag in ("allow_network", "require_sandbox") for value in [0, 1, "yes", []]),
    *(
        (tool, "path", value)
        for tool in ("read_file", "write_file")
        for value in [*BAD_TEXT, "", ".", "/", "..", "../x", "/etc/passwd"]
    ),
    *(("write_file", "content", value) for value in [None, 5, ["x"], "\ud800", "x" * 1001, "\u00e9" * 501]),
]
GOOD: dict[str, dict[str, Any]] = {
    "bash": {"command": "true"},
    "read_file": {"path": "a"},
    "write_file": {"path": "a", "content": "x"},
}


@pytest.mark.parametrize(("tool", "field", "value"), BAD, ids=lambda value: f"{value!r:.25}")
def test_a_bad_argument_is_named_with_what_was_expected_and_got(tool: str, field: str, value: Any) -> None:
    tools.parse(tool, GOOD[tool], SETTING)  # it is the one argument that makes the difference
    body = refused(tool, {**GOOD[tool], field: value})
    assert body["field"].partition(".")[0] == field
    assert len(body["got"]) < 200


@pytest.mark.parametrize(
    ("tool", "field"), [("bash", "command"), ("read_file", "path"), ("write_file", "path"), ("write_file", "content")]
)
def test_a_missing_argument_is_named(tool: str, field: str) -> None:
    args = {name: value for name, value in GOOD[tool].items() if name != field}
    assert refused(tool, args)["field"] == field


@pytest.mark.parametrize("tool", GOOD)
def test_an_unknown_argument_is_refused_and_not_ignored(tool: str) -> None:
    body = refused(tool, {**GOOD[tool], "comand": "x"})
    assert body["field"] == "args"
    assert "comand" in body["got"]
    assert next(iter(GOOD[tool])) in body["expected"]


@pytest.mark.parametrize("name", [None, 5, "", "Bash", "python", ["bash"], {}])
def test_an_unknown_tool_is_refused_and_the_known_are_told(name: object) -> None:
    body = refused(name, {"command": "true"})
    assert body["field"] == "tool"
    assert all(known in body["expected"] for known in ("bash", "read_file", "write_file"))


@pytest.mark.parametrize("args", [None, [], "true", 5, [["command", "true"]]])
def test_arguments_that_are_no_object_are_refused(args: object) -> None:
    assert refused("bash", args)["field"] == "args"


def test_what_the_isolation_cannot_do_is_refused_and_what_it_does_is_not() -> None:
    closed, open_ = SETTING, attr.evolve(SETTING, network=True, isolation="none")
    assert refused("bash", {"command": "true", "allow_network": True}, closed)["field"] == "allow_network"
    assert refused("bash", {"command": "true", "allow_network": False}, open_)["field"] == "allow_network"
    assert refused("bash", {"command": "true", "require_sandbox": True}, open_)["field"] == "require_sandbox"
    for args, setting in (
        ({"allow_network": False, "require_sandbox": True}, closed),
        ({"allow_network": True, "require_sandbox": False}, open_),
    ):
        tools.parse("bash", {"command": "true", **args}, setting)


def test_arguments_that_are_null_are_not_given() -> None:
    nothing = dict.fromkeys(["cwd", "env", "stdin", "allow_network", "require_sandbox"])
    assert script_of({"command": "true", **nothing}) == script_of({"command": "true"})


# Paths


@pytest.mark.parametrize(
    ("path", "whole"),
    [
        ("a", "/workspace/a"),
        ("a/b", "/workspace/a/b"),
        ("./a//b/./c", "/workspace/a/b/c"),
        ("a/../b", "/workspace/b"),
        ("/workspace/a", "/workspace/a"),
        ("/workspace/../workspace/a", "/workspace/a"),
        ("..a", "/workspace/..a"),
        ("...", "/workspace/..."),
        (" ", "/workspace/ "),
        ("~", "/workspace/~"),
        ("a\nb", "/workspace/a\nb"),
        ("\udcff", "/workspace/\udcff"),
        ("x" * 4000, "/workspace/" + "x" * 4000),
    ],
)
def test_a_path_inside_is_made_whole(path: str, whole: str) -> None:
    assert tools.inside({"path": path}, "/workspace") == whole


@pytest.mark.parametrize(
    "path",
    [
        *["", ".", "./", "a/..", "..", "../workspace2/a", "/", "/workspace", "/workspace/", "/workspace/.", "/workspace2/a"],
        *[
            "/workspaces",
            "/etc/passwd",
            "a/../../b",
            "/workspace/../etc",
            "/../workspace/../etc/x",
            "x" * 4085,
            "\u00e9" * 2043,
        ],
    ],
)
def test_a_path_outside_or_too_long_is_refused(path: str) -> None:
    with pytest.raises(RequestFailed) as caught:
        tools.inside({"path": path}, "/workspace")
    body = caught.value.body
    assert body["field"] == "path"
    assert "/workspace" in body["expected"]
    assert body["got"]


@FEW
@given(
    path=st.one_of(
        st.text(max_size=20), st.lists(st.sampled_from(["..", ".", "", "a", "workspace", "/"]), max_size=8).map("/".join)
    )
)
def test_whatever_the_path_it_is_below_the_workspace_or_refused(path: str) -> None:
    try:
        whole = tools.inside({"path": path}, "/workspace")
    except RequestFailed as e:
        field = e.body["field"]
        whole = ""
    if not whole:
        assert field == "path"
    else:
        assert whole.startswith("/workspace/")
        assert whole == os.path.normpath(whole)
        assert whole == os.path.abspath(os.path.join("/workspace", path)).replace("//workspace", "/workspace")


# What bash makes of it


class ScriptTaker:
    """Stands where a cell would, and keeps what it is asked to run."""

    def __init__(self) -> None:
        self.script = b""
        self.stdin: bytes | None = None

    def shell(self, script: bytes, stdin: bytes | None) -> None:
        self.script, self.stdin = script, stdin


def taken(args: dict[str, Any]) -> ScriptTaker:
    taker = ScriptTaker()
    tools.parse("bash", args, SETTING).start(cast(Cell, taker))
    return taker


def script_of(args: dict[str, Any]) -> bytes:
    return taken(args).script


@attr.s(auto_attribs=True, frozen=True)
class Ended:
    status: int
    stdout: bytes
    stderr: bytes
    told: bytes = attr.ib(default=b"", eq=False)  # by the shell, before its end


def spawn(argv: list[str], cwd: str, script: bytes | None = None) -> Ended:
    """Run bash as a zygote does, with pipes from which it reads ``script``, and where it tells how that has ended."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, open(os.devnull, "rb") as null:
        (hears, says), (learns, tells) = os.pipe(), os.pipe()
        actions = [(os.POSIX_SPAWN_DUP2, f.fileno(), to) for to, f in enumerate((null, out, err))]
        if script is not None:
            actions += [(os.POSIX_SPAWN_DUP2, hears, zygote.HEAR), (os.POSIX_SPAWN_DUP2, tells, zygote.TELL)]
        here = os.getcwd()
        os.chdir(cwd)
        try:
            pid = os.posix_spawn(zygote.SHELL, argv, ENV, file_actions=actions)
        finally:
            os.chdir(here)
        os.close(tells)
        if script is not None:
            with open(says, "wb", buffering=0, closefd=False) as pipe, contextlib.suppress(BrokenPipeError):
                pipe.write(zygote.framed(script) + zygote.GO)
        _, status = os.waitpid(pid, 0)
        os.set_blocking(learns, False)  # a background process may have it open yet
        try:
            told = os.read(learns, 4096)
        except BlockingIOError:
            told = b""
        for fd in (hears, says, learns):
            os.close(fd)
        out.seek(0)
        err.seek(0)
        return Ended(status, out.read(), err.read(), told)


def run(command: str, at: str = "/", **args: Any) -> Ended:
    return spawn(["bash", "-c", zygote.BOOTSTRAP], at, script_of({"command": command, **args}))


def run_directly(command: str) -> Ended:
    return spawn(["bash", "-c", command], "/")


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    path = tempfile.mkdtemp(prefix="test-slotpool-tools-")
    yield Path(path)
    shutil.rmtree(path)


# Bytes but NUL, as the API takes them: UTF-8, with surrogate escapes for the rest.
RAW = st.one_of(
    st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\0"), max_size=30).map(str.encode),
    st.lists(st.sampled_from(list(b"'\"\\$`!\n\r\t ;&|<>(){}[]*?#~=%\x01\x7f\xc3\xe2\x80\xffab")), max_size=20).map(bytes),
    st.binary(max_size=20).map(lambda data: data.replace(b"\0", b"")),
)
TEXT = RAW.map(os.fsdecode)


@FEW
@given(text=TEXT)
@example(text="'")
@example(text="\\'\"$(x)`x`\n!!")
@example(text="\x01\x7f\x01\x01")
@example(text="\udcc3'\udce2\udc80'")
@example(text="-n")
@example(text="\n\n")
def test_arbitrary_bytes_in_a_command_survive(text: str) -> None:
    ended = run(f"printf %s {shlex.quote(text)}")
    assert ended == Ended(0, os.fsencode(text), b"")


@FEW
@given(text=TEXT)
def test_arbitrary_unquoted_lines_mean_what_they_mean_to_bash(text: str) -> None:
    """A here-document takes quotes and backslashes that are never closed."""
    assume("END" not in text)
    command = f"cat <<'END'\n{text}\nEND\necho after"
    ended = run(command)
    assert ended == run_directly(command)
    assert ended.status == 0


NAMES = st.from_regex(r"\A[A-Za-z_][A-Za-z0-9_]{0,12}\Z").map(lambda name: f"T{name}")


@FEW
@given(env=st.dictionaries(NAMES, TEXT, max_size=4))
@example(env={"T": "'"})
@example(env={"T": ""})
@example(env={"T": "\x01\x7f'\udcff\n"})
def test_arbitrary_values_of_variables_survive(env: dict[str, str]) -> None:
    ended = run("env -0", env=env)
    assert (ended.status, ended.stderr) == (0, b"")
    seen = dict(entry.split(b"=", 1) for entry in ended.stdout.split(b"\0") if entry)
    for name, value in env.items():
        assert seen[name.encode()] == os.fsencode(value)
    extra = set(seen) - {os.fsencode(name) for name in [*env, *ENV]}
    assert extra <= {b"PWD", b"SHLVL", b"_", b"OLDPWD"}


@FEW
@given(name=RAW.filter(lambda name: b"/" not in name and name not in (b"", b".", b"..")).map(os.fsdecode), whole=st.booleans())
@example(name="'", whole=False)
@example(name="\n", whole=False)
@example(name="\udcff", whole=False)
def test_a_directory_of_any_name_can_be_the_working_directory(directory: Path, name: str, whole: bool) -> None:
    path = directory / name
    path.mkdir(exist_ok=True)
    ended = run("/bin/pwd", str(directory), cwd=str(path) if whole else name)
    assert ended == Ended(0, os.fsencode(path) + b"\n", b"")


@pytest.mark.parametrize("name", ["-", "--", "-P", "+1", "~", "~root", "$HOME", "*", " ", "a b", "'", "#", "!", "-e"])
def test_a_directory_named_like_something_special_is_just_that_directory(directory: Path, name: str) -> None:
    (directory / name).mkdir(exist_ok=True)
    ended = run("/bin/pwd", str(directory), cwd=name)
    assert ended == Ended(0, os.fsencode(directory / name) + b"\n", b"")


ALIKE = [
    "",
    " ",
    "# only a comment",
    "\n\n",
    "true",
    "exit 3",
    "exit",
    "false",
    "nonexistent-command",
    "kill -9 $$",
    "kill -TERM $$",
    'echo $# $0 "$1" "$*"',
    "echo $LINENO\necho $LINENO\n\necho $LINENO",
    "echo $-",
    "echo ${#BASH_SOURCE[@]}",
    "echo $SHLVL; echo $BASH_SUBSHELL",
    "set -e; false; echo no",
    "set -u; echo $nope; echo no",
    "set -- a b; echo $1 $#; shift; echo $1",
    "trap 'echo bye' EXIT; echo hi",
    "trap 'echo bye' EXIT; exit 4",
    "f() { return 5; }; f",
    "exec echo replaced",
    'echo "unterminated',
    "if",
    ")",
    "echo before\nif",
    "&& echo x",
    "; echo x",
    "& echo x",
    "echo a & wait",
    "cat <<E\nx\nE",
    "alias x='echo y'\nx",
    "shopt -s extglob\ncase ab in !(b)) echo yes;; esac",
    "echo 1 >&3",
    "read line <&3; echo $?",
    "cat; echo $?",
    "ls /proc/self/fd | wc -l",
    "echo a \\\n b",
    "coproc cat; echo $?",
    "time true",
    "jobs; echo $!",
    "bash -c 'exit 7'",
    "break; echo $?",
    "(exit 9)",
    "true | false",
    "set -x; echo $REPLY",
    "set -v; true",
    "set -n; true",
    "set -o posix; false",
    "trap 'echo debug' DEBUG; :",
    "trap 'echo err' ERR; false",
    "set -E; trap 'echo err' ERR; false",
    "trap 'echo return' RETURN; f() { :; }; f",
    "trap; trap -p",
    "trap 'exit 6' EXIT; false",
    "trap '' EXIT; false",
    "readonly REPLY; false",
    "IFS=0123456789; (exit 105)",
    "printf() { echo mine; }; true",
    "exec 2>&-; echo hi",
    "exec 10>&1; echo hi >&10; echo well; false",
    "exec 10>&1 11>&2; echo hi >&11; exit 4",
    "exec {fd}>&1; echo hi >&$fd; exec {fd}>&-; echo $fd",
    'for fd in {3..200}; do eval "exec $fd>&-"; done; echo well',
    "exec 59>/dev/null; echo hi >&59; echo well",
    "f() { return 200; }; f",
    "set -o errexit; f() { false; }; f || true; f",
]


@pytest.mark.parametrize("command", ALIKE)
def test_a_command_does_what_it_does_under_bash_minus_c(command: str) -> None:
    ours, directly = run(command), run_directly(command)
    assert ours.stdout == directly.stdout
    assert ours.status == directly.status
    assert bool(ours.stderr) == bool(directly.stderr)


@pytest.mark.parametrize(
    ("command", "status"),
    [("true", 0), ("false", 1), ("(exit 200)", 200), ("nonsense 2>/dev/null", 127), ("if", 2), ("true & wait", 0)],
)
def test_a_shell_that_has_nothing_left_to_do_tells_how_its_command_ended(command: str, status: int) -> None:
    ended = run(command)
    assert zygote.read_told(ended.told) == ended.status == status << 8


@pytest.mark.parametrize(
    "command",
    [
        "exit 3",
        "exec true",
        "kill -TERM $$",
        "set -e; false",
        "trap 'exit 5' EXIT",
        "trap 'trap \"exit 5\" EXIT' DEBUG; :",
        "set -x; true",
        "trap 'echo 0' DEBUG; :",
        "f() { trap 'exit 5' EXIT; }; f",
    ],
)
def test_one_whose_end_may_still_be_another_tells_nothing_that_is_understood(command: str) -> None:
    assert zygote.read_told(run(command).told) is None


@pytest.mark.parametrize("told", [b"", b"0", b"\n", b"0\n0\n", b"-1\n", b"1000\n", b" 0\n", b"0\n ", "\u0661\n".encode()])
def test_what_a_slots_processes_tell_is_no_status_unless_it_looks_like_one(told: bytes) -> None:
    assert zygote.read_told(told) is None


def test_a_command_of_the_greatest_length_runs() -> None:
    head, tail = "printf %s '", "' | wc -c"
    text = "'\"'\"'" * 1000
    filler = "x" * (tools.MAX_COMMAND - len(head + text + tail))
    assert run(head + text + filler + tail) == Ended(0, b"%d\n" % (len(filler) + 1000), b"")


def test_every_variable_that_bash_does_not_let_be_set_is_refused() -> None:
    names = (
        subprocess.run([zygote.SHELL, "-c", "compgen -v"], env=ENV, stdout=subprocess.PIPE, check=True).stdout.decode().split()
    )
    assert {"UID", "PATH", "SHELLOPTS"} <= set(names)
    accepted = []
    for name in names:
        with contextlib.suppress(RequestFailed):
            script_of({"command": "true", "env": {name: "1"}})
            accepted.append(name)
    assert "PATH" in accepted
    for name in accepted:
        ended = run("echo ran", env={name: "1"})
        assert (name, ended.status, ended.stdout) == (name, 0, b"ran\n")


def test_standard_input_is_passed_on_as_bytes_and_may_hold_anything() -> None:
    assert taken({"command": "cat"}).stdin is None
    assert taken({"command": "cat", "stdin": ""}).stdin == b""
    assert taken({"command": "cat", "stdin": "\0\u00e9\udcff"}).stdin == b"\0\xc3\xa9\xff"


# How it ended


def outcome(stderr: bytes = b"", status: int = 1, limit: int = 50_000, **more: Any) -> Outcome:
    made = Outcome(Output(limit), Output(limit), status, **more)
    made.stderr.add(stderr)
    return made


@pytest.mark.parametrize("limit", [50_000, 100, 10, 0])
def test_a_directory_that_cannot_be_entered_is_a_bad_argument_and_nothing_has_run(
    directory: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda n: "5a" * n)  # else each use of the tool has a mark of its own
    args = {"command": "echo ran", "cwd": "no-such-directory"}
    ended = run(at=str(directory), **args)
    assert b"ran" not in ended.stdout
    setting = attr.evolve(SETTING, max_output=limit)
    tool = tools.parse("bash", args, setting)
    with pytest.raises(RequestFailed) as caught:
        tool.error(outcome(ended.stderr, ended.status, tool.stderr_limit))
    assert caught.value.body["field"] == "cwd"
    assert "no-such-directory" in caught.value.body["got"]


def test_a_command_that_fails_in_its_directory_is_no_bad_argument() -> None:
    for args in ({"command": "false"}, {"command": "false", "cwd": "/"}):
        assert tools.parse("bash", args, SETTING).error(outcome(b"cd: no such directory")) == ""


@pytest.mark.parametrize("tool", ["read_file", "write_file"])
def test_a_file_tool_tells_errno_and_path_of_its_failure(tool: str) -> None:
    used = tools.parse(tool, GOOD[tool], SETTING)
    assert used.error(outcome(status=0)) == ""
    with pytest.raises(RequestFailed) as caught:
        used.error(outcome(b'[13, "Permission denied"]'))
    body = caught.value.body
    assert (body["code"], body["errno"], body["path"], body["message"]) == (
        "file_error",
        13,
        "/workspace/a",
        "Permission denied",
    )


@pytest.mark.parametrize("tool", ["read_file", "write_file"])
def test_a_file_tool_that_was_ended_says_so(tool: str) -> None:
    used = tools.parse(tool, GOOD[tool], SETTING)
    assert "too long" in used.error(outcome(timed_out=True))
    assert "cancelled" in used.error(outcome(cancelled=True))


@pytest.mark.parametrize(
    "told",
    [
        *[
            b"",
            b"\xff",
            b"oops",
            b"5",
            b"{}",
            b"[]",
            b"[1]",
            b'["13", "x"]',
            b"[1, 2, 3]",
            b'[0, "x"]',
            b'[-1, "x"]',
            b'[99999, "x"]',
        ],
        *[b'[1.5, "x"]', b"[" * 50_000, b"9" * 10_000, b'[13, "x"'],
    ],
    ids=lambda told: repr(told[:20]),
)
def test_nonsense_from_the_slots_own_process_is_an_input_output_error(told: bytes) -> None:
    """Whatever runs in the slot may have written it."""
    failure = tools.file_failure(told, "a")
    assert (failure.body["code"], failure.body["errno"], failure.body["path"]) == ("file_error", errno.EIO, "a")


def test_a_long_story_from_the_slots_own_process_is_cut_short() -> None:
    assert len(tools.file_failure(b'[13, "%s"]' % (b"x" * 40_000), "a").body["message"]) <= 500
