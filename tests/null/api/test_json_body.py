"""Bodies that are no JSON, or JSON that two readers could understand differently."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xllm.api.json_body import MAX_DEPTH, parse_object
from xllm.errors import RequestError

BAD = {
    "empty": (b"", "invalid_json"),
    "null": (b"null", "invalid_json"),
    "list": (b"[]", "invalid_json"),
    "string": (b'"x"', "invalid_json"),
    "number": (b"123", "invalid_json"),
    "truncated": (b'{"a": 1', "invalid_json"),
    "trailing comma": (b'{"a": 1,}', "invalid_json"),
    "single quotes": (b"{'a': 1}", "invalid_json"),
    "comment": (b'{"a": 1 /* no */}', "invalid_json"),
    "byte order mark": (b'\xef\xbb\xbf{"a": 1}', "invalid_json"),
    "two documents": (b"{} {}", "invalid_json"),
    "duplicate": (b'{"model": "a", "model": "b"}', "duplicate_key"),
    "nested duplicate": (b'{"x": [{"a": 1, "a": 1}]}', "duplicate_key"),
    "escaped duplicate": (b'{"a": 1, "\\u0061": 2}', "duplicate_key"),
    "depth": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
    "open depth": (b"[" * 100_000, "invalid_json"),
    "many lists": (b'{"a":[' + b"[]," * 200_000 + b"1]}", "value_out_of_range"),
    "depth of objects": (b'{"a":' * 70 + b"1" + b"}" * 70, "invalid_json"),
    "NaN": (b'{"t": NaN}', "invalid_json"),
    "Infinity": (b'{"t": Infinity}', "invalid_json"),
    "-Infinity": (b'{"t": -Infinity}', "invalid_json"),
    "overflow": (b'{"t": 1e400}', "value_out_of_range"),
    "underflow": (b'{"t": 1e-400}', "value_out_of_range"),
    "minus zero": (b'{"t": -0}', "value_out_of_range"),
    "minus zero float": (b'{"t": -0.0}', "value_out_of_range"),
    "4000 digits": (b'{"n": 1' + b"0" * 4000 + b"}", "value_out_of_range"),
    "4000 digits after the point": (b'{"n": 0.' + b"1" * 4000 + b"}", "value_out_of_range"),
    "invalid UTF-8": (b'{"a": "\xc0\x80"}', "invalid_json"),
    "lone 0xff": (b'{"a": "\xff"}', "invalid_json"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "invalid_json"),
    "lone surrogate": (b'{"a": "\\ud800"}', "invalid_unicode"),
    "surrogate key": (b'{"\\udfff": 1}', "invalid_unicode"),
    "raw control character": (b'{"a": "\n"}', "invalid_json"),
    "a million keys": (b"{" + b",".join(b'"%d":0' % i for i in range(100_000)) + b"}", "value_out_of_range"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name: str) -> None:
    body, code = BAD[name]
    with pytest.raises(RequestError) as caught:
        parse_object(body)
    assert caught.value.code == code


@pytest.mark.parametrize("secret", [b'{"password": "hunter2" oops}', b'{"hunter2": 1, "hunter2": 2}'])
def test_errors_do_not_repeat_the_body(secret: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        parse_object(secret)
    assert "hunter2" not in caught.value.message


def test_the_deepest_allowed_nesting_passes() -> None:
    inner = MAX_DEPTH - 1
    assert parse_object(b'{"a":' + b"[" * inner + b"]" * inner + b"}")


def test_brackets_in_strings_are_no_depth() -> None:
    text = "[{" * 1000 + '\\" ['
    assert parse_object(b'{"a": "' + text.encode() + b'"}') == {"a": text.replace("\\", "")}


def test_escapes_and_unusual_text_survive() -> None:
    assert parse_object(b'{"a": "\\u0000\\ud83d\\ude00", "__proto__": null}') == {
        "a": "\0😀",
        "__proto__": None,
    }


@given(
    st.binary(max_size=64).map(lambda b: b'{"' + b)
    | st.text('{}[]",:\\ u0d8ae-.1', max_size=64).map(str.encode)
)
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        code = type(parse_object(body)).__name__
    except RequestError as error:
        code = error.code
    assert code in {"dict", "invalid_json", "duplicate_key", "invalid_unicode", "value_out_of_range"}
