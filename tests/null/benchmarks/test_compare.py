"""The comparison's arithmetic and encodings: what would make a wrong number look right."""

from __future__ import annotations

import argparse
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from benchmarks.compare import goodput, machine, perplexity, report
from benchmarks.compare.load import Load, loads, prefills
from benchmarks.compare.perplexity import compare
from benchmarks.compare.rounds import Result
from benchmarks.compare.settings import ENTRIES, Entry
from benchmarks.compare.weights import same_values, write_gguf
from xllm.testing.hf_export import bfloat16_bits

LOAD = Load(input_len=128, output_len=64, num_requests=8, concurrency=8)


def turn(number: int, speed: float, **more: Any) -> dict[str, Any]:
    base = {f"{p}_{name}_ms": 10.0 for p in ("p50", "p99") for name in ("ttft", "tpot")}
    base |= {"round": number, "output_throughput": speed, "completed": 8, "failed": 0}
    base |= {"total_input_tokens": 8 * 128, "total_output_tokens": 8 * 64}
    return base | {"strangers_cores": 0.0, "idle_engines_cores": 0.0} | more


def result(engine: str, speeds: list[float], weights: Any = "bf16", load: Load = LOAD, **more: Any) -> Result:
    turns = {load.name: [turn(i, s, **more) for i, s in enumerate(speeds)]} if speeds else {}
    entry = Entry(engine=engine, weights=weights, transport="http")
    return Result(entry=entry, turns=turns, problem="" if speeds else "not installed")


def test_the_ratio_is_paired_by_round_so_a_slow_moment_of_the_machine_cancels() -> None:
    ours, theirs = result("xllm", [200.0, 20.0, 220.0]), result("vllm", [100.0, 10.0, 110.0])
    assert report.ratio([ours, theirs], theirs, LOAD) == "2.00 (2.00–2.00)"


def test_the_ratio_is_against_the_same_weights_only() -> None:
    ours, theirs = result("xllm", [200.0], "q4_1"), result("vllm", [100.0], "bf16")
    assert report.ratio([ours, theirs], theirs, LOAD) == "–"


def test_a_missing_peer_makes_the_table_incomplete() -> None:
    told = report.warnings([result("xllm", [1.0, 1.0, 1.0]), result("llama.cpp", [])], 3)
    assert any(line.startswith("INCOMPLETE: 1 of 2") for line in told)
    assert any("llama.cpp" in line and "not installed" in line for line in told)


def test_what_was_left_out_on_purpose_is_not_called_missing() -> None:
    left, gone = result("vllm", [1.0]), result("llama.cpp", [])
    left.turns = {}
    assert [row[1] for row in report.rows([left, gone], LOAD, {})] == ["left out", "missing"]


@pytest.mark.parametrize(
    ("more", "word"),
    [
        ({"strangers_cores": 0.5}, "NOT QUIET"),
        ({"idle_engines_cores": 0.5}, "engines that were not measured"),
        ({"failed": 1}, "some requests failed"),
    ],
)
def test_what_spoils_a_number_is_told(more: dict[str, Any], word: str) -> None:
    told = report.warnings([result("xllm", [1.0, 1.0, 1.0], **more)], 3)
    assert [line for line in told if line.startswith(word)]


def test_engines_that_answered_with_fewer_tokens_are_named() -> None:
    short = result("vllm", [1.0], total_output_tokens=10)
    told = report.warnings([result("xllm", [1.0]), short], 3)
    assert any(line.startswith("output tokens differ") and "vllm bf16 10" in line for line in told)


def test_fewer_than_three_rounds_are_provisional() -> None:
    assert any("PROVISIONAL" in line for line in report.warnings([result("xllm", [1.0, 1.0])], 2))
    assert not report.warnings([result("xllm", [1.0, 1.0, 1.0])], 3)


def test_the_ceiling_adds_prefill_and_decode_time() -> None:
    # 128 tokens at 1280/s and 64 at 640/s are 0.2 s for 64 tokens: 320/s.
    ceilings = {"classes": {"bf16": {"prefill": {"8x128": 1280.0}, "decode": {"8": 640.0}}}}
    row = report.rows([result("xllm", [160.0])], LOAD, ceilings)[0]
    assert row[report.COLUMNS.index("of ceiling")] == "0.50"


def test_one_stream_is_measured_against_reading_the_weights_once_a_token() -> None:
    alone = Load(input_len=128, output_len=64, num_requests=8, concurrency=1)
    ceilings = {
        "peaks": {"read_gb_s": {"1": {"best": 20.0}, "2": {"best": 30.0}}},
        "classes": {"bf16": {"weight_bytes": 200_000_000}},
    }
    # 30 GB/s ÷ 0.2 GB = 150 tokens/s; 10 ms a token = 100.
    told = report.single_stream([result("xllm", [90.0], load=alone)], [alone, LOAD], ceilings)
    assert [line for line in told if "xllm bf16: 100 tokens/s of 150, 67%" in line]


