"""Building the image of a sandbox server, with stand-ins for the ``docker`` command."""

from __future__ import annotations

import configparser
import logging
import os
import re
import signal
import threading
from pathlib import Path
from typing import Callable

import pytest
from conftest import wait_until

from slotpool.errors import ImageBuildFailed, StartFailed
from slotpool.fleet.nomad import image

TAG = "slotpool-test:local"
NO_BUILDX = 'if [ "$1" = buildx ]; then echo "docker: unknown command: docker buildx" >&2; exit 1; fi\n'
NO_IMAGE = 'if [ "$1" = image ]; then echo "Error: No such image" >&2; exit 1; fi\n'

FakeDocker = Callable[[str], Callable[[], list[str]]]


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().endswith("_PROXY"):
            monkeypatch.delenv(name)


@pytest.fixture
def fake_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDocker:
    """Make a ``docker`` that does what the shell code says; gives a function that tells how it was called."""

    def make(code: str) -> Callable[[], list[str]]:
        calls = tmp_path / "calls"
        calls.touch()
        program = tmp_path / "bin" / "docker"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\necho "$*" >> {calls}\n{code}')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        return lambda: calls.read_text().splitlines()

    return make


@pytest.fixture
def no_docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("slotpool-sandbox:local", True),
        ("registry.example:5000/team/slotpool:local", True),
        ("slotpool-sandbox", False),
        ("local", False),
        ("slotpool-sandbox:1.0", False),
        ("slotpool-sandbox:not-local", False),
        ("registry.example:5000/local", False),
        ("slotpool-sandbox:local@sha256:" + 64 * "0", False),
    ],
)
def test_a_local_image_is_told_by_its_tag(name: str, local: bool) -> None:
    assert image.is_local(name) is local


def test_an_image_is_there_if_the_engine_says_so(fake_docker: FakeDocker) -> None:
    calls = fake_docker('[ "$3" = there:local ]')
    assert image.exists("there:local")
    assert not image.exists("missing:local")
    assert calls() == ["image inspect there:local", "image inspect missing:local"]


def test_an_engine_that_does_not_answer_is_an_error(fake_docker: FakeDocker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image, "_ANSWER_LIMIT", 0.2)
    fake_docker("exec sleep 100")
    with pytest.raises(ImageBuildFailed, match=r"no answer to `docker image inspect .*` within 0\.2 s"):
        image.exists(TAG)


@pytest.mark.usefixtures("no_docker")
def test_without_docker_an_image_is_missing_and_the_build_says_why() -> None:
    assert not image.exists(TAG)
    with pytest.raises(ImageBuildFailed, match="docker, which is not on the PATH"):
        image.build(TAG)
    with pytest.raises(ImageBuildFailed, match="docker, which is not on the PATH"):
        image.ensure(TAG, auto_build=True)
    assert issubclass(ImageBuildFailed, StartFailed)


def test_buildx_is_used_where_it_is_there(fake_docker: FakeDocker) -> None:
    calls = fake_docker("")
    image.build(TAG)
    version, build = calls()
    assert version == "buildx version"
    assert re.fullmatch(rf"buildx build --load --progress=plain -t {TAG} -f (\S+)/docker/Dockerfile \1", build)


def test_without_buildx_plain_docker_builds(fake_docker: FakeDocker) -> None:
    calls = fake_docker(NO_BUILDX)
    image.build(TAG)
    _, build = calls()
    assert re.fullmatch(rf"build -t {TAG} -f (\S+)/docker/Dockerfile \1", build)


def test_plain_docker_builds_where_buildx_fails(fake_docker: FakeDocker) -> None:
    calls = fake_docker('if [ "$1 $2" = "buildx build" ]; then echo "no builder"; exit 1; fi')
    image.build(TAG)
    assert [call.split(" -t ")[0] for call in calls()] == ["buildx version", "buildx build --load --progress=plain", "build"]


def test_base_packages_and_proxies_are_passed_on(fake_docker: FakeDocker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://user:SLOTPOOL_TEST_password@proxy.example:3128")
    monkeypatch.setenv("no_proxy", "localhost")
    monkeypatch.setenv("HTTP_PROXY", "")
    calls = fake_docker(NO_BUILDX + 'echo "$HTTPS_PROXY"')
    lines: list[str] = []
    image.build(TAG, base="debian:12", extra_packages=["gcc", "gdb"], on_line=lines.append)
    assert (
        "--build-arg BASE=debian:12 --build-arg EXTRA_PACKAGES=gcc gdb --build-arg HTTPS_PROXY --build-arg no_proxy -f"
        in calls()[-1]
    )
    assert "SLOTPOOL_TEST_password" not in "".join(calls())
    assert lines == ["http://user:SLOTPOOL_TEST_password@proxy.example:3128"]


def test_each_default_gives_way_by_itself(fake_docker: FakeDocker, tmp_path: Path) -> None:
    calls = fake_docker(NO_BUILDX)
    image.build(TAG, dockerfile="/own/Dockerfile", context="/own")
    image.build(TAG, dockerfile="/own/Dockerfile")
    image.build(TAG, context="/own")
    both, file, context = (call.partition(" -f ")[2] for call in calls() if call.startswith("build "))
    assert both == "/own/Dockerfile /own"
    assert re.fullmatch(r"/own/Dockerfile \S*slotpool-image-\S*", file)
    assert re.fullmatch(r"\S*slotpool-image-\S*/docker/Dockerfile /own", context)


def test_a_failure_tells_what_was_tried_and_the_end_of_the_log(fake_docker: FakeDocker) -> None:
    fake_docker('[ "$2" = version ] && exit; for i in $(seq 100); do echo "[$1 line $i]"; done; exit 7')
    with pytest.raises(ImageBuildFailed) as raised:
        image.build(TAG)
    message = str(raised.value)
    assert f"building {TAG} failed with exit code 7" in message
    assert f"docker buildx build --load --progress=plain -t {TAG}" in message
    assert f"docker build -t {TAG}" in message
    assert re.findall(r"line (\d+)", message) == [str(i) for i in range(81, 101)]
    assert "[buildx line" not in message


def test_output_is_logged_as_lines_without_colours(fake_docker: FakeDocker, caplog: pytest.LogCaptureFixture) -> None:
    fake_docker(NO_BUILDX + r"printf 'one\n\033[91mtwo\033[0m\r\n\377\n' >&2")
    with caplog.at_level(logging.INFO, logger="slotpool.fleet.nomad.image"):
        image.build(TAG)
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.INFO]
    assert said[0].startswith(f"building {TAG}: docker build ")
    assert said[1:] == ["one", "two", "\ufffd"]


