"""The image, built and run by a real engine. Nothing is pulled, and all that is made is removed."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest
from arena import docker
from conftest import PACKAGE, wait_until

from slotpool import SlotPool

pytestmark = pytest.mark.timeout(900)

TOKEN = "SLOTPOOL_TEST_container_token"
CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def container(sandbox_image: str) -> Iterator[str]:
    """The id of a container that runs the image."""
    started = docker("run", "-d", "-e", f"SLOTPOOL_TOKEN={TOKEN}", "-p", "127.0.0.1::8080", sandbox_image)
    try:
        assert wait_until(lambda: docker("logs", started) == "http://0.0.0.0:8080", 30), docker("logs", started)
        yield started
    finally:
        docker("rm", "-f", "-v", started)


@pytest.fixture(scope="module")
def contained(container: str) -> Iterator[SlotPool]:
    """A pool of the container's slots."""
    address = docker("port", container, "8080/tcp").splitlines()[0]
    with SlotPool(servers=[f"http://{address}"], token=TOKEN) as pool:
        yield pool


def test_slots_in_a_container_do_the_main_job(contained: SlotPool) -> None:
    with contained.slot() as s:
        s.write_file("a.py", "print(6*7)")
        result = s.bash("python3 a.py; ls")
        assert (result.stdout, result.exit_code) == ("42\na.py\n", 0)
        assert result.metadata["isolation"] == "user"
    with contained.slot() as s:
        assert s.bash("ls -A").stdout == ""


@pytest.mark.parametrize(
    "command",
    [
        "git init -q && git -c user.name=a -c user.email=a@b.example commit -q --allow-empty -m x && git log --oneline",
        "echo '{\"a\": 1}' > f && curl -sS file://$PWD/f | jq -e .a",
        "echo needle > f && rg -l needle",
        "tmux -V",
        "python3 -m venv v && v/bin/python -m pip --version",
        "printf 'all:\\n\\techo made\\n' > Makefile && make && zip -q z Makefile && unzip -l z && tar -cJf x z.zip && file x",
        "echo a > f && echo b > g; diff -u f g | patch f && cmp f g && tree && ps -p 1 && killall --version && less f",
        "vi --version && wget --version && bwrap --version",
    ],
)
def test_a_slot_has_the_tools_of_agents(contained: SlotPool, command: str) -> None:
    with contained.slot() as s:
        s.bash(command, check=True)


def test_a_slot_has_terminals(contained: SlotPool) -> None:
    with contained.slot() as s:
        s.bash("tmux new-session -d 'echo made > f'", check=True)
        assert wait_until(lambda: s.bash("cat f").stdout == "made\n", 5)


def test_a_slot_sees_nothing_of_the_server_s(contained: SlotPool) -> None:
    with contained.slot() as s:
        told = s.bash("env; cat /proc/1/environ; touch /opt/slotpool/x; touch /usr/x; python3 -c 'import attr'")
        assert TOKEN not in told.stdout
        assert "PYTHONPATH" not in told.stdout
        assert told.stderr.count("Permission denied") == 3
        assert "No module named 'attr'" in told.stderr


def test_a_container_without_a_token_does_not_start(sandbox_image: str) -> None:
    name = f"slotpool-test-{secrets.token_hex(4)}"
    try:
        done = subprocess.run(
            ["docker", "run", "--name", name, sandbox_image], capture_output=True, text=True, timeout=60, check=False
        )
    finally:
        docker("rm", "-f", "-v", name, check=False)
    assert done.returncode == 125
    assert "without a token" in done.stderr


def test_a_container_ends_by_itself_when_told(sandbox_image: str) -> None:
    started = docker("run", "-d", "-e", f"SLOTPOOL_TOKEN={TOKEN}", sandbox_image, "--host", "0.0.0.0", "--slots", "2")
    try:
        assert wait_until(lambda: "http://" in docker("logs", started), 30)
        docker("stop", "-t", "30", started)
        assert docker("inspect", "-f", "{{.State.ExitCode}}", started) == "0"
    finally:
        docker("rm", "-f", "-v", started)


def test_the_image_has_all_the_code(sandbox_image: str) -> None:
    names = "cd /opt/slotpool/slotpool && find . -name '*.py'"
    found = docker("run", "--rm", "--entrypoint", "sh", sandbox_image, "-c", names)
    package = Path(PACKAGE, "slotpool")
    assert set(found.split()) == {f"./{path.relative_to(package)}" for path in package.rglob("*.py")}


def test_an_installed_package_builds_it_too(sandbox_image: str, tmp_path: Path) -> None:
    source, environment = tmp_path / "source", tmp_path / "venv"
    shutil.copytree(
        CHECKOUT, source, ignore=shutil.ignore_patterns(".*", "*.egg-info", "build", "dist", "__pycache__", "tests")
    )
    shutil.copy(CHECKOUT / ".dockerignore", source)
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*args: str, cwd: Path = tmp_path) -> str:
        done = subprocess.run([python, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run("-m", "pip", "install", "-q", "setuptools", "wheel")
    run("setup.py", "-q", "sdist", cwd=source)
    (sdist,) = (source / "dist").glob("*.tar.gz")
    run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(sdist))
    (wheel,) = tmp_path.glob("slotpool-*.whl")
    run("-m", "pip", "install", "-q", str(wheel))
    name = f"slotpool-test-{secrets.token_hex(4)}:local"
    code = "import json, sys, slotpool.fleet.nomad.image as i; i.build(sys.argv[1]); print(json.dumps(i.__file__))"
    try:
        assert Path(json.loads(run("-c", code, name))).is_relative_to(environment)
        told = docker("run", "--rm", "--entrypoint", "python3", name, "-m", "slotpool", "--version")
        assert told == f"slotpool {sys.modules['slotpool'].__version__}"
    finally:
        docker("image", "rm", "-f", name, check=False)
