"""The README's code runs, and what it lists is what there is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import docutils.core
import docutils.nodes
import pytest
from conftest import OURS, servers, sleepers, wait_until
from notebooks import Notebook, text_of

from slotpool import SlotPool

README = Path(__file__).resolve().parents[1] / "README.rst"


def blocks(language: str, where: str = "") -> list[str]:
    """:param where: what the code needs: ``jupyter``, ``nomad`` (which has a test beside Nomad's), or nothing."""
    settings = {"report_level": 2, "halt_level": 2, "syntax_highlight": "none"}
    document = docutils.core.publish_doctree(README.read_text(), settings_overrides=settings)
    found = [node for node in document.findall(docutils.nodes.literal_block) if language in node["classes"]]
    special = {where} & {"jupyter", "nomad"}
    return [node.astext() for node in found if {"jupyter", "nomad"} & set(node["classes"]) == special]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: re.sub(r"\W+", "-", code)[:40])
def test_python_blocks_run(code: str) -> None:
    names: dict[str, Any] = {"SlotPool": SlotPool}
    exec(compile(code, str(README), "exec"), names)


def test_the_first_block_prints_what_it_should(capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(blocks("python")[0], str(README), "exec"), {})
    assert capsys.readouterr().out == "42\na.py\n 0\n"


def test_jupyter_blocks_run_in_a_notebook_and_leave_nothing_when_its_kernel_ends(tmp_path: Path) -> None:
    with Notebook().running(tmp_path) as notebook:
        shown = [notebook.run(code) for code in blocks("python", "jupyter")]
        assert [text_of(outputs) for outputs in shown if any(out.output_type == "error" for out in outputs)] == []
        assert len(servers()) == 2
        assert notebook.run("%unload_ext slotpool") == []
        assert len(servers()) == 1  # that of its own pool
        notebook.run(f"mine.bash('sleep 1022{OURS} & echo')")
        assert sleepers("1022") == 1
    assert "42" in shown[1][-1].data["text/html"]
    assert "&lt;script&gt;" in shown[-1][-1].data["text/html"]
    assert wait_until(lambda: sleepers("1022") == 0)
    assert servers() == []


def test_every_statistic_is_explained(pool: SlotPool) -> None:
    section = README.read_text().partition("``pool.get_stats()`` costs")[2].partition("Limits\n---")[0]
    explained = {name for row in re.findall(r"^([a-z_, ]+?)  +\S", section, re.M) for name in row.split(", ")} - {"entry"}
    assert explained == set(pool.get_stats())


def test_the_changelog_is_well_formed() -> None:
    text = (README.parent / "CHANGELOG.rst").read_text()
    docutils.core.publish_doctree(text, settings_overrides={"report_level": 2, "halt_level": 2})
