"""Settings as data: every field of the configuration dataclasses, with its type, default and help.

Turns text or file values into the annotated type, or says what is wrong with them. Knows nothing
about where a value came from (`load`) or how a flag looks (`flags`).
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from xllm.errors import ConfigError

_UNITS = {"": 1, "b": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", re.IGNORECASE)
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field. `kind` is its type without None and without the tuple around it."""

    name: str
    section: str
    kind: type
    choices: tuple[str, ...]
    optional: bool
    many: bool
    default: Any
    help: str
    has_flag: bool = True

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def settings(*sections: type) -> dict[str, Setting]:
    """All fields of `sections`, nested dataclasses included, by their unique name."""
    found: dict[str, Setting] = {}
    for section in sections:
        hints = typing.get_type_hints(section)
        for item in dataclasses.fields(section):
            hint = hints[item.name]
            if dataclasses.is_dataclass(hint):
                found |= settings(typing.cast("type", hint))
                continue
            if item.name in found:
                raise ConfigError(f"two sections define the field {item.name}")
            found[item.name] = _setting(section, item, hint)
    return found


def _setting(section: type, item: dataclasses.Field[Any], hint: Any) -> Setting:
    optional = False
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = (arm for arm in typing.get_args(hint) if arm is not type(None))
        optional = True
    many = typing.get_origin(hint) is tuple
    if many:
        hint = typing.get_args(hint)[0]
    choices: tuple[str, ...] = ()
    if typing.get_origin(hint) is typing.Literal:
        choices = typing.get_args(hint)
        hint = str
    return Setting(
        name=item.name,
        section=section.__name__,
        kind=hint,
        choices=choices,
        optional=optional,
        many=many,
        default=item.default,
        help=item.metadata.get("help", ""),
        has_flag=item.metadata.get("has_flag", True),
    )


def convert(setting: Setting, value: Any, where: str) -> Any:
    """`value` as the setting's type. Raises ConfigError naming `where`, the value and the remedy."""
    if value is None or (setting.optional and value == "none"):
        if setting.optional:
            return None
        raise ConfigError(f"{where}: {setting.name} needs a value; leave it out for {setting.default!r}")
    if setting.many:
        parts = value if isinstance(value, list | tuple) else [value]
        texts = [piece for part in parts for piece in (part.split(",") if isinstance(part, str) else [part])]
        return tuple(_convert_one(setting, text, where) for text in texts if text != "")
    return _convert_one(setting, value, where)


def _convert_one(setting: Setting, value: Any, where: str) -> Any:
    converted = _CONVERTERS[setting.kind](setting, value)
    if converted is None:
        raise ConfigError(f"{where}: {setting.name} is {value!r}; it must be {_expected(setting)}")
    if setting.choices and converted not in setting.choices:
        hint = did_you_mean(str(converted), setting.choices)
        raise ConfigError(f"{where}: {setting.name} is {value!r}; choose {_expected(setting)}{hint}")
    return converted


def _to_bool(_: Setting, value: Any) -> bool | None:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    return True if text in _TRUE else False if text in _FALSE else None


def _to_int(setting: Setting, value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        return None
    text = value.strip()
    if re.fullmatch(r"[+-]?\d[\d_]*", text):
        return int(text)
    if setting.name.endswith("_bytes") and (match := _SIZE.fullmatch(text)):
        return int(float(match[1]) * _UNITS[(match[2] or "").lower()])
    return None


def _to_float(_: Setting, value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if number == number else None


def _to_str(_: Setting, value: Any) -> str | None:
    return value if isinstance(value, str) else str(value) if isinstance(value, int | float) else None


_CONVERTERS = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}


def _expected(setting: Setting) -> str:
    if setting.choices:
        return " or ".join(setting.choices)
    if setting.name.endswith("_bytes"):
        return "a number of bytes, such as 2GiB"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[setting.kind]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean X?` or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""
