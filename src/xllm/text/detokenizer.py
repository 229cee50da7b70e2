"""Token ids to text while they arrive. What is given out is never taken back.

Holds back at most the three bytes of an unfinished UTF-8 character. Knows nothing of stop strings.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from xllm.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Concatenated output equals `tokenizer.decode(all ids)` with the same options, however split.

    Linear time. `continuation=True` (the default) is the case of generated text: a leading space
    of a SentencePiece token is kept, as the text goes on after the prompt.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, continuation: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._strip_next = tokenizer.strips_first_space and not continuation
        self._at_border = True
        """No bytes of an unfinished character are held back."""
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Text that became certain with `ids`; may be empty."""
        data = self._tokenizer.bytes_of(ids, skip_special_tokens=self._skip_special)
        if self._strip_next and data:
            data = data.removeprefix(b" ")
            self._strip_next = False
        text = self._utf8.decode(data)
        self._at_border = not self._utf8.getstate()[0]
        return text

    def push_one(self, token_id: int) -> str:
        """`push((token_id,))`; the common token, whole characters between whole characters, is looked up."""
        if self._at_border and not self._strip_next:
            if self._skip_special and token_id in self._tokenizer.special_ids:
                return ""
            text = self._tokenizer.whole_text(token_id)
            if text is not None:
                return text
        return self.push((token_id,))

    def finish(self) -> str:
        """The rest: bytes of an unfinished character become U+FFFD, as in `decode`."""
        return self._utf8.decode(b"", final=True)
