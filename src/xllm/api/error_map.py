"""The one table from errors to HTTP: status and OpenAI's `type`, by code first, then by class.

Total over the error tree (a test holds it). 422 is never used. Nothing else in the package
may name a status for an error.
"""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass

import msgspec

from xllm.errors import (
    AbortedError,
    AccessError,
    CapacityError,
    ConfigError,
    DeadlineError,
    InternalError,
    NotFoundError,
    RequestError,
    UnavailableError,
    XllmError,
)

log = logging.getLogger("xllm.api")

_BY_CLASS: dict[type[XllmError], tuple[int, str]] = {
    RequestError: (400, "invalid_request_error"),
    AccessError: (401, "authentication_error"),
    NotFoundError: (404, "not_found_error"),
    DeadlineError: (408, "timeout_error"),
    CapacityError: (429, "rate_limit_error"),
    UnavailableError: (503, "service_unavailable_error"),
    # Nobody waits for the answer to a cancelled request; 408 is what a late reader may retry on.
    AbortedError: (408, "timeout_error"),
    ConfigError: (500, "server_error"),
    InternalError: (500, "server_error"),
    XllmError: (500, "server_error"),
}

_BY_CODE: dict[str, tuple[int, str]] = {
    "permission_denied": (403, "permission_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "request_timeout": (408, "timeout_error"),
    "conflict": (409, "conflict_error"),
    "request_too_large": (413, "invalid_request_error"),
    "unsupported_media_type": (415, "invalid_request_error"),
    "expectation_failed": (417, "invalid_request_error"),
    "bad_host": (421, "invalid_request_error"),
    "headers_too_large": (431, "invalid_request_error"),
}

DEFAULT_RETRY_AFTER_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorReply:
    """`envelope` is OpenAI's four keys under `error`; `headers` holds Retry-After where it helps."""

    status: int
    envelope: dict[str, dict[str, str | None]]
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def body(self) -> bytes:
        return msgspec.json.encode(self.envelope)


def classify(error: XllmError) -> tuple[int, str]:
    """(HTTP status, OpenAI error type)."""
    if error.code in _BY_CODE:
        return _BY_CODE[error.code]
    return next(_BY_CLASS[cls] for cls in type(error).__mro__ if cls in _BY_CLASS)


def error_reply(error: BaseException, request_id: str) -> ErrorReply:
    """The answer to `error`. Anything outside our tree is a bug: logged here, answered with fixed text."""
    if not isinstance(error, XllmError):
        log_bug(error, request_id)
        error = InternalError("An internal error occurred.")
    status, kind = classify(error)
    headers: tuple[tuple[str, str], ...] = ()
    if status in (429, 503):
        after = DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        headers = (("retry-after", str(max(1, round(after + 0.499)))),)
    if status == 401:
        headers = (("www-authenticate", "Bearer"),)
    envelope = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return ErrorReply(status=status, envelope={"error": envelope}, headers=headers)


def log_bug(error: BaseException, request_id: str) -> None:
    """Where it happened and its type; never its text, which may quote a prompt."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    log.error("unexpected %s request_id=%s\n%s", type(error).__name__, request_id, frames)