def test_lines_come_while_the_build_runs(fake_docker: FakeDocker, tmp_path: Path) -> None:
    go_on = tmp_path / "go-on"
    fake_docker(NO_BUILDX + f"echo begun; until [ -e {go_on} ]; do sleep 0.01; done; echo done")
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        go_on.touch()

    image.build(TAG, on_line=on_line)
    assert lines == ["begun", "done"]


def test_an_interrupt_kills_the_build_and_what_it_started(fake_docker: FakeDocker, tmp_path: Path) -> None:
    fake_docker(NO_BUILDX + "sleep 1000 & echo $$ $!; wait")
    started: list[int] = []

    def on_line(line: str) -> None:
        started.extend(map(int, line.split()))
        main = threading.main_thread().ident
        assert main is not None
        threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt):
        image.build(TAG, on_line=on_line)
    assert len(started) == 2
    assert wait_until(lambda: not any(is_running(pid) for pid in started))


def is_running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("installed", [False, True], ids=["checkout", "wheel"])
def test_the_context_is_the_package_and_the_dockerfile(
    installed: bool, fake_docker: FakeDocker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, seen = tmp_path / "root", tmp_path / "seen"
    package = root / "slotpool"
    for name in ("__init__.py", "sandbox/app.py", "sandbox/__pycache__/app.pyc", "py.typed"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name)
    dockerfile = (package if installed else root) / "docker" / "Dockerfile"
    dockerfile.parent.mkdir()
    dockerfile.write_text("FROM x\n")
    monkeypatch.setattr(image, "_PACKAGE", package)
    calls = fake_docker(f'{NO_BUILDX}for context; do :; done; cp -r "$context" {seen}')
    image.build(TAG)
    found = {str(path.relative_to(seen)): path.read_text() for path in seen.rglob("*") if path.is_file()}
    assert found == {
        "docker/Dockerfile": "FROM x\n",
        "slotpool/__init__.py": "__init__.py",
        "slotpool/sandbox/app.py": "sandbox/app.py",
        "slotpool/py.typed": "py.typed",
    }
    assert not list(seen.rglob("__pycache__"))
    assert not (seen / "slotpool" / "docker").exists()
    assert not os.path.exists(calls()[-1].split()[-1])


def test_an_installation_without_the_dockerfile_says_so(
    fake_docker: FakeDocker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_docker("")
    monkeypatch.setattr(image, "_PACKAGE", tmp_path / "slotpool")
    with pytest.raises(ImageBuildFailed, match="has no Dockerfile"):
        image.build(TAG)


def test_only_a_missing_local_image_is_built(fake_docker: FakeDocker) -> None:
    calls = fake_docker(NO_BUILDX + '[ "$1" = build ] || [ "$3" = there:local ]')
    image.ensure("there:local", auto_build=True)
    image.ensure("there:local", auto_build=False)
    image.ensure("missing:1.0", auto_build=True)
    assert {call.split()[0] for call in calls()} == {"image"}
    image.ensure("missing:local", auto_build=True, dockerfile="/own/Dockerfile", context="/own", base="debian:12")
    assert calls()[-1] == "build -t missing:local --build-arg BASE=debian:12 -f /own/Dockerfile /own"


def test_a_missing_image_that_may_not_be_built_names_the_command(fake_docker: FakeDocker) -> None:
    calls = fake_docker(NO_IMAGE)
    with pytest.raises(ImageBuildFailed, match=rf"no image {TAG} here.*`slotpool build`"):
        image.ensure(TAG, auto_build=False)
    assert calls() == [f"image inspect {TAG}"]


def checkout(name: str) -> str:
    return (Path(__file__).resolve().parents[2] / name).read_text()


def test_the_dockerfile_wants_what_the_package_wants() -> None:
    settings = configparser.ConfigParser()
    settings.read_string(checkout("setup.cfg"))
    required = settings["options"]["install_requires"].split("\n")
    installed = re.findall(r"'([a-z0-9]+ >= [0-9.]+)'", checkout("docker/Dockerfile"))
    assert installed == [line for line in required if line]


def test_the_dockerfile_serves_and_copies_the_code_last() -> None:
    dockerfile = checkout("docker/Dockerfile")
    assert dockerfile.index("apt-get install") < dockerfile.index("pip install") < dockerfile.index("COPY slotpool")
    assert 'ENTRYPOINT ["python3", "-m", "slotpool", "serve"]' in dockerfile


def test_plain_builds_get_only_what_is_needed() -> None:
    assert checkout(".dockerignore").split() == ["*", "!docker", "!slotpool", "**/__pycache__", "**/*.pyc"]
