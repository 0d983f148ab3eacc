"""A Jupyter notebook in a real kernel."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import PACKAGE

nbclient: Any = pytest.importorskip("nbclient")
nbformat: Any = pytest.importorskip("nbformat")


class Notebook:
    """Cells that are run one by one."""

    def __init__(self) -> None:
        self._notebook = nbformat.v4.new_notebook()
        self._client = nbclient.NotebookClient(self._notebook, timeout=60, allow_errors=True, kernel_name="python3")

    @contextlib.contextmanager
    def running(self, directory: Path) -> Iterator[Notebook]:
        """With a kernel, whose own files are in ``directory``."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", PACKAGE)
            patch.setenv("IPYTHONDIR", str(directory))
            patch.setenv("JUPYTER_RUNTIME_DIR", str(directory))
            with self._client.setup_kernel():
                yield self

    def run(self, source: str) -> list[Any]:
        """Run a cell; its outputs."""
        cell = nbformat.v4.new_code_cell(source)
        self._notebook.cells.append(cell)
        self._client.execute_cell(cell, len(self._notebook.cells) - 1)
        return list(cell.outputs)

    def outputs(self) -> list[Any]:
        """What the last cell has shown until now. From any thread."""
        return list(self._notebook.cells[-1].outputs) if self._notebook.cells else []

    def interrupt(self) -> None:
        """As the button in a front end does. From any thread."""
        os.kill(self._client.km.provisioner.pid, signal.SIGINT)


def text_of(outputs: list[Any]) -> str:
    """What they are for who sees no HTML; what an error says too."""
    found: list[str] = []
    stream = None  # that the last one was of; a kernel may send what is printed in parts
    for out in outputs:
        before, stream = stream, out.name if out.output_type == "stream" else None
        if stream is not None and stream == before:
            found[-1] += out.text
        elif stream is not None:
            found.append(out.text)
        elif out.output_type == "error":
            found.append(f"{out.ename}: {out.evalue}")
        else:
            found.append(out.data.get("text/plain", ""))
    return "\n".join(found)