def test_prefill_counts_prompt_tokens() -> None:
    load = prefills([(8, 128)])[0]
    assert (load.name, load.num_requests, load.output_len) == ("prefill 8 x 128", 32, 1)
    made = result("xllm", [1.0], load=load, input_throughput=1000.0)
    ceilings = {"classes": {"bf16": {"prefill": {"8x128": 2000.0}, "decode": {}}}}
    row = report.rows([made], load, ceilings)[0]
    assert row[1].startswith("1000.0")
    assert row[report.COLUMNS.index("of ceiling")] == "0.50"


def test_a_rate_counts_only_while_first_tokens_come_in_time() -> None:
    slow, fast = (Load(input_len=1, output_len=9, num_requests=9, rate=rate) for rate in (1.0, 2.0))
    late = result("xllm", [1.0], load=fast, p99_ttft_ms=5000.0)
    late.turns |= result("xllm", [1.0], load=slow).turns
    assert goodput.highest_rate(late, [slow, fast], 30) == 1.0
    assert goodput.highest_rate(late, [slow, fast], 5) is None


def test_rounds_repeat_for_every_engine_and_differ_from_each_other() -> None:
    assert LOAD.round(0) == LOAD.round(0)
    assert LOAD.round(0)[0] != LOAD.round(1)[0]
    assert [made.num_requests for made in loads([(1, 1)], [1, 32], [2.0], None, 3)] == [8, 96, 300]


def test_perplexity_compares_window_by_window() -> None:
    score = compare("prose", "q4_1", [2.1, 3.1], [2.0, 3.0], window=11)
    assert score.change == pytest.approx(np.exp(0.1) - 1)
    assert score.error == pytest.approx(0.0, abs=1e-9)
    assert score.num_tokens == 20


def test_kept_reference_losses_are_used_for_the_same_texts_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(_args: Any, _folder: Path, weights: str) -> dict[str, list[float]]:
        measured.append(weights)
        return {"prose": [float(len(measured))]}

    monkeypatch.setattr(perplexity, "measure", measure)
    monkeypatch.setattr(perplexity, "resolve", lambda _: SimpleNamespace(weights_digest=lambda: "digest"))
    monkeypatch.setattr(perplexity, "version", lambda _: "1")
    args = argparse.Namespace(model="m", tokens=10, window=5, reference_cache=tmp_path)
    first = perplexity.reference(args, tmp_path, {"prose": "a"})
    assert perplexity.reference(args, tmp_path, {"prose": "a"}) == first == {"prose": [1.0]}
    assert perplexity.reference(args, tmp_path, {"prose": "b"}) == {"prose": [2.0]}
    args.window = 6
    assert perplexity.reference(args, tmp_path, {"prose": "b"}) == {"prose": [3.0]}


def test_results_name_no_folder_of_the_machine(tmp_path: Path) -> None:
    text = f"--model {tmp_path}/weights/bf16 --out here --peers-dir {tmp_path} 3/4"
    places = {".peers": tmp_path, "RESULTS": Path("here")}
    told = machine.without_places(text, places)
    assert told == "--model .peers/weights/bf16 --out here --peers-dir .peers 3/4"
    assert machine.without_places(f"in {Path.home()}/.cache/x", {}) == "in ~/.cache/x"


def test_every_encoding_of_a_peer_has_one_of_ours_to_stand_against() -> None:
    ours = {(entry.weights, entry.transport) for entry in ENTRIES if entry.engine == "xllm"}
    assert {(entry.weights, entry.transport) for entry in ENTRIES} == ours


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -3.1415927], dtype=np.float32)
    expected = [0x3F80, 0x3F80, 0x3F82, 0xC049]
    assert bfloat16_bits(values).tolist() == expected
    assert struct.unpack(">f", bytes.fromhex("3f820000"))[0] == 1.015625


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    rng = np.random.default_rng(0)
    for name, shape in (
        ("token_embd.weight", (4, 64)),
        ("blk.0.attn_q.weight", (4, 64)),
        ("n.weight", (64,)),
    ):
        writer.add_tensor(name, rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("encoding", "bound"), [("bf16", 4e-3), ("q8_0", 5e-3), ("q4_1", 0.05), ("q4_0", 0.15)]
)
def test_an_encoding_keeps_metadata_and_values(
    source: Path, tmp_path: Path, encoding: str, bound: float
) -> None:
    target = tmp_path / f"{encoding}.gguf"
    write_gguf(source, target, encoding)
    reader = GGUFReader(target)
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert 0.0 < same_values(source, target) < bound
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    assert kinds["n.weight"] == GGMLQuantizationType.F32
    if encoding.startswith("q4"):
        assert kinds["token_embd.weight"] == GGMLQuantizationType.Q8_0


def test_encoding_twice_to_four_bits_changes_nothing(source: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once.gguf", tmp_path / "twice.gguf"
    write_gguf(source, once, "q4_1")
    write_gguf(once, twice, "q4_1")
    assert same_values(once, twice) < 1e-3
