"""A Hugging Face directory as a `ModelSource`: config.json, safetensors, tokenizer.json, template.

Reads data files only; no code and no pickles of the directory are ever looked at.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xllm.arch import ArchConfig
from xllm.artifacts.digest import files_identity, sampled_digest
from xllm.artifacts.gguf_file import GgufModel
from xllm.artifacts.hf_arch import arch_from_config
from xllm.artifacts.safetensors_file import SafetensorsFile
from xllm.artifacts.source import Array, FloatArray, TensorSource, sampling_defaults
from xllm.codes import GroupCodes
from xllm.errors import ConfigError

MAX_JSON_BYTES = 128 * 1024 * 1024
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")

# Buffers old checkpoints carry along; they are computed, not loaded.
_NOT_PARAMETERS = (".rotary_emb.inv_freq", ".attn.masked_bias")

# Wrappers around the text model: stored prefix → prefix of the text model alone.
_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
_OTHER_TOWERS: tuple[str, ...] = ("vision_tower.", "multi_modal_projector.")
_OTHER_TOWERS += tuple(f"model.{name}" for name in _OTHER_TOWERS)


@dataclass(frozen=True, slots=True)
class HfModel:
    path: Path
    model_id: str

    @property
    def kind(self) -> str:
        return "safetensors"

    def arch(self) -> ArchConfig:
        config = read_json(self.path / "config.json")
        if config is None:
            raise ConfigError(f"model: {self.path.name} has no config.json; is it a model directory?")
        return arch_from_config(config, read_json(self.path / "generation_config.json") or {})

    def tensors(self) -> TensorSource:
        return HfTensors(self._weight_files(), tied=self.arch().tie_word_embeddings)

    def assets(self) -> dict[str, bytes]:
        assets = assets_of_path(self.path)
        config = json.loads(assets["text_config"])
        eos = self.arch().eos_token_ids
        config["eos_token_ids"] = list(dict.fromkeys([*eos, *config["eos_token_ids"]]))
        if config.get("bos_token_id") is None:
            config["bos_token_id"] = self.arch().bos_token_id
        return {**assets, "text_config": json.dumps(config, ensure_ascii=False).encode("utf-8")}

    def generation_config(self) -> dict[str, float | int]:
        return sampling_defaults(read_json(self.path / "generation_config.json") or {})

    def weights_digest(self) -> str:
        config = self.path / "config.json"
        return sampled_digest(self._weight_files(), config.read_bytes() if config.is_file() else b"")

    def _weight_files(self) -> list[Path]:
        """The shards the index names, else every *.safetensors of the directory."""
        index = read_json(self.path / "model.safetensors.index.json")
        if index is None:
            files = sorted(self.path.glob("*.safetensors"))
        else:
            names = index.get("weight_map")
            values = set(names.values()) if isinstance(names, dict) else set()
            if not all(isinstance(v, str) and v == Path(v).name for v in values):
                raise ConfigError("model.safetensors.index.json: a shard is not a plain file name")
            files = [self.path / name for name in sorted(values)]
        if not files or not all(f.is_file() for f in files):
            raise ConfigError(
                f"model: {self.path.name} lacks weight files; safetensors are needed (.bin is never read)"
            )
        return files


class HfTensors:
    """`TensorSource` over one or more mapped safetensors files."""

    def __init__(self, files: Sequence[Path], *, tied: bool) -> None:
        self._where: dict[str, tuple[SafetensorsFile, str]] = {}
        self._files = [SafetensorsFile(path) for path in files]
        for file in self._files:
            for stored in file.tensors:
                name = _text_model_name(stored)
                # Some checkpoints store the tied matrix a second time.
                if name is None or (tied and name == "lm_head.weight"):
                    continue
                if name in self._where:
                    raise ConfigError(f"model: tensor {name[:80]} is in two files")
                self._where[name] = (file, stored)

    def identity(self) -> str:
        return files_identity([(file.path, file.stat) for file in self._files])

    def release(self) -> None:
        for file in self._files:
            file.release()

    def names(self) -> Sequence[str]:
        return sorted(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        file, stored = self._find(name)
        return file.tensors[stored].shape

    def load_f32(self, name: str) -> FloatArray:
        dtype, values = self.load_raw(name)
        if dtype == "bfloat16":
            return (values.astype(np.uint32) << 16).view(np.float32)
        return np.ascontiguousarray(values, dtype=np.float32)

    def load_codes(self, name: str) -> GroupCodes | None:
        return None

    def code_kind(self, name: str) -> tuple[int, int] | None:
        return None

    def load_raw(self, name: str) -> tuple[str, Array]:
        file, stored = self._find(name)
        return file.read(stored)

    def _find(self, name: str) -> tuple[SafetensorsFile, str]:
        if name not in self._where:
            raise ConfigError(f"the model has no tensor {name}")
        return self._where[name]


def _text_model_name(stored: str) -> str | None:
    if stored.endswith(_NOT_PARAMETERS) or stored.startswith(_OTHER_TOWERS):
        return None
    for prefix, replacement in _PREFIXES:
        if stored.startswith(prefix):
            return replacement + stored.removeprefix(prefix)
    return stored


def assets_of_path(path: Path) -> dict[str, bytes]:
    """Text assets of a directory, a tokenizer.json, or a .gguf file. Raises ConfigError."""
    if path.is_file() and path.suffix.lower() == ".gguf":
        return GgufModel(path, path.stem).assets()
    directory = path.parent if path.is_file() else path
    file = path if path.is_file() else path / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(
            f"tokenizer: {directory.name} has no tokenizer.json. Save one with transformers "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...)) or give another with --tokenizer"
        )
    tokenizer = read_json(file) or {}
    config = read_json(directory / "tokenizer_config.json") or {}
    text_config = _text_config(tokenizer, config)
    assets = {
        "tokenizer": file.read_bytes(),
        "text_config": json.dumps(text_config, ensure_ascii=False).encode("utf-8"),
    }
    template = _chat_template(directory, config)
    if template is not None:
        assets["chat_template"] = template.encode("utf-8")
    return assets


def _text_config(tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    ids = _token_ids(tokenizer)
    result: dict[str, Any] = {
        "add_bos_token": bool(config.get("add_bos_token", False)),
        "add_eos_token": bool(config.get("add_eos_token", False)),
    }
    for key in _SPECIAL:
        value = config.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            result[key] = text
            result[f"{key}_id"] = ids.get(text)
    eos = result.get("eos_token_id")
    result["eos_token_ids"] = [] if eos is None else [eos]
    return result


def _token_ids(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    model = tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = dict(vocab) if isinstance(vocab, dict) else {}
    for token in tokenizer.get("added_tokens") or ():
        ids[token["content"]] = token["id"]
    return ids


def _chat_template(directory: Path, config: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template is None:
        template = (read_json(directory / "chat_template.json") or {}).get("chat_template")
    return template if isinstance(template, str) else None


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None when there is no file. Raises ConfigError for anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name} cannot be read as JSON") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} does not hold an object")
    return value
