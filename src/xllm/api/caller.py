"""Who sent a request, as far as its key and address tell. A value; decided in `auth` and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Caller:
    """`key_id` names the key without telling it ('' = no key was given or needed)."""

    key_id: str = ""
    is_admin: bool = False
