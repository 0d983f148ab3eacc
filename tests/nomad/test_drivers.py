"""Each driver but Docker's does the main job, where the machine has what it needs; Docker's are in :mod:`test_faults`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from agents import Agent, why_no_nomad
from conftest import PACKAGE, wait_until
from nomads import Nomad

from slotpool import SlotPool
from slotpool.errors import CrashLoop

PODMAN_PLUGIN = "nomad-driver-podman"


@contextmanager
def an_agent(**settings: Any) -> Iterator[Nomad]:
    """One of its own kind."""
    if why_no_nomad():
        pytest.skip(why_no_nomad())
    with Agent(**settings) as agent:
        nomad = Nomad(agent.address, agent.api)
        try:
            yield nomad
        finally:
            nomad.purge()


def require(nomad: Nomad, driver: str) -> None:
    found = nomad.api("GET", f"/v1/node/{nomad.node()}")["Drivers"].get(driver, {})
    if not found.get("Healthy"):
        pytest.skip(f"Nomad's driver {driver} is not healthy here: {found.get('HealthDescription', 'it is unknown')}")


def does_the_main_job(nomad: Nomad, **settings: Any) -> None:
    with SlotPool(**nomad.settings(env={}, memory=128, **settings)) as pool:
        assert pool.get_stats()["isolation"] == ["user"]
        with pool.slot() as one, pool.slot() as other:
            one.write_file("a.py", "print(6*7)")
            assert one.bash("python3 a.py; ls").stdout == "42\na.py\n"
            assert len({"0\n", one.bash("id -u").stdout, other.bash("id -u").stdout}) == 3
            assert other.bash(f"cat {one.workspace_dir}/a.py").exit_code == 1
            words = Path(f"/proc/{nomad.pid_of(one.alloc_id)}/cmdline").read_bytes().decode().split("\0")
            told = one.bash(f"env | grep -i token; cat {words[words.index('--token-file') + 1]}")
            assert (told.stdout, told.stderr.count("Permission denied")) == ("", 1)
        with pool.slot() as s:
            assert s.bash("ls -A").stdout == ""
        pool.stop(purge_job=True)
    assert wait_until(lambda: not nomad.running_anything(pool.config.job_id))


def in_chroot() -> str:
    """A client's settings for tasks in a chroot of this Python, its packages and slotpool."""
    base = Path(sys.base_prefix)
    shown = [
        path for path in ("/bin", "/etc", "/lib", "/lib64", "/sbin", "/usr/bin", "/usr/lib/locale") if os.path.exists(path)
    ]
    shown += [str(path) for path in (*base.glob("lib/python3*"), *Path("/usr/lib").glob("*-linux-gnu*"))]
    shown += [str(base / "bin")] if base != Path("/usr") else []
    mapped = {path: path for path in shown}
    mapped |= {sysconfig.get_paths()["purelib"]: "/opt/packages", f"{PACKAGE}/slotpool": "/opt/slotpool/slotpool"}
    lines = "\n".join(f'    "{host}" = "{inside}"' for host, inside in mapped.items())
    return f"client {{\n  chroot_env {{\n{lines}\n  }}\n  options {{\n    %s\n  }}\n}}\n"


def exec_settings() -> dict[str, Any]:
    python = os.path.realpath(sys.executable)
    return {
        "driver": "exec",
        "server_command": ["env", "PYTHONPATH=/opt/slotpool:/opt/packages", python, "-m", "slotpool", "serve"],
    }


def test_exec() -> None:
    with an_agent(extra=in_chroot() % '"user.denylist" = "nobody-at-all"') as nomad:
        require(nomad, "exec")
        try:
            does_the_main_job(nomad, **exec_settings())
        except CrashLoop as e:
            if "can't apply capabilities" in str(e):  # root's tasks get nearly all of them
                pytest.skip("Nomad's agent lacks capabilities that it gives to tasks of root")
            raise


def test_exec_where_it_may_not_run_as_root(real: Nomad) -> None:
    require(real, "exec")
    with pytest.raises(CrashLoop, match=r'(?s)running as user "root" is disallowed.*user\.denylist'):
        SlotPool(**real.settings(driver="exec")).start()


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nomad]:
    """An agent with the driver, and podman's service."""
    plugin = shutil.which(PODMAN_PLUGIN)
    if plugin is None or shutil.which("podman") is None:
        pytest.skip(f"there is no podman, or no {PODMAN_PLUGIN} on PATH")
    directory = tmp_path_factory.mktemp("podman")
    os.mkdir(directory / "plugins")
    shutil.copy(plugin, directory / "plugins" / PODMAN_PLUGIN)
    address = f"unix://{directory}/socket"
    service = subprocess.Popen(["podman", "system", "service", "--time=0", address])
    try:
        assert wait_until(lambda: (directory / "socket").exists(), 30)
        extra = (
            f'plugin_dir = "{directory}/plugins"\nplugin "{PODMAN_PLUGIN}" {{\n  config {{ socket_path = "{address}" }}\n}}\n'
        )
        with an_agent(drivers="docker,raw_exec,podman", extra=extra) as nomad:
            yield nomad
    finally:
        service.terminate()
        service.wait()


def test_podman(podman: Nomad, docker: None, sandbox_image: str) -> None:
    require(podman, "podman")
    name = f"localhost/{sandbox_image}"
    with subprocess.Popen(["docker", "save", sandbox_image], stdout=subprocess.PIPE) as saved:
        subprocess.run(["podman", "load", "-q"], stdin=saved.stdout, check=True, capture_output=True)
    assert saved.returncode == 0
    try:
        does_the_main_job(podman, driver="podman", image=name)
    finally:
        subprocess.run(["podman", "image", "rm", "-f", name], check=True, capture_output=True)


def test_apptainer(real: Nomad, docker: None, sandbox_image: str, tmp_path: Path) -> None:
    if shutil.which("apptainer") is None:
        pytest.skip("apptainer is not installed")
    image = str(tmp_path / "image.sif")
    subprocess.run(["apptainer", "-q", "build", image, f"docker-daemon://{sandbox_image}"], check=True, capture_output=True)
    does_the_main_job(real, driver="apptainer", image=image)
