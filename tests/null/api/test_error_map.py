"""The table from errors to HTTP covers the whole tree and never gives a status outside the contract."""

from __future__ import annotations

import json
import logging

import pytest

from xllm import errors
from xllm.api.error_map import classify, error_reply
from xllm.errors import CapacityError, RequestError, UnavailableError, XllmError

CONTRACT = {400, 401, 403, 404, 405, 408, 409, 413, 415, 417, 421, 429, 431, 500, 503}

ALL_ERRORS = [
    value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, XllmError)
]


@pytest.mark.parametrize("kind", ALL_ERRORS)
def test_every_class_has_a_status_of_the_contract(kind: type[XllmError]) -> None:
    status, name = classify(kind("text"))
    assert status in CONTRACT
    assert name.endswith("_error")


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("permission_denied", 403),
        ("method_not_allowed", 405),
        ("request_timeout", 408),
        ("conflict", 409),
        ("request_too_large", 413),
        ("unsupported_media_type", 415),
        ("expectation_failed", 417),
        ("bad_host", 421),
        ("headers_too_large", 431),
    ],
)
def test_a_code_decides_before_the_class(code: str, status: int) -> None:
    assert classify(RequestError("text", code=code))[0] == status


def test_a_subclass_of_another_package_is_answered_as_its_parent() -> None:
    class Fuller(CapacityError):
        pass

    assert classify(Fuller("text"))[0] == 429


@pytest.mark.parametrize(("after_s", "header"), [(None, "1"), (0.2, "1"), (2.1, "3"), (7.0, "7")])
def test_retry_after_is_whole_seconds_rounded_up(after_s: float | None, header: str) -> None:
    for kind in (CapacityError, UnavailableError):
        headers = dict(error_reply(kind("text", retry_after_s=after_s), "id").headers)
        assert headers["retry-after"] == header


def test_an_unknown_exception_tells_the_client_nothing_and_the_log_no_text(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR, logger="xllm.api"):
        try:
            int("hunter" + str(2))  # its message quotes the value
        except ValueError as error:
            reply = error_reply(error, "the-id")
    body = json.loads(reply.body)["error"]
    assert (reply.status, body["code"], body["message"]) == (
        500,
        "internal_error",
        "An internal error occurred.",
    )
    assert "ValueError" in caplog.text
    assert "the-id" in caplog.text
    assert "hunter2" not in caplog.text
