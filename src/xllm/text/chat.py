"""Messages to prompt tokens, such that nothing a client writes can act as a special token.

Literals of special tokens inside messages, tools and keywords are swapped for one-time markers
before the template runs and encoded as plain text after it. Rendering itself is `template.py`.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from xllm.errors import RequestError
from xllm.text.template import ChatTemplate
from xllm.text.tokenizer import Tokenizer


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    max_tokens: int | None = None,
    **kwargs: Any,
) -> list[int]:
    """Prompt token ids of a conversation.

    Only text written by the template becomes special tokens. `continue_final_message` ends the
    prompt right after the last message's content, so that the model goes on with it.
    `max_tokens` refuses what cannot fit before tokenising (see `Tokenizer.encode`).
    Raises RequestError: template_error, invalid_value, context_length_exceeded, invalid_unicode.
    """
    shield = _Shield(tokenizer)
    safe_messages = shield.hide(messages)
    end = None
    if continue_final_message:
        end = shield.end_marker(safe_messages)
    try:
        text = template.render(
            safe_messages, shield.hide(tools), add_generation_prompt and end is None, **shield.hide(kwargs)
        )
    except RequestError as error:
        raise RequestError(shield.reveal(error.message), code=error.code, param=error.param) from error
    if end is not None:
        text, found, _ = text.partition(end)
        if not found:
            raise RequestError(
                "the chat template dropped the final message; it cannot be continued", code="template_error"
            )
    return shield.encode(text, max_tokens)


class _Shield:
    """Markers of one conversation. The nonce is fresh, so a client cannot write a marker itself."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._nonce = secrets.token_hex(8)
        self._literals: list[str] = []
        self._guard = tokenizer.special_literals
        self._marker = re.compile(f"\U000ffff0{self._nonce}x([0-9]+)\U000ffff1")

    def hide(self, value: Any) -> Any:
        """`value` (JSON-like) with special literals in all its strings and keys marked."""
        if isinstance(value, str):
            return self._hide_text(value)
        if isinstance(value, Mapping):
            return {self.hide(k): self.hide(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.hide(v) for v in value]
        return value

    def end_marker(self, messages: list[dict[str, Any]]) -> str:
        """Append a marker to the last message's text and return it."""
        last = messages[-1] if messages else {}
        content = last.get("content")
        marker = self._mark("")
        if isinstance(content, str):
            last["content"] = content + marker
        elif isinstance(content, list) and content and isinstance(content[-1].get("text"), str):
            content[-1]["text"] += marker
        else:
            raise RequestError("the final message has no text to continue", param="continue_final_message")
        return marker

    def reveal(self, text: str) -> str:
        """`text` with the markers replaced by what they stand for."""
        return self._marker.sub(lambda m: self._literals[int(m[1])], text)

    def encode(self, text: str, max_tokens: int | None) -> list[int]:
        """Tokens of the rendered text: runs with markers as plain text, the rest as usual."""
        if not self._literals:
            return self._tokenizer.encode(text, add_special_tokens=False, max_tokens=max_tokens)
        ids: list[int] = []
        usual = ""
        for piece in self._guard.split(text):
            if self._marker.search(piece) is None:
                usual += piece
                continue
            ids += self._encode(usual, True, max_tokens)
            ids += self._encode(self.reveal(piece), False, max_tokens)
            usual = ""
        ids += self._encode(usual, True, max_tokens)
        if max_tokens is not None and len(ids) > max_tokens:
            raise RequestError(f"the text has more than {max_tokens} tokens", code="context_length_exceeded")
        return ids

    def _encode(self, text: str, parse_special: bool, max_tokens: int | None) -> list[int]:
        if not text:
            return []
        return self._tokenizer.encode(
            text, add_special_tokens=False, parse_special=parse_special, max_tokens=max_tokens
        )

    def _hide_text(self, text: str) -> str:
        hidden = self._guard.sub(lambda literal: self._mark(literal), text)
        # Two neighbouring strings must not make a literal together either.
        if self._guard.could_end(text):
            hidden = self._mark("") + hidden
        if self._guard.could_start(text):
            hidden += self._mark("")
        return hidden

    def _mark(self, literal: str) -> str:
        self._literals.append(literal)
        return f"\U000ffff0{self._nonce}x{len(self._literals) - 1}\U000ffff1"
