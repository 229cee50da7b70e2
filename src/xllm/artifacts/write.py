"""Writes a Hugging Face directory: for tests and for turning one format into another.

Plain safetensors and JSON; no sharding, no code, no network.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xllm.artifacts.source import Array

_DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


def write_safetensors(path: Path, tensors: Mapping[str, Array]) -> None:
    """One file. float32 and float16 as they are; uint16 arrays are bfloat16 bits. Others: ValueError."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, values in tensors.items():
        dtype = _DTYPES.get(values.dtype.name)
        if dtype is None:
            raise ValueError(f"{name} has dtype {values.dtype.name}")
        end = offset + values.nbytes
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode("utf-8")
    # Data starts at a multiple of 8, so that mapped tensors are aligned.
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        for values in tensors.values():
            file.write(np.ascontiguousarray(values).tobytes())


def write_hf_dir(
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Array],
    assets: Mapping[str, bytes] | None = None,
) -> None:
    """config.json, model.safetensors and, from `assets`, the tokenizer files. Creates the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(config), indent=2), encoding="utf-8")
    write_safetensors(directory / "model.safetensors", tensors)
    if assets is None:
        return
    (directory / "tokenizer.json").write_bytes(assets["tokenizer"])
    text = json.loads(assets.get("text_config", b"{}"))
    plain = {k: v for k, v in text.items() if k.endswith("_token") and v is not None}
    (directory / "tokenizer_config.json").write_text(json.dumps(plain), encoding="utf-8")
    if "chat_template" in assets:
        (directory / "chat_template.jinja").write_bytes(assets["chat_template"])
