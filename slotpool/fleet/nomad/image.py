"""The image of a sandbox server: whether it is there, and how it is built with the ``docker`` command."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Callable

from ...errors import ImageBuildFailed

log = logging.getLogger(__name__)

_PACKAGE = Path(__file__).resolve().parents[2]
_DOCKERFILE = os.path.join("docker", "Dockerfile")
_NOT_IN_CONTEXT = shutil.ignore_patterns("__pycache__", "*.pyc")
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "FTP_PROXY", "ALL_PROXY", "NO_PROXY")
_LAST_LINES = 20
_ANSWER_LIMIT = 60.0  # seconds for an engine to answer a question; a build may take as long as it likes
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def is_local(image: str) -> bool:
    """Whether ``image`` has the tag ``local``: it is built here, and no registry has it."""
    return image.rpartition("/")[2].partition(":")[2] == "local"


def exists(image: str) -> bool:
    """Whether the engine has ``image``. False too where there is no ``docker`` command or no engine: a build says more.

    :raises ImageBuildFailed: if the engine does not answer within a minute.
    """
    return _succeeds("docker", "image", "inspect", image)


def ensure(
    image: str,
    *,
    auto_build: bool = True,
    base: str | None = None,
    dockerfile: str | None = None,
    context: str | None = None,
    extra_packages: Sequence[str] = (),
    on_line: Callable[[str], None] | None = None,
) -> None:
    """See that a local ``image`` is there; any other is for the engine to pull. The rest is as for :func:`build`.

    :param auto_build: whether it may be built.
    :raises ImageBuildFailed: if it is not there, and may not or could not be built.
    """
    if not is_local(image) or exists(image):
        return
    if not auto_build:
        raise ImageBuildFailed(
            f"there is no image {image} here, and auto_build_local_image is False; build it with the command `slotpool build`"
        )
    build(image, base=base, dockerfile=dockerfile, context=context, extra_packages=extra_packages, on_line=on_line)


def build(
    image: str,
    *,
    base: str | None = None,
    dockerfile: str | None = None,
    context: str | None = None,
    extra_packages: Sequence[str] = (),
    on_line: Callable[[str], None] | None = None,
) -> None:
    """Build ``image``, however long that takes, with buildx where it is there and works, else with plain ``docker build``.

    The proxies in the environment are passed on to the build.

    :param base: the image to start from. Default: the Dockerfile's.
    :param dockerfile: default: slotpool's own.
    :param context: directory that the Dockerfile copies from. Default: one with slotpool's package in ``slotpool``.
    :param extra_packages: Debian packages for the slots.
    :param on_line: called with each line of the build's output as it comes. Default: they are logged.
    :raises ImageBuildFailed: with the commands tried and the last 20 lines.
    """
    if shutil.which("docker") is None:
        raise ImageBuildFailed(f"building {image} needs the command docker, which is not on the PATH")
    args = ["-t", image]
    if base is not None:
        args += ["--build-arg", f"BASE={base}"]
    if extra_packages:
        args += ["--build-arg", f"EXTRA_PACKAGES={' '.join(extra_packages)}"]
    for name in (*_PROXIES, *map(str.lower, _PROXIES)):
        if os.environ.get(name):
            args += ["--build-arg", name]  # docker takes the value, in which a password may be, from the environment
    with contextlib.ExitStack() as stack:
        if dockerfile is None or context is None:
            bundled = stack.enter_context(_bundled_context())
            dockerfile = dockerfile or os.path.join(bundled, _DOCKERFILE)
            context = context or bundled
        args += ["-f", dockerfile, context]
        commands = [["docker", "build", *args]]
        if _succeeds("docker", "buildx", "version"):
            # A builder of buildx that can't see the engine's own images, or is broken, is not the end of it.
            commands.insert(0, ["docker", "buildx", "build", "--load", "--progress=plain", *args])
        last: deque[str] = deque(maxlen=_LAST_LINES)

        def tell(line: str) -> None:
            last.append(line)
            (on_line or _log)(line)

        for command in commands:
            log.info("building %s: %s", image, shlex.join(command))
            status = _run(command, tell)
            if status == 0:
                return
    tried = "".join(f"\n  {shlex.join(command)}" for command in commands)
    said = "".join(f"\n  {line}" for line in last)
    raise ImageBuildFailed(f"building {image} failed with exit code {status}; tried:{tried}\nlast lines:{said}")


def _log(line: str) -> None:
    log.info("%s", line)


@contextlib.contextmanager
def _bundled_context() -> Iterator[str]:
    """A directory with the package in ``slotpool`` and ``docker/Dockerfile``: the same from a checkout and a wheel."""
    inside, beside = _PACKAGE / _DOCKERFILE, _PACKAGE.parent / _DOCKERFILE
    source = inside if inside.is_file() else beside
    if not source.is_file():
        raise ImageBuildFailed(f"this installation of slotpool has no Dockerfile: neither {inside} nor {beside} is there")
    with tempfile.TemporaryDirectory(prefix="slotpool-image-") as directory:
        package = os.path.join(directory, "slotpool")
        shutil.copytree(_PACKAGE, package, ignore=_NOT_IN_CONTEXT)
        shutil.rmtree(os.path.join(package, "docker"), ignore_errors=True)
        os.mkdir(os.path.join(directory, "docker"))
        shutil.copyfile(source, os.path.join(directory, _DOCKERFILE))
        yield directory


def _succeeds(*command: str) -> bool:
    """Whether the command could be run and ended with 0."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_ANSWER_LIMIT,
            check=False,
        )
    except OSError:
        return False
    except subprocess.TimeoutExpired:
        raise ImageBuildFailed(f"no answer to `{shlex.join(command)}` within {_ANSWER_LIMIT:g} s") from None
    log.debug("%s: exit code %d %s", shlex.join(command), done.returncode, done.stderr.decode("utf-8", "replace").strip())
    return done.returncode == 0


def _run(command: Sequence[str], on_line: Callable[[str], None]) -> int:
    """Run ``command``, pass on each line of its output, and return its exit code. Whatever interrupts this ends it."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,  # docker starts buildx as a process of its own, which has to end with it
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            on_line(_COLOUR.sub("", line.rstrip()))
        return process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        process.stdout.close()
