"""Trace context and finished spans: what the rooms need to say, and nobody's exporter.

A span is told when it is over, with its times, so that no code path holds one open. W3C trace context is
parsed strictly: a header that is not exactly right is as good as none. No I/O here.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass, field
from typing import Protocol

Value = str | int | float | bool

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_SAMPLED = 0x01


@dataclass(frozen=True, slots=True)
class SpanContext:
    """One span's identity, in hex. `sampled` False = the caller records nothing, so neither do we."""

    trace_id: str
    span_id: str
    sampled: bool = True

    @classmethod
    def new(cls) -> SpanContext:
        return cls(secrets.token_hex(16), secrets.token_hex(8))

    def child(self) -> SpanContext:
        return SpanContext(self.trace_id, secrets.token_hex(8), self.sampled)

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


def parse_traceparent(text: str | None) -> SpanContext | None:
    """The caller's span, or None for anything that the W3C recommendation calls invalid.

    Version 00 has exactly four fields; a later one may have more, ff is forbidden. Zero ids are invalid.
    """
    match = _TRACEPARENT.fullmatch(text) if text is not None else None
    if match is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    if not int(trace_id, 16) or not int(span_id, 16):
        return None
    return SpanContext(trace_id, span_id, bool(int(flags, 16) & _SAMPLED))


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A finished span; times are Unix nanoseconds. `parent_id` None = the root of its trace."""

    name: str
    context: SpanContext
    parent_id: str | None
    start_ns: int
    end_ns: int
    attributes: dict[str, Value] = field(default_factory=dict)
    is_server: bool = False
    failed: bool = False


class Tracer(Protocol):
    """Takes finished spans. Must return at once and never raise."""

    enabled: bool
    num_dropped: int

    def add(self, span: Span) -> None: ...

    def close(self) -> None: ...


class NullTracer:
    """Nobody asked for traces."""

    enabled = False
    num_dropped = 0

    def add(self, span: Span) -> None: ...

    def close(self) -> None: ...


def open_request(tracer: Tracer, header: str | None) -> tuple[str | None, str | None]:
    """(traceparent of the new request's span, id of the caller's span) as they stand in a draft.

    Both None when nothing is recorded: no tracer, or a caller who does not sample.
    """
    if not tracer.enabled:
        return None, None
    caller = parse_traceparent(header)
    if caller is None:
        return SpanContext.new().traceparent, None
    if not caller.sampled:
        return None, None
    return caller.child().traceparent, caller.span_id
