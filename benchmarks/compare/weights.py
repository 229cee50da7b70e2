"""One set of float32 weights, dequantised once from the pinned GGUF, in every encoding that is compared.

    python -m benchmarks.compare.weights --model smollm2 --out .peers/weights

bf16/ (Hugging Face directory), bf16.gguf, q8_0.gguf, q4_1.gguf and q4_0.gguf. In four bits the
embedding, which is the head as well, keeps 8 bits, as llama.cpp's own quantiser leaves it. Norms and
biases stay float32.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Quant
from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType, ReaderField
from gguf.quants import dequantize, quantize

from xllm.artifacts import resolve
from xllm.testing.hf_export import export_hf

ENCODER = "4"
"""Part of the manifest: files of an older encoder are made again."""

GGUF_TYPES: Mapping[str, tuple[Quant, Quant, LlamaFileType]] = {
    # matrices, embedding and head, the file's own name for the mixture
    "bf16": (Quant.BF16, Quant.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Quant.Q8_0, Quant.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_1": (Quant.Q4_1, Quant.Q8_0, LlamaFileType.MOSTLY_Q4_1),
    "q4_0": (Quant.Q4_0, Quant.Q8_0, LlamaFileType.MOSTLY_Q4_0),
}
_WIDE = ("token_embd.weight", "output.weight")
_WRITTEN_BY_WRITER = ("general.architecture", "general.file_type", "general.quantization_version")


def encode(model: str, out: Path) -> Path:
    """Make what is missing; the folder with all encodings of `model`. Raises ConfigError (no model)."""
    source = resolve(model)
    folder = out / source.model_id
    manifest = {"source": source.weights_digest(), "encoder": ENCODER}
    path = folder / "manifest.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) == manifest:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    export_hf(source, folder / "bf16", dtype="bfloat16")
    for name in GGUF_TYPES:
        write_gguf(source.path, folder / f"{name}.gguf", name)
    # Last: its presence says that all the others are whole.
    path.write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def location(folder: Path, weights: str, *, gguf: bool) -> Path:
    """Where an encoding lies: peers that read GGUF get the file, the others the directory (bf16 only)."""
    return folder / f"{weights}.gguf" if gguf else folder / weights


def write_gguf(source: Path, target: Path, encoding: str) -> None:
    matrix, wide, file_type = GGUF_TYPES[encoding]
    reader = GGUFReader(source)
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(partial, str(reader.fields["general.architecture"].contents()))
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in _WRITTEN_BY_WRITER:
            _copy(writer, field)
    for tensor in reader.tensors:
        values = np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        kind = Quant.F32 if values.ndim == 1 else wide if tensor.name in _WIDE else matrix
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, target)


def _copy(writer: GGUFWriter, field: ReaderField) -> None:
    kind = field.types[0]
    writer.add_key_value(
        field.name, field.contents(), kind, field.types[-1] if kind is GGUFValueType.ARRAY else None
    )


def bytes_per_token(folder: Path, weights: str) -> int:
    """Weight bytes that one decode step reads: all matrices once, of the embedding only if it is the head."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(location(folder, weights, gguf=True)).tensors}
    unread = {"token_embd.weight"} if "output.weight" in tensors else set()
    return sum(int(tensor.n_bytes) for name, tensor in tensors.items() if name not in unread)


def same_values(first: Path, second: Path) -> float:
    """Largest difference between two GGUF files of one model, relative to each tensor's largest value."""
    worst = 0.0
    others = {tensor.name: tensor for tensor in GGUFReader(second).tensors}
    for tensor in GGUFReader(first).tensors:
        a, b = _float32(tensor), _float32(others[tensor.name])
        worst = max(worst, float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-30)))
    return worst


def _float32(tensor: object) -> npt.NDArray[np.float32]:
    return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=Path(".peers/weights"))
    args = parser.parse_args()
    folder = encode(args.model, args.out)
    source = resolve(args.model).path
    for name in GGUF_TYPES:
        path = folder / f"{name}.gguf"
        size, off = path.stat().st_size / 1e6, same_values(source, path)
        print(f"{path}: {size:.1f} MB, off by {off:.2e} of the largest value")
    print(f"{folder / 'bf16'}: Hugging Face directory, bfloat16")


if __name__ == "__main__":
    main()
