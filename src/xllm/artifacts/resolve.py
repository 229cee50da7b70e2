"""From what the user typed to a `ModelSource`: catalogue name, directory, .gguf file or hub id.

The only place that decides what a model argument means. No parsing of formats here.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import re
from dataclasses import dataclass
from pathlib import Path

from xllm.artifacts.catalogue import CATALOGUE, CatalogueEntry, entry_names, find_entry
from xllm.artifacts.gguf_file import GgufModel
from xllm.artifacts.hf_dir import HfModel, assets_of_path
from xllm.artifacts.pull import Progress, cached_path, pull
from xllm.artifacts.source import DummyModel, ModelSource
from xllm.errors import ConfigError

HUB_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model")
"""Files taken from a hub repository: data only, never .bin (pickle) or .py (code)."""

_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedModel:
    """One line of `xllm list`. `path` is None until pulled."""

    name: str
    aliases: tuple[str, ...]
    description: str
    licence: str
    size_bytes: int
    path: Path | None


def resolve(
    model: str,
    *,
    revision: str | None = None,
    load_format: str = "auto",
    progress: Progress | None = None,
    allow_pull: bool = True,
    seed: int = 0,
    cache: Path | None = None,
) -> ModelSource:
    """The model that `model` names. A catalogue name wins over a directory of that name (write ./NAME).

    `load_format`: auto, safetensors or gguf (refuse the other), dummy (random weights of `seed`).
    `allow_pull=False` never touches the network. Raises ConfigError with the remedy.
    """
    source = _find(model, revision, progress, allow_pull, cache)
    if load_format == "dummy":
        return DummyModel(source, seed)
    if load_format not in ("auto", source.kind):
        raise ConfigError(f"load_format: {load_format} was asked for, but {model} is {source.kind}")
    return source


def resolve_assets(source: ModelSource, tokenizer: str | None, chat_template: str | None) -> dict[str, bytes]:
    """The source's text assets, with the tokenizer and template given by path instead where set."""
    assets = source.assets() if tokenizer is None else assets_of_path(Path(tokenizer).expanduser())
    if tokenizer is not None and "chat_template" not in assets:
        with contextlib.suppress(ConfigError):
            assets |= {k: v for k, v in source.assets().items() if k == "chat_template"}
    if chat_template is not None:
        try:
            assets["chat_template"] = Path(chat_template).expanduser().read_bytes()
        except OSError as error:
            raise ConfigError(f"chat_template: {chat_template} cannot be read; give a Jinja file") from error
    return assets


def list_models(cache: Path | None = None) -> list[ListedModel]:
    """The catalogue, with what has been pulled."""
    return [
        ListedModel(
            name=entry.name,
            aliases=entry.aliases,
            description=entry.description,
            licence=entry.licence,
            size_bytes=entry.size_bytes,
            path=cached_path(entry, cache),
        )
        for entry in CATALOGUE
    ]


def _find(
    model: str, revision: str | None, progress: Progress | None, allow_pull: bool, cache: Path | None
) -> ModelSource:
    if not model:
        raise ConfigError(f"model: none given; try {CATALOGUE[0].name}, or a path or hub id")
    entry = find_entry(model)
    if entry is not None:
        return _catalogue_model(entry, progress, allow_pull, cache)
    path = Path(model).expanduser()
    try:
        is_dir, is_file = path.is_dir(), path.is_file()
    except OSError:  # longer than any path can be, or in a directory we may not look into
        is_dir = is_file = False
    if is_dir:
        return HfModel(path, path.resolve().name)
    if is_file:
        if path.suffix.lower() != ".gguf":
            raise ConfigError(f"model: {model} is a file but not .gguf; give its directory instead")
        return GgufModel(path, path.stem)
    if model.startswith((".", "/", "~")) or path.suffix.lower() == ".gguf":
        raise ConfigError(f"model: there is no readable file or directory {model[:200]}")
    if _HUB_ID.fullmatch(model):
        return HfModel(_hub_directory(model, revision, progress, allow_pull), model)
    raise ConfigError(_unknown(model))


def _unknown(model: str) -> str:
    close = difflib.get_close_matches(model.lower(), entry_names(), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return (
        f"model: {model[:100]} is unknown; {hint}Give one of {', '.join(e.name for e in CATALOGUE)}, "
        "a Hugging Face directory, a .gguf file, or a hub id (owner/name)"
    )


def _catalogue_model(
    entry: CatalogueEntry, progress: Progress | None, allow_pull: bool, cache: Path | None
) -> ModelSource:
    path = cached_path(entry, cache)
    if path is None:
        if not allow_pull:
            raise ConfigError(f"model: {entry.name} is not on this machine; run xllm pull {entry.name}")
        path = pull(entry.name, progress, cache=cache)
    return GgufModel(path, entry.name, pinned_sha256=entry.sha256)


def _hub_directory(model: str, revision: str | None, progress: Progress | None, allow_pull: bool) -> Path:
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError as error:
        raise ConfigError(f"model: {model} is a hub id, which needs pip install huggingface_hub") from error
    if progress is not None:
        progress(f"looking up {model} on the hub")
    try:
        found = hub.snapshot_download(
            model, revision=revision, allow_patterns=list(HUB_PATTERNS), local_files_only=not allow_pull
        )
    except Exception as error:  # noqa: BLE001  the library's errors come from several HTTP stacks
        raise ConfigError(
            f"model: {model} could not be fetched from the hub (no network, no such model or revision, or no "
            "access). Check the name and connection, set HF_TOKEN for gated models, or give a local "
            "directory or .gguf file instead"
        ) from error
    return Path(found)
