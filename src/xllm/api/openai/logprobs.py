"""Log probabilities in the three shapes clients know: completions, chat and `prompt_logprobs`.

Formatting only. A token that is not whole UTF-8 has no text of its own: completions spell it
`bytes:\\xe2\\x82` (so that keys stay distinct), chat gives U+FFFD and the exact `bytes`.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from xllm.text.tokenizer import Tokenizer
from xllm.types import Logprob, TokenLogprobs

Entry = TokenLogprobs | None


class CompletionLogprobs:
    """`logprobs` of one completion choice; `add` may be called per delta, offsets go on."""

    def __init__(self, tokenizer: Tokenizer, *, tokens_as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = tokens_as_ids
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def add(self, token_ids: Sequence[int], entries: Sequence[Entry]) -> dict[str, Any]:
        """{tokens, token_logprobs, top_logprobs, text_offset} of these tokens.

        An entry None (the first prompt token, which nothing predicts) gives null.
        """
        out: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token_id, entry in zip(token_ids, entries, strict=True):
            out["tokens"].append(self._name(token_id))
            out["token_logprobs"].append(None if entry is None else _finite(entry.token.logprob))
            out["top_logprobs"].append(None if entry is None else self._top(entry))
            out["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token_id)))
        return out

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        # The drawn token is always named, so there may be one more than asked for.
        return {self._name(p.token_id): _finite(p.logprob) for p in (entry.token, *entry.top)}

    def _name(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._as_ids else _name(self._tokenizer.token_bytes(token_id))


def chat_logprobs(
    tokenizer: Tokenizer, entries: Sequence[TokenLogprobs], *, num_top: int, tokens_as_ids: bool
) -> dict[str, Any]:
    """`logprobs` of a chat choice or chunk."""

    def one(item: Logprob) -> dict[str, Any]:
        data = tokenizer.token_bytes(item.token_id)
        name = f"token_id:{item.token_id}" if tokens_as_ids else data.decode("utf-8", "replace")
        return {"token": name, "logprob": _finite(item.logprob), "bytes": list(data)}

    return {"content": [{**one(e.token), "top_logprobs": [one(t) for t in e.top[:num_top]]} for e in entries]}


def prompt_logprobs_json(tokenizer: Tokenizer, entries: Sequence[TokenLogprobs]) -> list[Any]:
    """`prompt_logprobs`: null for the first token, then {token id: {logprob, rank, decoded_token}}."""

    def one(item: Logprob) -> dict[str, Any]:
        text = tokenizer.token_bytes(item.token_id).decode("utf-8", "replace")
        return {"logprob": _finite(item.logprob), "rank": item.rank, "decoded_token": text}

    return [None, *({str(p.token_id): one(p) for p in (e.token, *e.top)} for e in entries)]


def _name(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{b:02x}" for b in data)


def _finite(logprob: float) -> float:
    # JSON has no −inf; a masked token is as good as impossible at this value.
    return max(logprob, -9999.0)
