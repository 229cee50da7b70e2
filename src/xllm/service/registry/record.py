"""What a member writes about itself, and where: a small JSON record under a key made of checked words.

Reading is total: whatever stands in a registry either is a record within bounds or is None with a
reason. Only what is static belongs here; load and health travel over the connections.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from xllm.service.registry.address import is_id, parse_address
from xllm.service.registry.base import MAX_VALUE_BYTES

RECORD_VERSION = 1

MemberKind = Literal["instances", "fronts"]
MemberState = Literal["ready", "draining"]

MAX_MODELS = 16
MAX_NAME_CHARS = 256
_PHASES = {"encode", "prefill", "decode"}


class MemberRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`address` is where to connect; `started_s` is wall time, shown and never compared."""

    version: int = RECORD_VERSION
    member_id: str
    incarnation: str
    address: str
    phases: tuple[str, ...] = ()
    wire_version: int = 0
    model_ids: tuple[str, ...] = ()
    numerics_class: str = ""
    state: MemberState = "ready"
    pid: int = 0
    started_s: float = 0.0


def member_prefix(cluster: str, kind: MemberKind) -> str:
    return f"/{cluster}/v1/{kind}/"


def member_key(cluster: str, kind: MemberKind, member_id: str) -> str:
    return member_prefix(cluster, kind) + member_id


def encode_record(record: MemberRecord) -> bytes:
    return msgspec.json.encode(record)


def decode_record(key: str, value: bytes) -> MemberRecord | str:
    """The record, or why it is none: a word for a counter."""
    if len(value) > MAX_VALUE_BYTES:
        return "too_big"
    try:
        head = _DECODE_VERSION.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "garbage"
    if head.version != RECORD_VERSION:
        return "unknown_version"
    try:
        record = _DECODE.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "garbage"
    return _fault(key, record) or record


def _fault(key: str, record: MemberRecord) -> str | None:
    if key.rpartition("/")[2] != record.member_id or not is_id(record.member_id):
        return "wrong_id"
    try:
        parse_address(record.address)
    except ValueError:
        return "bad_address"
    names = (record.incarnation, record.numerics_class, *record.model_ids)
    if len(record.model_ids) > MAX_MODELS or any(len(name) > MAX_NAME_CHARS for name in names):
        return "out_of_bounds"
    if not (record.incarnation and set(record.phases) <= _PHASES):
        return "out_of_bounds"
    return None


class _Version(msgspec.Struct, frozen=True):
    version: int = 0


_DECODE_VERSION = msgspec.json.Decoder(_Version)
_DECODE = msgspec.json.Decoder(MemberRecord)
