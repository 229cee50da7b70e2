"""Merges the layers file < environment < command line < keyword into frozen dataclasses.

An unknown key is an error with the nearest known one, except in the environment: orchestrators
inject variables that begin with XLLM_ for a service of that name, so those are reported, not fatal.
"""

from __future__ import annotations

import dataclasses
import tomllib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from xllm.config import env as environment
from xllm.config.aliases import ALIASES, NEGATED
from xllm.config.fields import Setting, convert, did_you_mean, settings
from xllm.errors import ConfigError

T = TypeVar("T")

MAX_FILE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Loaded:
    """The merged values. `sources` tells for every value that is no default where it came from."""

    values: dict[str, Any]
    sources: dict[str, str]
    notes: tuple[str, ...] = ()

    def build(self, section: type[T]) -> T:
        """The frozen dataclass `section` (nested ones included) from the merged values."""
        hints = typing.get_type_hints(section)
        chosen: dict[str, Any] = {}
        for item in dataclasses.fields(typing.cast("Any", section)):
            hint = hints[item.name]
            if dataclasses.is_dataclass(hint):
                chosen[item.name] = self.build(typing.cast("type", hint))
            elif item.name in self.values:
                chosen[item.name] = self.values[item.name]
        return section(**chosen)

    def override(self, **values: Any) -> Loaded:
        """The same with some values fixed by the program itself; they are already of the right type."""
        sources = {name: source for name, source in self.sources.items() if name not in values}
        return Loaded(self.values | values, sources, self.notes)


def load(
    *sections: type,
    file: Path | None = None,
    env: Mapping[str, str] | None = None,
    cli: Mapping[str, Any] | None = None,
    keywords: Mapping[str, Any] | None = None,
) -> Loaded:
    """Merge all layers for the fields of `sections`. Raises ConfigError with field, value and remedy."""
    known = settings(*sections)
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    env_values, notes = _from_env(known, env or {})
    layers: list[tuple[str, Mapping[str, Any]]] = [
        ("environment", env_values),
        ("command line", cli or {}),
        ("keyword", keywords or {}),
    ]
    if file is not None:
        layers.insert(0, (f"file {file.name}", read_file(file)))
    for where, layer in layers:
        for key, value in layer.items():
            name, value = canonical(key, value, known, where)
            values[name] = convert(known[name], value, where)
            sources[name] = where
    return Loaded(values, sources, notes)


def from_keywords(section: type[T], keywords: Mapping[str, Any]) -> T:
    """`section` from keyword arguments alone: the Python API. Same errors as everywhere."""
    return load(section, keywords=keywords).build(section)


def canonical(key: str, value: Any, known: Mapping[str, Setting], where: str) -> tuple[str, Any]:
    """The field name behind `key` (dashes, aliases, negations) and its value."""
    name = key.replace("-", "_")
    if name in known:
        return name, value
    if ALIASES.get(name) in known:
        return ALIASES[name], value
    positive = known.get(NEGATED.get(name, name.removeprefix("no_")))
    if positive is not None and positive.kind is bool:
        return positive.name, not convert(positive, value, where)
    raise ConfigError(f"{where}: there is no setting {key!r}{did_you_mean(name, known)}")


def read_file(path: Path) -> dict[str, Any]:
    """A flat mapping from a .toml, .yaml or .yml file; YAML without tags."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path.name} is larger than {MAX_FILE_BYTES} bytes; name a settings file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration file {path}; check its path and rights") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name} is not UTF-8 text") from error
    try:
        data = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        language = "TOML" if path.suffix == ".toml" else "YAML"
        raise ConfigError(f"{path.name} is not valid {language}") from error
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path.name} must hold `setting: value` lines")
    return data


def _from_env(known: Mapping[str, Setting], env: Mapping[str, str]) -> tuple[dict[str, str], tuple[str, ...]]:
    names = {environment.PREFIX + name.upper(): name for name in known}
    values: dict[str, str] = {}
    notes: list[str] = []
    for variable, text in sorted(env.items()):
        if variable in environment.NOT_FLAGS:
            continue
        if variable not in names:
            notes.append(f"ignored {variable}: no such setting{did_you_mean(variable, names)}")
        elif text.startswith("tcp://"):
            # Kubernetes sets XLLM_PORT=tcp://… for a service that is called xllm.
            notes.append(f"ignored {variable}: looks like an address set by an orchestrator")
        else:
            values[names[variable]] = text
    return values, tuple(notes)
