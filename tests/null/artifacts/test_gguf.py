"""GGUF files: every supported type, Hugging Face's layout on the outside, hostile heads."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Quant
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.null.artifacts.gguf_for_tests import tiny_llama, tokenizer_keys, write_gguf
from xllm.arch import RopeScaling
from xllm.artifacts.gguf_arch import llama3_factors
from xllm.artifacts.gguf_file import SUPPORTED_TYPES, GgufModel
from xllm.artifacts.gguf_header import read_header
from xllm.artifacts.shapes import parameter_shapes
from xllm.errors import ConfigError
from xllm.text import TextAssets

MAX_ERROR = {"Q4": 0.25, "Q5": 0.13, "Q8": 0.02, "F1": 1e-3, "BF": 1e-2, "F3": 0.0}
UP = "model.layers.0.mlp.up_proj.weight"


def model(path: Path) -> GgufModel:
    return GgufModel(path, "tiny")


@pytest.mark.parametrize("kind", sorted(t for t in SUPPORTED_TYPES if not t.name.endswith("_K")))
def test_stored_values_come_back_within_the_types_precision(tmp_path: Path, kind: Quant) -> None:
    tensors = tiny_llama()
    values = tensors["blk.0.ffn_up.weight"][0]
    tensors["blk.0.ffn_up.weight"] = (values, kind)
    source = model(write_gguf(tmp_path / "m.gguf", tensors)).tensors()
    loaded = source.load_f32(UP)
    assert loaded.dtype == np.float32
    assert source.shape(UP) == loaded.shape == values.shape
    assert np.abs(loaded - values).max() <= MAX_ERROR[kind.name[:2]] * np.abs(values).max()
    dtype, raw = source.load_raw(UP)
    stored = {Quant.F16: ("float16", "float16"), Quant.BF16: ("bfloat16", "uint16")}
    assert (dtype, raw.dtype.name) == stored.get(kind, ("float32", "float32"))


@pytest.mark.parametrize("kind", sorted(t for t in SUPPORTED_TYPES if t.name.endswith("_K")))
def test_k_quants_are_found_and_dequantised_like_the_library_does(tmp_path: Path, kind: Quant) -> None:
    length, size = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 60, (32, 2 * size), dtype=np.uint8)
    tensors = {"token_embd.weight": (blocks, kind)}
    path = write_gguf(tmp_path / "m.gguf", tensors, embedding_length=2 * length)
    loaded = model(path).tensors().load_f32("model.embed_tokens.weight")
    assert loaded.shape == (32, 2 * length)
    theirs = gguf.dequantize(gguf.GGUFReader(path).tensors[0].data, kind)
    assert np.abs(loaded).max() > 0
    np.testing.assert_array_equal(loaded, theirs)


def test_names_and_shapes_are_hugging_faces(tmp_path: Path) -> None:
    m = model(write_gguf(tmp_path / "m.gguf", tiny_llama()))
    arch = m.arch()
    assert (arch.name, arch.head_dim, arch.num_kv_heads, arch.tie_word_embeddings) == ("llama", 16, 2, True)
    assert (arch.vocab_size, arch.rms_norm_eps) == (32, 1e-5)
    source = m.tensors()
    assert {n: source.shape(n) for n in source.names()} == parameter_shapes(arch)
    with pytest.raises(ConfigError, match="no tensor"):
        source.load_f32("model.nothing")


def test_llama_rotary_rows_go_back_to_halves(tmp_path: Path) -> None:
    tensors = tiny_llama()
    # Row r of each 16-row head holds its own number; the converter interleaves the two halves.
    rows = np.repeat(np.arange(64, dtype=np.float32)[:, None], 64, axis=1)
    interleaved = rows.reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    tensors["blk.0.attn_q.weight"] = (np.ascontiguousarray(interleaved), Quant.F32)
    path = write_gguf(tmp_path / "m.gguf", tensors)
    np.testing.assert_array_equal(
        model(path).tensors().load_f32("model.layers.0.self_attn.q_proj.weight"), rows
    )


def test_qwen_rows_stay_and_its_biases_are_found(tmp_path: Path) -> None:
    tensors = tiny_llama()
    bias = np.arange(64, dtype=np.float32)
    tensors["blk.0.attn_q.bias"] = (bias, Quant.F32)
    m = model(write_gguf(tmp_path / "m.gguf", tensors, "qwen2"))
    assert m.arch().attention_bias
    source = m.tensors()
    np.testing.assert_array_equal(
        source.load_f32("model.layers.0.self_attn.q_proj.weight"), tensors["blk.0.attn_q.weight"][0]
    )
    np.testing.assert_array_equal(source.load_f32("model.layers.0.self_attn.q_proj.bias"), bias)


def test_gemma_norms_lose_the_one_and_windows_follow_the_pattern(tmp_path: Path) -> None:
    tensors = tiny_llama()
    numbers = {"block_count": 7, "attention.sliding_window": 16}
    m = model(write_gguf(tmp_path / "m.gguf", tensors, "gemma3", **numbers))
    arch = m.arch()
    assert arch.layer_windows == (16, 16, 16, 16, 16, None, 16)
    assert (arch.local_rope_theta, arch.rope_theta) == (10_000.0, 1_000_000.0)
    stored = tensors["blk.0.ffn_norm.weight"][0]
    loaded = m.tensors().load_f32("model.layers.0.pre_feedforward_layernorm.weight")
    np.testing.assert_array_equal(loaded, stored - 1)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequency_factors_become_rope_scaling(tmp_path: Path, factor: float) -> None:
    wanted = RopeScaling(
        kind="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )
    tensors = tiny_llama()
    tensors["rope_freqs.weight"] = (llama3_factors(wanted, 500_000.0, 16), Quant.F32)
    m = model(write_gguf(tmp_path / "m.gguf", tensors, **{"rope.freq_base": 500_000.0}))
    assert m.arch().rope_scaling == wanted
    assert "rope_freqs.weight" not in m.tensors().names()
    tensors["rope_freqs.weight"] = (np.linspace(1, 3, 8, dtype=np.float32), Quant.F32)
    other = write_gguf(tmp_path / "other.gguf", tensors, **{"rope.freq_base": 500_000.0})
    with pytest.raises(ConfigError, match="rope_freqs"):
        model(other).arch()


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_rope_scaling_metadata_is_read(tmp_path: Path, kind: str) -> None:
    numbers = {"rope.scaling.type": kind, "rope.scaling.factor": 4.0}
    numbers["rope.scaling.original_context_length"] = 32
    scaling = model(write_gguf(tmp_path / "m.gguf", tiny_llama(), **numbers)).arch().rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == (kind, 4.0)
    assert scaling.original_max_position == (32 if kind == "yarn" else 0)


def test_tokenizer_and_template_come_from_the_file(tmp_path: Path) -> None:
    m = model(write_gguf(tmp_path / "m.gguf", tiny_llama(), extra=tokenizer_keys()))
    assets = TextAssets.from_card_assets(m.assets())
    text = "The <|im_end|> rest, 123"
    assert assets.tokenizer.decode(assets.tokenizer.encode(text), False) == text
    assert assets.tokenizer.eos_token_ids == m.arch().eos_token_ids == (2, 0)
    assert assets.template is not None
    assert json.loads(m.assets()["text_config"])["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tokenizer.ggml.pre", "brand-new", "pre-tokenizer"),
        ("tokenizer.ggml.model", "rwkv", "tokenizer"),
        ("tokenizer.ggml.token_type", [1], "per token"),
        ("tokenizer.ggml.merges", ["ab"], "merges"),
    ],
)
def test_a_tokenizer_that_cannot_be_built_is_refused_by_name(
    tmp_path: Path, key: str, value: object, words: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_llama(), extra={**tokenizer_keys(), key: value})
    with pytest.raises(ConfigError, match=words):
        model(path).assets()


def test_unknown_architectures_and_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rwkv"):
        model(write_gguf(tmp_path / "a.gguf", tiny_llama(), "rwkv")).arch()
    tensors = tiny_llama() | {"blk.0.ssm.weight": tiny_llama()["output_norm.weight"]}
    with pytest.raises(ConfigError, match="ssm"):
        model(write_gguf(tmp_path / "b.gguf", tensors)).tensors()


def test_the_digest_tells_two_trainings_apart(tmp_path: Path) -> None:
    paths = [write_gguf(tmp_path / f"{seed}.gguf", tiny_llama(seed)) for seed in (0, 1)]
    paths[0].rename(tmp_path / "m.gguf")
    first = model(tmp_path / "m.gguf").weights_digest()
    paths[1].replace(tmp_path / "m.gguf")
    second = model(tmp_path / "m.gguf").weights_digest()
    assert first.startswith("sampled-sha256:")
    assert first != second


# Hostile heads -------------------------------------------------------------------------------

MAGIC = b"GGUF" + struct.pack("<I", 3)


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def tensor(dims: list[int], kind: int, offset: int) -> bytes:
    head = struct.pack("<Q", 1) + b"t" + struct.pack("<I", len(dims))
    return head + b"".join(struct.pack("<Q", d) for d in dims) + struct.pack("<IQ", kind, offset)


HOSTILE = {
    "other file": b"PK\x03\x04" + bytes(64),
    "magic only": b"GGUF",
    "big endian": b"GGUF" + struct.pack(">I", 3) + bytes(64),
    "version 99": b"GGUF" + struct.pack("<IQQ", 99, 0, 0),
    "2^63 tensors": MAGIC + struct.pack("<QQ", 1 << 63, 0),
    "2^63 keys": MAGIC + struct.pack("<QQ", 0, 1 << 63),
    "giant string": MAGIC + struct.pack("<QQQ", 0, 1, 1 << 62),
    "string past the end": MAGIC + struct.pack("<QQQ", 0, 1, 1000) + b"x",
    "giant array": MAGIC + struct.pack("<QQ", 0, 1) + key(b"k", 9, struct.pack("<IQ", 4, 1 << 60)),
    "array past the end": MAGIC + struct.pack("<QQ", 0, 1) + key(b"k", 9, struct.pack("<IQ", 4, 1 << 20)),
    "nested array": MAGIC + struct.pack("<QQ", 0, 1) + key(b"k", 9, struct.pack("<IQ", 9, 1)),
    "unknown type": MAGIC + struct.pack("<QQ", 0, 1) + key(b"k", 77, b""),
    "bad utf-8": MAGIC + struct.pack("<QQ", 0, 1) + key(b"\xff\xfe", 4, bytes(4)),
    "repeated key": MAGIC + struct.pack("<QQ", 0, 2) + key(b"k", 4, bytes(4)) * 2,
    "alignment 2^31": MAGIC
    + struct.pack("<QQ", 0, 1)
    + key(b"general.alignment", 4, struct.pack("<I", 1 << 31)),
    "alignment 0": MAGIC + struct.pack("<QQ", 0, 1) + key(b"general.alignment", 4, bytes(4)),
    "2^32-1 dimensions": MAGIC + struct.pack("<QQQ", 1, 0, 1) + b"t" + struct.pack("<I", 0xFFFFFFFF),
    "tensor past the end": MAGIC + struct.pack("<QQ", 1, 0) + tensor([8], 0, 1 << 40) + bytes(256),
    "product overflows": MAGIC + struct.pack("<QQ", 1, 0) + tensor([1 << 62, 4], 0, 0) + bytes(256),
    "unknown tensor type": MAGIC + struct.pack("<QQ", 1, 0) + tensor([8], 12345, 0) + bytes(256),
    "misaligned": MAGIC + struct.pack("<QQ", 1, 0) + tensor([8], 0, 1) + bytes(256),
    "partial block": MAGIC + struct.pack("<QQ", 1, 0) + tensor([31], 2, 0) + bytes(256),
    "empty tensor": MAGIC + struct.pack("<QQ", 1, 0) + tensor([0], 0, 0) + bytes(256),
    "repeated tensor": MAGIC + struct.pack("<QQ", 2, 0) + tensor([8], 0, 0) * 2 + bytes(256),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_head_is_a_config_error_naming_the_file(tmp_path: Path, case: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(ConfigError, match=r"bad\.gguf"):
        model(path).arch()


def test_an_empty_or_missing_file_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").touch()
    for name in ("bad.gguf", "none.gguf"):
        with pytest.raises(ConfigError, match=name):
            model(tmp_path / name).arch()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_cut_or_changed_files_load_or_are_refused_and_nothing_else(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "whole.gguf"
    if not path.exists():
        write_gguf(path, {"token_embd.weight": tiny_llama()["token_embd.weight"]})
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, 400))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.sampled_from([50, 200, 400, len(whole) - 1, len(whole)]))])
    try:
        header = read_header(cut, path)
    except ConfigError:
        return
    for info in header.tensors.values():
        assert info.start + info.num_bytes <= len(cut)
