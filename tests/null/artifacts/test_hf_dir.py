"""Hugging Face directories: configs, shards, tokenizer files, and damaged or hostile ones."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xllm.artifacts.hf_arch import arch_from_config
from xllm.artifacts.hf_dir import HfModel, assets_of_path
from xllm.artifacts.safetensors_file import SafetensorsFile
from xllm.artifacts.source import DummySource
from xllm.artifacts.write import write_hf_dir, write_safetensors
from xllm.errors import ConfigError
from xllm.testing.tiny_tokenizer import tiny_assets
from xllm.text import TextAssets

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": True,
    "eos_token_id": [1, 2],
    "bos_token_id": 1,
}


def arch(**changes: Any) -> Any:
    return arch_from_config({**LLAMA, **changes}, {})


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    source = DummySource(arch())
    tensors = {name: source.load_f32(name) for name in source.names()}
    write_hf_dir(tmp_path / "tiny", LLAMA, tensors, tiny_assets(300))
    return tmp_path / "tiny"


def test_a_written_directory_reads_back(directory: Path) -> None:
    model = HfModel(directory, "tiny")
    source, wanted = model.tensors(), DummySource(model.arch())
    assert source.names() == wanted.names()
    for name in wanted.names():
        assert source.shape(name) == wanted.shape(name)
        np.testing.assert_array_equal(source.load_f32(name), wanted.load_f32(name))
    assets = TextAssets.from_card_assets(model.assets())
    assert assets.template is not None
    assert assets.tokenizer.eos_token_ids == (1, 2)
    assert model.weights_digest().startswith("sampled-sha256:")
    assert model.generation_config() == {}


def test_our_files_and_the_librarys_are_interchangeable(tmp_path: Path) -> None:
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(3, np.float16)}
    write_safetensors(tmp_path / "ours", tensors)
    theirs = safetensors.numpy.load_file(tmp_path / "ours")
    safetensors.numpy.save_file(tensors, tmp_path / "theirs")
    ours = SafetensorsFile(tmp_path / "theirs")
    for name, values in tensors.items():
        np.testing.assert_array_equal(theirs[name], values)
        np.testing.assert_array_equal(ours.read(name)[1], values)


def test_bfloat16_is_its_bits_and_widens_exactly(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 3.140625, 1e30], np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    config = {**LLAMA, "tie_word_embeddings": False}
    write_hf_dir(tmp_path, config, {"x": bits})
    source = HfModel(tmp_path, "m").tensors()
    assert source.load_raw("x")[0] == "bfloat16"
    np.testing.assert_array_equal(source.load_f32("x").view(np.uint32), bits.astype(np.uint32) << 16)


def test_shards_are_read_as_one_model(directory: Path) -> None:
    whole = SafetensorsFile(directory / "model.safetensors")
    names = sorted(whole.tensors)
    index = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in sorted(set(index.values())):
        write_safetensors(directory / part, {n: whole.read(n)[1] for n in names if index[n] == part})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (directory / "model.safetensors").unlink()
    assert HfModel(directory, "m").tensors().names() == names
    (directory / "part-1.safetensors").unlink()
    with pytest.raises(ConfigError, match="weight files"):
        HfModel(directory, "m").tensors()


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "a/b.safetensors"])
def test_a_shard_outside_the_directory_is_refused(directory: Path, shard: str) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    with pytest.raises(ConfigError, match="plain file name"):
        HfModel(directory, "m").tensors()


def test_pickled_weights_are_not_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(ConfigError, match="never read"):
        HfModel(tmp_path, "m").tensors()


def test_without_tokenizer_json_the_error_says_what_to_do(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="save_pretrained"):
        HfModel(directory, "m").assets()


def test_the_templates_places_are_searched(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    assert "chat_template" not in assets_of_path(directory)
    config = {"eos_token": {"content": "<|im_end|>"}, "chat_template": [{"name": "default", "template": "D"}]}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    assets = assets_of_path(directory)
    assert assets["chat_template"] == b"D"
    assert json.loads(assets["text_config"])["eos_token_ids"] == [2]
    assert assets_of_path(directory / "tokenizer.json")["tokenizer"] == assets["tokenizer"]


def test_text_models_inside_wrappers_lose_their_prefix(tmp_path: Path) -> None:
    one = np.ones(1, np.float32)
    stored = ["language_model.model.norm.weight", "vision_tower.x", "multi_modal_projector.y"]
    config = {"model_type": "gemma3", "text_config": {**LLAMA, "model_type": "gemma3_text"}}
    write_hf_dir(tmp_path, config, dict.fromkeys(stored, one))
    model = HfModel(tmp_path, "m")
    assert model.tensors().names() == ["model.norm.weight"]
    assert model.arch().name == "gemma3"


# Configurations --------------------------------------------------------------------------------


def test_generation_config_wins_for_eos_and_gives_sampling_defaults(directory: Path) -> None:
    (directory / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 7, "temperature": 0.6, "top_k": 20, "do_sample": True})
    )
    model = HfModel(directory, "m")
    assert model.arch().eos_token_ids == (7,)
    assert model.generation_config() == {"temperature": 0.6, "top_k": 20}


def test_windows_follow_each_familys_rule() -> None:
    assert arch(model_type="mistral", sliding_window=8).layer_windows == (8, 8)
    assert arch(model_type="mistral", sliding_window=None).layer_windows == (None, None)
    assert arch(model_type="qwen2", sliding_window=8).layer_windows == (None, None)
    qwen = arch(model_type="qwen2", sliding_window=8, use_sliding_window=True, max_window_layers=1)
    assert qwen.layer_windows == (None, 8)
    gemma = arch(model_type="gemma3_text", sliding_window=8, num_hidden_layers=6)
    assert gemma.layer_windows == (8, 8, 8, 8, 8, None)
    types = ["full_attention", "sliding_attention"]
    assert arch(model_type="gemma3_text", sliding_window=8, layer_types=types).layer_windows == (None, 8)


def test_both_spellings_of_rope_settings_are_read() -> None:
    new = {"rope_type": "llama3", "rope_theta": 9000.0, "factor": 8.0, "low_freq_factor": 1.0}
    new |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    got = arch(rope_parameters=new, rope_theta=None)
    assert got.rope_theta == 9000.0
    assert got.rope_scaling.original_max_position == 32
    old = arch(rope_scaling={"type": "yarn", "factor": 4.0})
    assert (old.rope_theta, old.rope_scaling.kind, old.rope_scaling.original_max_position) == (
        5000.0,
        "yarn",
        64,
    )
    gemma = arch(
        model_type="gemma3_text",
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    assert (gemma.rope_theta, gemma.local_rope_theta, gemma.rope_scaling.factor) == (1e6, 1e4, 8.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "rwkv"}, "rwkv"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"hidden_act": "relu"}, "relu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"quantization_config": {}}, "quantized"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        arch(**changes)


# Hostile safetensors ---------------------------------------------------------------------------


def packed(header: Any, body: bytes = bytes(64), size: int | None = None) -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if size is None else size) + head + body


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE = {
    "empty": b"",
    "three bytes": b"abc",
    "2^63 header": packed({}, size=1 << 63),
    "header past the end": packed({}, size=1000),
    "not json": packed(b"{nope"),
    "not an object": packed([1]),
    "deep json": packed(b"[" * 100_000 + b"]" * 100_000),
    "repeated name": packed(b'{"a":{},"a":{}}'),
    "unknown type": packed({"a": entry("OBJECT")}),
    "unhashable type": packed({"a": entry([])}),
    "entry is a list": packed({"a": [1]}),
    "negative shape": packed({"a": entry(shape=[-2])}),
    "float shape": packed({"a": entry(shape=[2.0])}),
    "boolean shape": packed({"a": entry(shape=[True, 2])}),
    "huge shape": packed({"a": entry(shape=[1 << 62, 1 << 62])}),
    "many dimensions": packed({"a": entry(shape=[1] * 9 + [2])}),
    "offsets past the end": packed({"a": entry(offsets=[64, 72])}),
    "offsets reversed": packed({"a": entry(offsets=[8, 0])}),
    "offsets too short": packed({"a": entry(offsets=[0, 4])}),
    "three offsets": packed({"a": entry(offsets=[0, 8, 8])}),
    "overlap": packed({"a": entry(), "b": entry(offsets=[4, 12])}),
    "same place": packed({"a": entry(), "b": entry()}),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_header_is_a_config_error_naming_the_file(tmp_path: Path, case: str) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(HOSTILE[case])
    with pytest.raises(ConfigError, match=r"bad\.safetensors"):
        SafetensorsFile(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(data=st.data())
def test_cut_or_changed_files_load_or_are_refused_and_nothing_else(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / "m.safetensors"
    write_safetensors(path, {"a": np.ones((4, 4), np.float32), "b": np.ones(4, np.float32)})
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.sampled_from([1, 8, 60, len(whole) - 1, len(whole)]))])
    try:
        file = SafetensorsFile(path)
        read = [file.read(name)[1] for name in file.tensors]
    except ConfigError:
        return
    assert sum(values.nbytes for values in read) <= len(whole)
