"""Typed reading of a JSON object, field by field, with errors that name the JSON path.

Types only: what range a value may have is `xllm.limits`'s matter (a few sizes that must be known
before work is done are passed in here). null means "not given".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from xllm.errors import RequestError

T = TypeVar("T")

INT64 = range(-(2**63), 2**63)


class Fields:
    """`path` is where the object stands in the body ('' for the body itself)."""

    def __init__(self, value: Mapping[str, Any], path: str = "") -> None:
        self._left = dict(value)
        self._path = path

    def at(self, name: str) -> str:
        return f"{self._path}.{name}" if self._path else name

    def take(self, name: str) -> Any:
        """The raw value; None when absent or null."""
        return self._left.pop(name, None)

    def unread(self) -> tuple[str, ...]:
        """Names nobody asked for."""
        return tuple(self._left)

    def require(self, name: str) -> Any:
        value = self.take(name)
        if value is None:
            raise RequestError(
                f"'{self.at(name)}' is required.", code="missing_required_parameter", param=self.at(name)
            )
        return value

    def string(self, name: str, max_chars: int | None = None) -> str | None:
        value = self._typed(name, as_string)
        if value is not None and max_chars is not None and len(value) > max_chars:
            raise too_long(self.at(name), max_chars, "characters")
        return value

    def boolean(self, name: str, default: bool = False) -> bool:
        value = self._typed(name, as_boolean)
        return default if value is None else value

    def integer(self, name: str) -> int | None:
        return self._typed(name, as_integer)

    def number(self, name: str) -> float | None:
        return self._typed(name, as_number)

    def obj(self, name: str) -> dict[str, Any] | None:
        return self._typed(name, as_object)

    def items(self, name: str, read: Callable[[Any, str], T], max_items: int) -> tuple[T, ...] | None:
        """A list whose entries `read(value, path)` checks."""
        value = self._typed(name, as_list)
        return None if value is None else read_items(value, self.at(name), read, max_items)

    def _typed(self, name: str, read: Callable[[Any, str], T]) -> T | None:
        value = self.take(name)
        return None if value is None else read(value, self.at(name))


def read_items(value: list[Any], path: str, read: Callable[[Any, str], T], max_items: int) -> tuple[T, ...]:
    if len(value) > max_items:
        raise too_long(path, max_items, "entries")
    return tuple(read(item, f"{path}[{i}]") for i, item in enumerate(value))


def as_string(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise wrong_type(path, "a string")
    return value


def as_boolean(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(path, "true or false")
    return value


def as_integer(value: Any, path: str) -> int:
    if type(value) is not int:
        raise wrong_type(path, "an integer")
    if value not in INT64:
        raise RequestError(f"'{path}' is out of range.", code="value_out_of_range", param=path)
    return value


def as_number(value: Any, path: str) -> float:
    if type(value) not in (int, float):
        raise wrong_type(path, "a number")
    return float(value)


def as_list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise wrong_type(path, "a list")
    return value


def as_object(value: Any, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise wrong_type(path, "an object")
    return value


def wrong_type(path: str, what: str) -> RequestError:
    return RequestError(f"'{path}' must be {what}.", code="invalid_type", param=path)


def bad_value(path: str, message: str, code: str = "invalid_value") -> RequestError:
    """`message` is fixed text that follows the path."""
    return RequestError(f"'{path}' {message}.", code=code, param=path)


def too_long(path: str, limit: int, unit: str) -> RequestError:
    return bad_value(path, f"may have at most {limit} {unit}", "value_out_of_range")


def unsupported(path: str, why: str = "is not supported") -> RequestError:
    return bad_value(path, why, "unsupported_parameter")
