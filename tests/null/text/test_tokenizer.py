"""Encoding, special tokens and refusals."""

from __future__ import annotations

import json

import pytest

from tests.null.text.tokenizers_for_tests import byte_level, sentencepiece
from xllm.errors import ConfigError, RequestError
from xllm.testing.tiny_tokenizer import tiny_assets
from xllm.text import TextAssets, Tokenizer


@pytest.mark.parametrize("size", [259, 512, 1500, 5000])
def test_tiny_tokenizer_has_the_size_asked_for(size: int) -> None:
    assets = TextAssets.from_card_assets(tiny_assets(size))
    assert assets.tokenizer.num_tokens == size
    assert assets.tokenizer.eos_token_ids == (2,)
    assert tiny_assets(size) == tiny_assets(size)


def test_special_literals_are_tokens_or_plain_text_as_asked() -> None:
    tokenizer = byte_level().tokenizer
    text = "x<|im_end|>y"
    assert 2 in tokenizer.encode(text)
    plain = tokenizer.encode(text, parse_special=False)
    assert not tokenizer.special_ids.intersection(plain)
    assert tokenizer.decode(plain) == text


def test_bos_is_added_only_where_asked() -> None:
    tokenizer = sentencepiece().tokenizer
    assert tokenizer.encode("cat")[0] == 1
    assert tokenizer.encode("cat", add_special_tokens=False)[0] != 1
    assert tokenizer.bos_token_id == 1


def test_merges_follow_the_scores() -> None:
    tokenizer = sentencepiece().tokenizer
    tokens = [tokenizer.id_to_token(i) for i in tokenizer.encode("the cat sat", add_special_tokens=False)]
    assert tokens == ["▁the", "▁cat", "▁sat"]


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(RequestError) as caught:
        byte_level().tokenizer.encode("a\ud800")
    assert caught.value.code == "invalid_unicode"


@pytest.mark.parametrize("length", [101, 200_000, 10_000_000])
def test_text_beyond_max_tokens_is_refused(length: int) -> None:
    with pytest.raises(RequestError) as caught:
        byte_level().tokenizer.encode("1" * length, max_tokens=100)
    assert caught.value.code == "context_length_exceeded"


def test_text_of_exactly_max_tokens_is_accepted() -> None:
    assert len(byte_level().tokenizer.encode("1" * 200_000, max_tokens=200_000)) == 200_000


def test_unknown_ids_have_no_bytes() -> None:
    tokenizer = byte_level().tokenizer
    assert tokenizer.token_bytes(10**6) == b""
    assert tokenizer.token_bytes(-1) == b""
    assert tokenizer.id_to_token(1 << 40) is None


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b'{"model": 1}'])
def test_a_damaged_tokenizer_is_a_config_error(data: bytes) -> None:
    with pytest.raises(ConfigError):
        Tokenizer(data, {})


def test_a_decoder_that_cannot_be_followed_is_refused() -> None:
    spec = json.loads(tiny_assets()["tokenizer"])
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    with pytest.raises(ConfigError, match="WordPiece"):
        Tokenizer(json.dumps(spec).encode(), {})
