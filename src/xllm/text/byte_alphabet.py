"""The reversible map between bytes and printable characters that byte-level BPE vocabularies use.

Bytes that print keep their Latin-1 character, the others take the code points from 256 on, in
order of the byte. A table; nothing about tokenizers must live here.
"""

from __future__ import annotations

_PRINTABLE = frozenset([*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)])


def _byte_to_char() -> tuple[str, ...]:
    chars = []
    shifted = 0
    for byte in range(256):
        if byte in _PRINTABLE:
            chars.append(chr(byte))
        else:
            chars.append(chr(256 + shifted))
            shifted += 1
    return tuple(chars)


BYTE_TO_CHAR: tuple[str, ...] = _byte_to_char()
CHAR_TO_BYTE: dict[str, int] = {char: byte for byte, char in enumerate(BYTE_TO_CHAR)}


def text_to_bytes(token: str) -> bytes:
    """The bytes a vocabulary entry stands for.

    An entry with a character outside the alphabet (an added token such as "<a b>") stands for
    its own UTF-8 bytes.
    """
    try:
        return bytes(CHAR_TO_BYTE[char] for char in token)
    except KeyError:
        return token.encode("utf-8")
