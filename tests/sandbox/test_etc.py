"""What a bwrap slot sees of the machine's /etc: what is for everybody to read, and no more."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from conftest import ORDINARY_USER, PACKAGE, ROOT, StartServer, can_run

from slotpool.sandbox import isolation


def test_of_certificates_and_their_kind_a_slot_sees_what_is_there_for_all(start_server: StartServer) -> None:
    server = start_server("bwrap")
    (lease,) = server.lease()
    seen = set(
        server.bash(lease, "cd /etc && find ssl alternatives fonts profile.d ! -type d 2>/dev/null")["stdout"].split("\n")
    )
    there = set()
    for name in ("ssl", "alternatives", "fonts", "profile.d"):
        for directory, inner, files in os.walk(f"/etc/{name}"):
            inner[:] = [d for d in inner if Path(directory, d).is_symlink() or Path(directory, d).stat().st_mode & 0o004]
            links = [d for d in inner if Path(directory, d).is_symlink()]
            for file in map(Path(directory).joinpath, [*files, *links]):
                if file.is_symlink() or file.stat().st_mode & 0o004:
                    there.add(str(file.relative_to("/etc")))
    assert seen - {""} == there
    assert server.bash(lease, "id -un; touch /etc/alternatives/mine /etc/mine")["stdout"] == "slot\n"
    assert not Path("/etc/alternatives/mine").exists()


@pytest.mark.parametrize("user", ["root", ORDINARY_USER])
def test_what_not_all_may_read_is_left_out(user: str) -> None:
    entry = pwd.getpwnam(user)
    identity: dict[str, Any] = {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    if not ROOT or not can_run(identity):
        pytest.skip(f"nothing can be run as {user}")
    with tempfile.TemporaryDirectory() as directory:
        etc = Path(directory, "etc")
        for name in ("fonts", "pki", "profile.d", "ssl"):
            (etc / name).mkdir(parents=True)
            for n in range(20):
                (etc / name / f"file{n}").touch(0o644)
        (etc / "pki").chmod(0o700)
        (etc / "profile.d").chmod(0o744)
        (etc / "ssl" / "inner").mkdir(0o744)
        (etc / "ssl" / "inner" / "file").touch(0o644)
        (etc / "hosts").touch(0o600)
        (etc / "timezone").touch(0o644)
        if user != "root":
            (etc / "magic").symlink_to("pki/file0")
        Path(directory).chmod(0o777)
        code = "import sys; from slotpool.sandbox import isolation; print(isolation.make_etc(*sys.argv[1:]))"
        command = [sys.executable, "-c", code, f"{directory}/made", str(etc)]
        done = subprocess.run(
            command, cwd="/", env={"PYTHONPATH": PACKAGE}, capture_output=True, text=True, check=False, **identity
        )
        assert done.stdout == f"{[(f'{directory}/made', '/etc'), (str(etc / 'fonts'), '/etc/fonts')]}\n", done.stderr
        assert set(os.listdir(f"{directory}/made")) == {"fonts", "group", "passwd", "ssl", "timezone"}
        assert set(os.listdir(f"{directory}/made/ssl")) == {f"file{n}" for n in range(20)}


def test_a_large_directory_is_shown_as_it_is_only_if_all_below_it_is_public(tmp_path: Path) -> None:
    for name in ("alternatives", "fonts"):
        (tmp_path / "etc" / name / "inner").mkdir(parents=True)
        for n in range(40):
            (tmp_path / "etc" / name / "inner" / f"file{n}").write_text("")
    private = tmp_path / "etc" / "fonts" / "inner" / "private"
    private.write_text("key")
    private.chmod(0o640)
    (tmp_path / "etc" / "ssl" / "private").mkdir(parents=True)
    (tmp_path / "etc" / "ssl" / "private").chmod(0o710)
    (tmp_path / "etc" / "hosts").write_text("127.0.0.1 localhost\n")
    (tmp_path / "etc" / "shadow").write_text("root:")
    made = tmp_path / "made"
    shown = isolation.make_etc(str(made), str(tmp_path / "etc"))
    assert shown == [(str(made), "/etc"), (str(tmp_path / "etc" / "alternatives"), "/etc/alternatives")]
    assert sorted(path.name for path in made.iterdir()) == ["alternatives", "fonts", "group", "hosts", "passwd", "ssl"]
    assert list((made / "alternatives").iterdir()) == list((made / "ssl").iterdir()) == []
    copied = {path.name for path in (made / "fonts" / "inner").iterdir()}
    assert copied == {f"file{n}" for n in range(40)}
