"""How results, slots and pools look in a notebook; and that nothing they tell becomes HTML."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import attr
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slotpool import ExecutionResult, SlotPool

HOSTILE = [
    "<script>alert(1)</script>",
    "</pre></div><h1>out</h1>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" style="position:fixed',
    "&lt;b&gt; &amp;amp; &#60;i>",
    "\x00<b>\x1b[31m<i>\x1b]0;title\x07<u>\r<s>\r\n<a href='javascript:x'>",
    "<scr\x1b[0mipt>alert(1)</script>",
    "\ud800<b>",
]


class Page(HTMLParser):
    """The elements of some HTML, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Any] = []
        self.text = ""
        text.encode()  # as it is sent
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, [(name, value if name == "style" else "") for name, value in attrs]))

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(f"/{tag}")

    def handle_comment(self, data: str) -> None:
        self.elements.append(("comment", data))

    def handle_decl(self, decl: str) -> None:
        self.elements.append(("declaration", decl))

    def handle_data(self, data: str) -> None:
        self.text += data


def result_with(text: str) -> ExecutionResult:
    """One that has it wherever text can be."""
    more = {"isolation": text, "exception": text}
    return ExecutionResult(success=False, stdout=text, stderr=text, error=text, slot_id=text, metadata=more)


def page_of(shown: ExecutionResult) -> Page:
    return Page(shown._repr_html_())


@pytest.mark.parametrize("text", HOSTILE)
def test_output_never_becomes_html(text: str) -> None:
    assert page_of(result_with(text)).elements == page_of(result_with("harmless")).elements


@given(st.text(min_size=1))
def test_no_text_at_all_becomes_html(text: str) -> None:
    assert page_of(result_with(text)).elements == page_of(result_with("harmless")).elements


def test_output_is_shown_as_it_is_and_where_it_belongs() -> None:
    page = page_of(ExecutionResult(success=False, stdout="<b>1 & 2\n", stderr="&lt;\ttwo", exit_code=3, duration=0.25))
    assert page.text == "exit code 3250 msstdout<b>1 & 2\nstderr&lt;\ttwo"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"success": True, "exit_code": 0}, "exit code 0"),
        ({"exit_code": 3}, "exit code 3"),
        ({"exit_code": 137, "signal": 9}, "killed by SIGKILL"),
        ({"exit_code": 128 + 40, "signal": 40}, "killed by signal 40"),
        ({"exit_code": 137, "signal": 9, "timed_out": True}, "timed out"),
        ({"exit_code": 1, "error": "a/b: No such file or directory"}, "failed"),
        ({"error": "no answer", "metadata": {"exception": "ContainerLost"}}, "ContainerLost"),
    ],
)
def test_how_it_ended_comes_first(change: dict[str, Any], told: str) -> None:
    result = attr.evolve(ExecutionResult(success=False, duration=1.25, slot_id="slot_0"), **change)
    assert page_of(result).text.startswith(f"{told}1.2 s · slot_0")


def test_what_is_meant_for_a_terminal_is_read_as_by_one() -> None:
    printed = "\x1b[1;31mred\x1b[0m\n10%\r20%\rdone\r\n\x1b]8;;http://x\x1b\\link\x1b]8;;\x07 \x1b]never ended\nbell\x07"
    assert page_of(ExecutionResult(success=True, exit_code=0, stdout=printed)).text.endswith("stdoutred\ndone\nlink \nbell␇")


def test_of_much_output_head_and_tail_are_shown() -> None:
    page = page_of(ExecutionResult(success=True, exit_code=0, stdout="<" * 15_000 + ">" * 15_000, stdout_truncated=True))
    assert "<" * 10_000 + "\n… 10000 characters are not shown …\n" + ">" * 10_000 in page.text
    assert "stdout truncated" in page.text


def test_a_pool_and_its_slots_from_start_to_end() -> None:
    pool = SlotPool(slots_per_container=4, max_containers=1)
    assert "new" in Page(pool._repr_html_()).text
    with pool:
        with pool.slot("<b>task</b>") as s:
            s.metadata["<i>"] = "</table>"
            s.bash("echo")
            page = Page(pool._repr_html_())
            assert "1 of 4 slots acquired" in page.text
            assert f"{s.alloc_id}bwrap" in page.text or f"{s.alloc_id}user" in page.text
            assert "1 acquired, " in page.text
            assert "1 commands" in page.text
            page = Page(s._repr_html_())
            assert page.text.startswith(f"{s.slot_id}acquired")
            assert "<b>task</b>" in page.text
            assert "{'<i>': '</table>'}" in page.text
            assert page.elements.count(("b", [])) == page.elements.count("/table") == 1
            for secret in (s._tenure.token, *(str(c.member.token) for c in pool._supply.containers.values())):
                assert secret not in s._repr_html_() + pool._repr_html_()
        assert Page(s._repr_html_()).text.startswith(f"{s.slot_id}releasing")
    assert "stopped" in Page(pool._repr_html_()).text
