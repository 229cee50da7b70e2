"""Layers, conversions and refusals of the configuration loader."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from xllm.config import EngineConfig, FrontConfig, ServerConfig
from xllm.config.aliases import ALIASES, NEGATED
from xllm.config.fields import convert, settings
from xllm.config.flags import add_flags, dashed
from xllm.config.load import from_keywords, load
from xllm.errors import ConfigError

SECTIONS = (EngineConfig, FrontConfig, ServerConfig)


def parsed(*argv: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser, *SECTIONS)
    return vars(parser.parse_args(dashed(argv)))


def test_without_any_layer_the_defaults_stand() -> None:
    assert load(*SECTIONS).build(EngineConfig) == EngineConfig()


def test_each_layer_overrides_the_one_below_it(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("max-num-seqs: 1\nport: 1\nhost: file\nseed: 1\n")
    loaded = load(
        *SECTIONS,
        file=file,
        env={"XLLM_MAX_NUM_SEQS": "2", "XLLM_PORT": "2", "XLLM_HOST": "env"},
        cli={"max_num_seqs": "3", "port": "3"},
        keywords={"max_num_seqs": 4},
    )
    assert loaded.build(EngineConfig).scheduler.max_num_seqs == 4
    assert loaded.build(ServerConfig).port == 3
    assert loaded.build(ServerConfig).host == "env"
    assert loaded.build(EngineConfig).model.seed == 1
    assert loaded.sources == {
        "max_num_seqs": "keyword",
        "port": "command line",
        "host": "environment",
        "seed": "file a.yaml",
    }


def test_toml_files_are_read_too(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('max_num_seqs = 7\nserved_model_name = ["a", "b"]\n')
    config = load(EngineConfig, file=file).build(EngineConfig)
    assert config.scheduler.max_num_seqs == 7
    assert config.model.served_model_name == ("a", "b")


@pytest.mark.parametrize(
    "text",
    ["- a list\n", "1: 2\n", "a: [\n", "x: !!python/object/apply:os.system ['true']\n"],
    ids=["list", "number-key", "broken", "tag"],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError):
        load(EngineConfig, file=file)


def test_a_missing_file_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        load(EngineConfig, file=tmp_path / "nothing.yaml")


@pytest.mark.parametrize("layer", ["cli", "keywords"])
def test_an_unknown_key_is_refused_with_the_nearest_known_one(layer: str) -> None:
    layers: Any = {layer: {"max_num_seq": 3}}
    with pytest.raises(ConfigError, match="did you mean max_num_seqs"):
        load(EngineConfig, **layers)


def test_an_unknown_variable_is_noted_and_not_fatal() -> None:
    loaded = load(EngineConfig, ServerConfig, env={"XLLM_MAX_NUM_SEQ": "3", "XLLM_PORT": "tcp://10.0.0.1:80"})
    assert loaded.values == {}
    assert "did you mean XLLM_MAX_NUM_SEQS" in loaded.notes[0]
    assert "orchestrator" in loaded.notes[1]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_num_seqs", "12", 12),
        ("max_num_batched_tokens", "1_024", 1024),
        ("kv_cache_memory_bytes", "2GiB", 2 * 2**30),
        ("kv_cache_memory_bytes", "1.5 GB", 1_500_000_000),
        ("kv_cache_memory_bytes", "4096", 4096),
        ("num_threads", "none", None),
        ("enable_prefix_caching", "off", False),
        ("enable_prefix_caching", "1", True),
        ("header_timeout_s", "2.5", 2.5),
        ("dtype", "bfloat16", "bfloat16"),
        ("api_key", "a,b", ("a", "b")),
        ("api_key", ["a", "b,c"], ("a", "b", "c")),
        ("api_key", "", ()),
    ],
)
def test_text_becomes_the_annotated_type(name: str, text: Any, value: Any) -> None:
    assert convert(settings(*SECTIONS)[name], text, "test") == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_num_seqs", "many"),
        ("max_num_seqs", "1.5"),
        ("max_num_seqs", 1.5),
        ("max_num_seqs", True),
        ("max_num_seqs", None),
        ("max_num_seqs", "2GiB"),
        ("enable_prefix_caching", "maybe"),
        ("header_timeout_s", "nan"),
        ("header_timeout_s", "soon"),
        ("dtype", "float8"),
        ("host", ["a"]),
    ],
)
def test_a_value_of_the_wrong_kind_names_field_and_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name):
        convert(settings(*SECTIONS)[name], value, "test")


def test_a_wrong_choice_suggests_a_right_one() -> None:
    with pytest.raises(ConfigError, match="did you mean bfloat16"):
        from_keywords(EngineConfig, {"dtype": "bfloat"})


@pytest.mark.parametrize(
    "argv",
    [
        ("--max-num-seqs", "9"),
        ("--max_num_seqs=9",),
        ("--max-seqs-per-batch", "9"),
        ("--max_running_requests=9",),
    ],
)
def test_dashes_underscores_and_aliases_mean_the_same_flag(argv: tuple[str, ...]) -> None:
    assert load(*SECTIONS, cli=parsed(*argv)).build(EngineConfig).scheduler.max_num_seqs == 9


@pytest.mark.parametrize("flag", ["--no-enable-prefix-caching", "--disable-radix-cache"])
def test_a_switch_can_be_turned_off(flag: str) -> None:
    assert not load(*SECTIONS, cli=parsed(flag)).build(EngineConfig).cache.enable_prefix_caching


def test_negations_work_in_keywords_and_files() -> None:
    assert not from_keywords(EngineConfig, {"disable_radix_cache": True}).cache.enable_prefix_caching
    assert from_keywords(EngineConfig, {"no_enable_prefix_caching": False}).cache.enable_prefix_caching


def test_values_after_a_double_dash_keep_their_underscores() -> None:
    assert dashed(["--a_b=c_d", "--", "--x_y"]) == ["--a-b=c_d", "--", "--x_y"]


def test_aliases_point_at_fields_and_hide_none() -> None:
    known = settings(*SECTIONS)
    assert set(ALIASES.values()) | set(NEGATED.values()) <= set(known)
    assert not (set(ALIASES) | set(NEGATED)) & set(known)
