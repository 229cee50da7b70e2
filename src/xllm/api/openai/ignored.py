"""The header that tells which fields of a request had no effect."""

from __future__ import annotations

import re

from xllm.api.fields import Fields

_SHOWN = re.compile(r"[A-Za-z0-9_.-]{1,64}")


def ignored_header(fields: Fields) -> tuple[tuple[str, str], ...]:
    """`x-ignored-params`, or nothing. Only names that are safe in a header, at most 32."""
    names = [n for n in fields.unread() if _SHOWN.fullmatch(n)][:32]
    return (("x-ignored-params", ", ".join(names)),) if names else ()
