"""The protocol's codes: what status each has, and what exception a client makes of it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotpool import errors
from slotpool.sandbox import protocol
from slotpool.sandbox.app import Response
from slotpool.sandbox.protocol import STATUS, RequestFailed, to_exception

# Code -> status, what it becomes, and whether that says that the command may have run if the server doesn't tell.
CODES: dict[str, tuple[int, type[errors.SlotPoolError], bool]] = {
    "invalid_request": (400, errors.InvalidRequest, False),
    "unauthorized": (401, errors.ContainerRefused, False),
    "not_found": (404, errors.ContainerRefused, False),
    "method_not_allowed": (405, errors.ContainerRefused, False),
    "lease_lost": (409, errors.LeaseLost, False),
    "result_gone": (410, errors.SlotBroken, True),
    "too_large": (413, errors.InvalidRequest, False),
    "file_error": (422, errors.FileError, False),
    "internal": (500, errors.SlotBroken, True),
    "not_installed": (501, errors.ContainerRefused, False),
    "slot_broken": (502, errors.SlotBroken, True),
    "closing": (503, errors.ContainerLost, False),
    "overloaded": (429, errors.SlotBroken, False),
}
SLOT_ERRORS = [code for code, (_, kind, _) in CODES.items() if issubclass(kind, errors.SlotError)]


def over_the_wire(failure: RequestFailed) -> Any:
    return json.loads(json.dumps({"error": failure.body}))


def slot_error(status: int, body: object, sent_before: bool = False) -> errors.SlotError:
    error = to_exception(status, body, sent_before)
    assert isinstance(error, errors.SlotError)
    return error


def test_every_code_has_its_status_and_no_two_share_one() -> None:
    assert {code: status for code, (status, _, _) in CODES.items()} == STATUS
    assert len(set(STATUS.values())) == len(STATUS)


@pytest.mark.parametrize("status", [200, 202, 204, *STATUS.values()])
def test_every_status_can_be_answered_with(status: int) -> None:
    number, _, reason = Response(status, (), 0, "application/json").status.partition(" ")
    assert number == str(status)
    assert reason


@pytest.mark.parametrize("code", CODES)
def test_every_code_becomes_its_exception(code: str) -> None:
    status, kind, _ = CODES[code]
    failure = RequestFailed(code, "what happened")
    assert failure.status == status
    error = to_exception(failure.status, over_the_wire(failure), False)
    assert type(error) is kind
    assert "what happened" in str(error)


@pytest.mark.parametrize("code", SLOT_ERRORS)
def test_a_slot_error_says_whether_it_may_have_run(code: str) -> None:
    status, _, by_default = CODES[code]
    assert slot_error(status, {"error": {"code": code, "message": "m"}}).may_have_run is by_default
    for told in (True, False):
        assert slot_error(status, {"error": {"code": code, "message": "m", "may_have_run": told}}).may_have_run is told


@pytest.mark.parametrize("code", SLOT_ERRORS)
def test_after_an_earlier_try_it_may_always_have_run(code: str) -> None:
    body = {"error": {"code": code, "message": "m", "may_have_run": False}}
    assert slot_error(CODES[code][0], body, sent_before=True).may_have_run is True


def test_a_bad_argument_arrives_with_field_expected_and_got() -> None:
    error = to_exception(400, over_the_wire(protocol.invalid("timeout", "a number of seconds", "soon")), False)
    assert isinstance(error, errors.InvalidRequest)
    assert (error.field, error.expected, error.got) == ("timeout", "a number of seconds", "'soon'")
    assert str(error) == "timeout: expected a number of seconds, got 'soon'"


def test_a_bad_argument_is_shown_cut_short() -> None:
    assert len(protocol.invalid("command", "a string", ["x" * 100_000]).body["got"]) < 200


def test_a_body_that_is_too_large_arrives_like_a_bad_argument() -> None:
    failure = RequestFailed("too_large", "m", field="content", expected="at most 5 bytes", got="6 bytes")
    error = to_exception(failure.status, over_the_wire(failure), False)
    assert str(error) == "content: expected at most 5 bytes, got 6 bytes"


def test_a_file_error_arrives_with_errno_and_path() -> None:
    failure = RequestFailed("file_error", "Is a directory", errno=21, path="/workspace/d")
    error = to_exception(failure.status, over_the_wire(failure), False)
    assert isinstance(error, errors.FileError)
    assert (error.errno, error.strerror, error.filename) == (21, "Is a directory", "/workspace/d")


def test_a_lost_lease_names_its_slot() -> None:
    error = slot_error(409, over_the_wire(protocol.lease_lost("slot_3", may_have_run=True)))
    assert isinstance(error, errors.LeaseLost)
    assert "slot_3" in str(error)
    assert error.may_have_run is True


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        "Bad Gateway",
        502,
        {},
        {"error": "Bad Gateway"},
        {"error": None},
        {"error": {}},
        {"error": {"message": "upstream failed"}},
        {"error": {"code": 502, "message": "upstream failed"}},
        {"error": {"code": "UPSTREAM_FAILED"}},
        {"error": {"code": None}},
        {"error": {"code": ["slot_broken"]}},
        {"error": {"code": {}}},
    ],
    ids=str,
)
def test_an_answer_that_is_not_slotpools_says_nothing_about_what_ran(body: object) -> None:
    """It may come from something in between, that had passed the request on."""
    error = slot_error(502, body)
    assert type(error) is errors.ContainerRefused
    assert error.may_have_run is True


def test_an_answer_without_a_message_says_its_status() -> None:
    assert "502" in str(to_exception(502, None, False))


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10), st.sampled_from(sorted(CODES))),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=5), inner, max_size=2)),
    max_leaves=5,
)
KEYS = st.sampled_from(["code", "message", "field", "expected", "got", "errno", "path", "may_have_run"])


@settings(max_examples=300)
@given(
    error=st.one_of(JSON, st.dictionaries(KEYS, st.one_of(JSON, st.sampled_from(sorted(CODES))), max_size=4)),
    sent=st.booleans(),
)
def test_whatever_the_answer_holds_it_becomes_an_error_of_slotpool(error: Any, sent: bool) -> None:
    made = to_exception(500, {"error": error}, sent)
    assert isinstance(made, errors.SlotPoolError)
    assert str(made)


@pytest.mark.parametrize("number", [None, "x", "5", [], 1.5, True], ids=str)
def test_a_file_error_with_a_strange_errno_is_still_a_file_error(number: Any) -> None:
    error = to_exception(422, {"error": {"code": "file_error", "message": "m", "errno": number}}, False)
    assert isinstance(error, errors.FileError)
