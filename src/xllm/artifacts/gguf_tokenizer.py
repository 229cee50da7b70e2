"""GGUF tokenizer metadata to the JSON of the `tokenizers` library, plus template and text_config.

Two families: "gpt2" (byte-level BPE, by the name of its pre-tokenizer) and "llama" (SentencePiece
BPE, whose merges follow from the scores). Nothing is tokenised here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from xllm.artifacts.gguf_arch import eos_ids
from xllm.artifacts.gguf_header import GgufError
from xllm.artifacts.pretokenizers import PRE_TOKENIZERS, PreTokenizer

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_METASPACE = "\u2581"


def assets_from_metadata(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Assets "tokenizer", "text_config" and, if there is one, "chat_template". Raises GgufError."""
    vocabulary = _Vocabulary(metadata)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if vocabulary.model not in builders:
        raise GgufError(f"tokenizer {str(vocabulary.model)[:40]} is not supported; gpt2 and llama are")
    spec = builders[vocabulary.model](vocabulary)
    assets = {
        # Megabytes: the one JSON text here whose making is felt at start.
        "tokenizer": msgspec.json.encode(spec),
        "text_config": json.dumps(_text_config(vocabulary), ensure_ascii=False).encode("utf-8"),
    }
    template = metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        assets["chat_template"] = template.encode("utf-8")
    return assets


class _Vocabulary:
    """The `tokenizer.ggml.*` keys, checked."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.model = self.get("model")
        tokens = self.get("tokens")
        if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) for t in tokens):
            raise GgufError("the file has no tokenizer; give one with --tokenizer")
        self.tokens: list[str] = tokens
        self.types: Sequence[int] = self._per_token("token_type", 1)
        self.eos_ids = eos_ids(metadata)

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"tokenizer.ggml.{key}", default)

    def scores(self) -> Sequence[float]:
        return self._per_token("scores", 0.0)

    def ids(self) -> dict[str, int]:
        """Token → id; of duplicates the first."""
        ids: dict[str, int] = {}
        for i, token in enumerate(self.tokens):
            ids.setdefault(token, i)
        return ids

    def special_id(self, key: str) -> int | None:
        value = self.get(f"{key}_token_id")
        return value if isinstance(value, int) and 0 <= value < len(self.tokens) else None

    @property
    def pre(self) -> PreTokenizer:
        name = self.get("pre", "default")
        if name not in PRE_TOKENIZERS:
            raise GgufError(
                f"pre-tokenizer {str(name)[:40]} is not supported; "
                "give a Hugging Face tokenizer with --tokenizer"
            )
        return PRE_TOKENIZERS[name]

    def adds(self, key: str) -> bool:
        """Whether `key` (bos, eos) is added around a text."""
        default = key == "bos" and (self.model == "llama" or self.pre.adds_bos)
        return bool(self.get(f"add_{key}_token", default)) and self.special_id(key) is not None

    def _per_token(self, key: str, default: Any) -> Sequence[Any]:
        values = self.get(key)
        if values is None:
            return [default] * len(self.tokens)
        if not isinstance(values, list) or len(values) != len(self.tokens):
            raise GgufError(f"tokenizer.ggml.{key} does not have one entry per token")
        return values


def _byte_level(v: _Vocabulary) -> dict[str, Any]:
    merges = v.get("merges")
    if not isinstance(merges, list) or not all(isinstance(m, str) and " " in m[1:] for m in merges):
        raise GgufError("tokenizer.ggml.merges is missing or damaged")
    ids = v.ids()
    pairs = [_halves(m) for m in merges]
    # The library refuses a merge whose parts or result are no tokens.
    pairs = [p for p in pairs if p[0] in ids and p[1] in ids and p[0] + p[1] in ids]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    spec = _frame(v, ids, pairs, byte_fallback=False, ignore_merges=v.pre.ignore_merges)
    spec["normalizer"] = {"type": "NFC"} if v.pre.nfc else None
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*v.pre.steps(), byte_level]}
    spec["decoder"] = byte_level
    return spec


def _halves(merge: str) -> tuple[str, str]:
    """The separator is the first blank after the first character; byte-level tokens hold no blank."""
    left, _, right = merge.partition(" ")
    if not left:
        left, _, right = merge[1:].partition(" ")
        left = " " + left
    return left, right


def _sentencepiece(v: _Vocabulary) -> dict[str, Any]:
    ids = v.ids()
    prefix = bool(v.get("add_space_prefix", True))
    spec = _frame(v, ids, _merges_by_score(v, ids), byte_fallback="<0x00>" in ids, ignore_merges=False)
    unknown = v.special_id("unknown")
    spec["model"]["unk_token"] = None if unknown is None else v.tokens[unknown]
    spec["model"]["fuse_unk"] = True
    to_metaspace = {"type": "Replace", "pattern": {"String": " "}, "content": _METASPACE}
    prepend = {"type": "Prepend", "prepend": _METASPACE}
    with_prefix = {"type": "Sequence", "normalizers": [prepend, to_metaspace]}
    spec["normalizer"] = with_prefix if prefix else to_metaspace
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _METASPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    spec["decoder"] = {"type": "Sequence", "decoders": decoders}
    return spec


def _merges_by_score(v: _Vocabulary, ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose union scores best; as a merge list, best first.

    A piece may be reached from any split into two pieces, so every such split is a merge.
    """
    scores = v.scores()
    ranked = []
    for piece, i in ids.items():
        if v.types[i] in (_UNKNOWN, _CONTROL) or len(piece) < 2:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[i], ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for _, _, _, left, right in ranked]


def _frame(
    v: _Vocabulary,
    ids: Mapping[str, int],
    merges: list[tuple[str, str]],
    *,
    byte_fallback: bool,
    ignore_merges: bool,
) -> dict[str, Any]:
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(v, ids),
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": _post_processor(v),
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": byte_fallback,
            "ignore_merges": ignore_merges,
            "vocab": ids,
            "merges": merges,
        },
    }


def _added_tokens(v: _Vocabulary, ids: Mapping[str, int]) -> list[dict[str, Any]]:
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": v.types[i] != _USER_DEFINED,
        }
        for token, i in ids.items()
        if v.types[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]


def _post_processor(v: _Vocabulary) -> dict[str, Any] | None:
    around = {key: v.special_id(key) for key in ("bos", "eos") if v.adds(key)}
    if not around:
        return None
    pieces = {key: v.tokens[i] for key, i in around.items() if i is not None}

    def wrapped(sequence: str, type_id: int) -> list[dict[str, Any]]:
        def special(key: str) -> list[dict[str, Any]]:
            return [{"SpecialToken": {"id": pieces[key], "type_id": type_id}}] if key in pieces else []

        return [*special("bos"), {"Sequence": {"id": sequence, "type_id": type_id}}, *special("eos")]

    return {
        "type": "TemplateProcessing",
        "single": wrapped("A", 0),
        "pair": wrapped("A", 0) + wrapped("B", 1),
        "special_tokens": {
            text: {"id": text, "ids": [around[key]], "tokens": [text]} for key, text in pieces.items()
        },
    }


def _text_config(v: _Vocabulary) -> dict[str, Any]:
    config: dict[str, Any] = {
        "add_bos_token": v.adds("bos"),
        "add_eos_token": v.adds("eos"),
        "eos_token_ids": list(v.eos_ids),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token_id = v.special_id(key)
        config[f"{name}_token_id"] = token_id
        config[f"{name}_token"] = None if token_id is None else v.tokens[token_id]
    return config
