"""Text to token ids and back, over the `tokenizers` library.

Decoding is our own: ids → bytes → UTF-8 with replacement, so that whole, incremental and
per-token decoding agree by construction. No chat templates, no stop strings, no downloads here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import msgspec
import tokenizers

from xllm.errors import ConfigError, RequestError
from xllm.text.byte_alphabet import text_to_bytes
from xllm.text.literals import SpecialLiterals

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"
_FIRST_LOOK_CHARS = 1 << 17


class Tokenizer:
    """One model's tokenizer. Immutable after construction and safe to share between threads.

    `text_config` keys that are read: bos_token_id, eos_token_ids (or eos_token_id).
    """

    def __init__(self, tokenizer_json: bytes, text_config: Mapping[str, Any]) -> None:
        """Raises ConfigError for JSON that is no tokenizer, or a decoder this class cannot follow."""
        try:
            spec = msgspec.json.decode(tokenizer_json)
            self._lib = tokenizers.Tokenizer.from_str(tokenizer_json.decode("utf-8"))
        except Exception as error:  # noqa: BLE001  the library raises bare Exception
            raise ConfigError("tokenizer: the file is not a valid tokenizers JSON") from error
        self._lib.no_truncation()
        self._lib.no_padding()
        self._json = tokenizer_json
        self._byte_level, self._strips_first_space = _decoder_rules(spec.get("decoder"))
        self._special = {t["id"]: t["content"] for t in spec.get("added_tokens", ()) if t.get("special")}
        self._added = {t["id"]: t["content"] for t in spec.get("added_tokens", ())}
        added = spec.get("added_tokens") or ()
        self._normalizes = bool(spec.get("normalizer"))
        self._swallows = any(t.get("lstrip") or t.get("rstrip") for t in added)
        self._num_tokens, self._longest_token = self._vocabulary_facts(spec)
        self._bytes: dict[int, bytes] = {}
        self.bos_token_id: int | None = text_config.get("bos_token_id")
        self.eos_token_ids: tuple[int, ...] = _eos_ids(text_config)

    @property
    def num_tokens(self) -> int:
        """Ids are below this; the model's logits may be wider (padding rows)."""
        return self._num_tokens

    def _vocabulary_facts(self, spec: Mapping[str, Any]) -> tuple[int, int]:
        """(ids are below this, characters of the longest token).

        From the parsed file where it has a mapping: the library would convert its own again, which takes
        as long as all the rest.
        """
        vocab = spec.get("model", {}).get("vocab")
        if isinstance(vocab, dict) and vocab:
            added = self._lib.get_added_tokens_decoder()
            last, longest = max(vocab.values()), max(map(len, vocab))
            return (
                1 + max(last, *added, -1),
                max(longest, *(len(t.content) for t in added.values()), 1),
            )
        vocab = self._lib.get_vocab(with_added_tokens=True)
        return 1 + max(vocab.values(), default=-1), max((len(t) for t in vocab), default=1)

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of tokens marked special (control tokens), which `skip_special_tokens` drops."""
        return self._special_ids

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._special)

    @property
    def special_tokens(self) -> Mapping[int, str]:
        """Id → literal of the special tokens."""
        return self._special

    @cached_property
    def special_literals(self) -> SpecialLiterals:
        """Finds the special tokens' literals in text."""
        return SpecialLiterals(self._special.values())

    def encode(
        self,
        text: str,
        *,
        add_special_tokens: bool = True,
        parse_special: bool = True,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of `text`.

        `add_special_tokens` adds what the model's post-processor adds (a BOS, say).
        `parse_special=False` encodes the literals of special tokens as plain text.
        With `max_tokens`, text that cannot fit is refused, long texts after a look at their start, so
        that the work is bounded by the limit and not by the text. The work itself is O(n log n).
        Raises RequestError: invalid_unicode for lone surrogates, context_length_exceeded.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RequestError("the text holds unpaired surrogates", code="invalid_unicode") from error
        lib = self._lib if parse_special else self._literal_lib
        if max_tokens is not None:
            self._refuse_hopeless(lib, text, max_tokens)
        ids: list[int] = lib.encode(text, add_special_tokens=add_special_tokens).ids
        if max_tokens is not None and len(ids) > max_tokens:
            raise _too_long(max_tokens)
        return ids

    def _refuse_hopeless(self, lib: tokenizers.Tokenizer, text: str, max_tokens: int) -> None:
        if len(text) > max_tokens * self.max_token_chars:
            raise _too_long(max_tokens)
        length = _FIRST_LOOK_CHARS
        while length < len(text):
            # Cutting a text changes tokens near the cut only; twice the limit leaves room for that.
            if len(lib.encode(text[:length], add_special_tokens=False).ids) > 2 * max_tokens:
                raise _too_long(max_tokens)
            length *= 4

    @property
    def max_token_chars(self) -> int:
        """Bound on the characters of input that one token can stand for.

        A token's UTF-8 bytes bound its characters from above. Normalisers that shorten text
        (NFC composes a few code points into one) are covered by the factor 4; tokens that
        swallow white space around them (lstrip, rstrip) make no bound possible.
        """
        return 1 << 40 if self._swallows else self._longest_token * (4 if self._normalizes else 1)

    @cached_property
    def _literal_lib(self) -> tokenizers.Tokenizer:
        # A second instance, because the switch is state of the instance and encode runs in threads.
        lib = tokenizers.Tokenizer.from_str(self._json.decode("utf-8"))
        lib.no_truncation()
        lib.no_padding()
        lib.encode_special_tokens = True
        return lib

    def decode(
        self, ids: Iterable[int], skip_special_tokens: bool = True, *, continuation: bool = False
    ) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token nothing.

        SentencePiece vocabularies write a leading space in front of the first word; it is dropped
        unless the text continues another (`continuation=True`, what a completion does).
        """
        data = self.bytes_of(ids, skip_special_tokens=skip_special_tokens)
        if self._strips_first_space and not continuation and data.startswith(b" "):
            data = data[1:]
        return data.decode("utf-8", errors="replace")

    def bytes_of(self, ids: Iterable[int], *, skip_special_tokens: bool) -> bytes:
        """The bytes of `ids` in order; what `decode` and the incremental detokenizer build on."""
        if skip_special_tokens:
            special = self._special
            return b"".join(self.token_bytes(i) for i in ids if i not in special)
        return b"".join(map(self.token_bytes, ids))

    @property
    def strips_first_space(self) -> bool:
        """Whether `decode` drops one space at the start of a text."""
        return self._strips_first_space

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary entry as stored (byte-level alphabet, ▁), None when there is none."""
        if token_id < 0 or token_id >= 1 << 32:
            return None
        token: str | None = self._lib.id_to_token(token_id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """The id of a vocabulary entry as stored."""
        token_id: int | None = self._lib.token_to_id(token)
        return token_id

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text (it may be part of a character); b"" if unknown."""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._token_bytes(token_id)
            self._bytes[token_id] = data
        return data

    def _token_bytes(self, token_id: int) -> bytes:
        token = self.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            return text_to_bytes(token)
        if token_id not in self._added and (byte := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(byte[1], 16)])
        return token.replace(_METASPACE, " ").encode("utf-8")


def _too_long(max_tokens: int) -> RequestError:
    return RequestError(f"the text has more than {max_tokens} tokens", code="context_length_exceeded")


def _eos_ids(text_config: Mapping[str, Any]) -> tuple[int, ...]:
    ids: Sequence[int] | int | None = text_config.get("eos_token_ids") or text_config.get("eos_token_id")
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


def _decoder_rules(decoder: Any) -> tuple[bool, bool]:
    """(byte level, strips the first space) of a tokenizers decoder. Raises ConfigError."""
    steps = decoder.get("decoders", ()) if decoder and decoder.get("type") == "Sequence" else (decoder,)
    byte_level = strips = False
    for step in steps:
        kind = step.get("type") if step else None
        if kind == "ByteLevel":
            byte_level = True
        elif kind == "Metaspace":
            strips = step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True)
        elif kind == "Strip" and step.get("content") == " ":
            strips = step.get("start", 0) > 0
        elif kind == "Replace" and step.get("pattern") == {"String": _METASPACE}:
            continue
        elif kind not in ("ByteFallback", "Fuse"):
            raise ConfigError(f"tokenizer: decoder {kind} is not supported; ByteLevel and SentencePiece are")
    return byte_level, bool(strips)
