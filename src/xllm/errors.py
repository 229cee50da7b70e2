"""The error tree, grouped by remedy: what the caller should do decides the class.

    XllmError
    ├── RequestError      the request is wrong: change it            (never retried)
    ├── AccessError       the caller may not: bring other credentials
    ├── NotFoundError     no such model / route / object
    ├── CapacityError     too busy: try again after `retry_after_s`
    ├── UnavailableError  nothing can serve this now: try again later or elsewhere
    ├── DeadlineError     the caller's own time limit passed
    ├── AbortedError      the caller went away or asked to stop
    ├── ConfigError       start-up: names the field, the value and the remedy
    └── InternalError     a bug: names the broken invariant

Messages are written for the client from a fixed catalogue; they never carry
`str(other_exception)`, paths or addresses. Transport codes live in `api/error_map.py` only.
"""

from __future__ import annotations

import msgspec


class XllmError(Exception):
    """Base class. `code` is stable and machine readable; `param` is the JSON path of the culprit."""

    default_code = "internal_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after_s = retry_after_s

    def info(self) -> ErrorInfo:
        """The same error as a value for the wire."""
        return ErrorInfo(
            kind=type(self).__name__,
            code=self.code,
            message=self.message,
            param=self.param,
            retry_after_s=self.retry_after_s,
        )


class RequestError(XllmError):
    """The request itself is wrong (400). Sending it again unchanged cannot succeed."""

    default_code = "invalid_value"


class AccessError(XllmError):
    """Missing or wrong credentials (401), or a valid key without the right (403, `permission_denied`)."""

    default_code = "invalid_api_key"


class NotFoundError(XllmError):
    """The named model, route or object does not exist (404)."""

    default_code = "not_found"


class CapacityError(XllmError):
    """Over capacity (429): nothing is broken, retry after `retry_after_s`."""

    default_code = "queue_full"


class UnavailableError(XllmError):
    """No instance can serve (503): loading, draining, or the engine died."""

    default_code = "no_healthy_instance"


class DeadlineError(XllmError):
    """The request's own deadline passed (408)."""

    default_code = "deadline_exceeded"


class AbortedError(XllmError):
    """The request was cancelled by its owner; nobody waits for an answer."""

    default_code = "aborted"


class ConfigError(XllmError):
    """A start-up value cannot work; the message names field, value and remedy."""

    default_code = "invalid_config"


class InternalError(XllmError):
    """A bug in xLLM (500); the message names the broken invariant, not the cause."""

    default_code = "internal_error"


class ErrorInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error as a wire value; `to_error` gives the exception back."""

    kind: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: float | None = None

    def to_error(self) -> XllmError:
        cls = _BY_NAME.get(self.kind, InternalError)
        return cls(self.message, code=self.code, param=self.param, retry_after_s=self.retry_after_s)


_BY_NAME: dict[str, type[XllmError]] = {
    cls.__name__: cls
    for cls in (
        RequestError,
        AccessError,
        NotFoundError,
        CapacityError,
        UnavailableError,
        DeadlineError,
        AbortedError,
        ConfigError,
        InternalError,
    )
}
