"""The table of attacks: each test of one says by :func:`attack` what it tries and what must hold; all are told at the end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Callable, cast

import attr
import pytest


def attack(name: str, holds: str, docker: bool = False) -> pytest.MarkDecorator:
    """Mark a test, or one case of it.

    :param holds: what must hold, whatever the attack does.
    :param docker: it is for a default Docker container too; the test uses the fixture ``arena``.
    """
    return pytest.mark.attack(name, holds, docker=docker)


@attr.s(auto_attribs=True)
class _Row:
    """One attack, over all its tests and modes."""

    holds: str
    verdicts: dict[str, str] = attr.Factory(dict)  # by mode
    figures: list[str] = attr.Factory(list)

    def add(self, mode: str, verdict: str) -> None:
        if self.verdicts.get(mode) != "FAILED":
            self.verdicts[mode] = verdict

    def line(self, name: str) -> str:
        by_verdict: dict[str, list[str]] = {}
        for mode, verdict in self.verdicts.items():
            by_verdict.setdefault(verdict, []).append(mode)
        verdicts = "; ".join(f"{verdict} ({', '.join(modes)})" for verdict, modes in by_verdict.items())
        figures = f" [{'; '.join(self.figures)}]" if self.figures else ""
        return f"{name} | {self.holds} | {verdicts}{figures}"


_rows = pytest.StashKey[dict[str, _Row]]()
_SAID = "attack"
_FIGURE = "figure"

Figure = Callable[[str], None]


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Figure:
    """Says something that was measured, for the attack's line."""
    return lambda text: record_property(_FIGURE, text)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "attack(name, holds, docker=False): an attack, for the table at the end")
    config.stash[_rows] = {}


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    for item in items:
        marker = item.get_closest_marker("attack")
        if marker is not None:
            item.user_properties.append((_SAID, [*marker.args, _mode_of(item)]))


def _mode_of(item: pytest.Item) -> str:
    params = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
    return str(params.get("arena") or params.get("mode") or "any")


class _Collector:
    """Reads the verdicts off the reports."""

    def __init__(self, rows: dict[str, _Row]) -> None:
        self._rows = rows

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = dict(report.user_properties)
        if _SAID not in told or (report.when != "call" and report.passed):
            return
        name, holds, mode = map(str, cast("list[str]", told[_SAID]))
        row = self._rows.setdefault(name, _Row(holds))
        if report.skipped:
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            row.add(mode, f"skipped, {why.removeprefix('Skipped: ')}")
        else:
            row.add(mode, "held" if report.passed else "FAILED")
        row.figures += [f"{mode}: {text}" for key, text in report.user_properties if key == _FIGURE and report.when == "call"]


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(_Collector(session.config.stash[_rows]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[_rows]
    if not rows:
        return
    terminalreporter.section("attacks: name | what must hold | verdict (modes) [figures]")
    for name, row in rows.items():
        terminalreporter.line(row.line(name))
    failed = sum("FAILED" in row.verdicts.values() for row in rows.values())
    terminalreporter.line(f"{len(rows)} attacks, {failed} of them not withstood")
