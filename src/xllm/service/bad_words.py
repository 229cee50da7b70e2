"""`bad_words` as token sequences, by vLLM's rule. Pure; the sampler bans the sequences."""

from __future__ import annotations

from xllm.text.tokenizer import Tokenizer


def bad_word_ids(tokenizer: Tokenizer, words: tuple[str, ...]) -> tuple[tuple[int, ...], ...]:
    """Each word as it is tokenised at the start of a text and after a space.

    The second form counts only when it has as many tokens and starts differently: otherwise it
    is the first form with a separate space, which would ban nothing that the first does not.
    """
    sequences: list[tuple[int, ...]] = []
    for word in words:
        bare = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False, parse_special=False))
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False, parse_special=False))
        if bare:
            sequences.append(bare)
        if spaced and len(spaced) == len(bare) and spaced[0] != bare[0]:
            sequences.append(spaced)
    return tuple(sequences)
