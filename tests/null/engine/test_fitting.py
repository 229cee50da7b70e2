"""Memory plans: what is counted, who gets the rest, and that what a refusal names would really start."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from xllm.config.load import from_keywords
from xllm.config.schema import EngineConfig, SchedulerConfig
from xllm.engine.fitting import Demand, Part, Room, fit
from xllm.engine.platform.room import Facts, available_bytes, measure_room
from xllm.errors import ConfigError

MIB = 1 << 20
GIB = 1 << 30
PAGE = MIB


def demand(config: EngineConfig, max_model_len: int) -> Demand:
    """Weights of 400 MiB, a quarter of it in four bits; an arena of a MiB for 8 rows; pages of a MiB."""
    weights = {"w8g32": 200, "w4g32": 100}.get(config.model.quantize, 400) * MIB
    needed = -(-max_model_len // 64)
    return Demand(
        shared=(Part("weights", weights, "mapped"),),
        own=(),
        working=(Part("arena", config.scheduler.max_num_batched_tokens * MIB // 8, "rows"),),
        loading=(Part("packing", weights, "beside"),),
        loads_in_turn=True,
        page_bytes=PAGE // 2 if config.cache.kv_cache_dtype == "int8" else PAGE,
        num_needed_pages=needed,
        num_useful_pages=needed * config.scheduler.max_num_seqs,
    )


def plan(room: int, max_model_len: int = 1024, before: int | None = None, **settings: object):
    return fit(configured(**settings), max_model_len, Room(room, "in a test"), demand, before)


def configured(**settings: object) -> EngineConfig:
    return from_keywords(EngineConfig, settings)


@pytest.mark.parametrize("gib", [1, 2, 4])
@pytest.mark.parametrize("engines", [1, 2, 3])
def test_what_is_planned_fits_and_kv_gets_all_that_is_left(gib: int, engines: int) -> None:
    made = plan(gib * GIB, num_local_instances=engines)
    assert made.fits
    assert made.total_bytes <= made.peak_bytes <= made.limit_bytes < gib * GIB
    assert made.total_bytes == sum(part.num_bytes for part in made.parts)
    # Twice the page of every engine would be too much, or there is nothing more to use.
    more = made.total_bytes + engines * PAGE
    assert more > made.limit_bytes or made.num_pages == 16 * 64


def test_the_share_grows_with_the_room_without_a_cap() -> None:
    assert plan(100 * GIB, 65536).num_pages == 64 * 1024
    assert plan(20 * GIB, 65536).num_pages > 2 * plan(10 * GIB, 65536).num_pages - 600


def test_asked_values_win_in_order_and_pages_that_are_there_are_kept() -> None:
    assert plan(4 * GIB, num_pages=40, kv_cache_memory_bytes=100 * MIB).num_pages == 40
    assert plan(4 * GIB, kv_cache_memory_bytes=100 * MIB).num_pages == 100
    assert plan(4 * GIB, before=77).num_pages == 77
    assert plan(4 * GIB, before=77, num_pages=40).num_pages == 40


def test_packing_is_counted_once_since_it_goes_in_turn() -> None:
    one, two = plan(4 * GIB), plan(4 * GIB, num_local_instances=2)
    assert one.starting_bytes == two.starting_bytes == 800 * MIB
    with pytest.raises(ConfigError, match="packing, at start +400 MiB  beside"):
        plan(800 * MIB, 256)


FLAGS: Mapping[str, tuple[str, type]] = {
    "--num-pages": ("num_pages", int),
    "--max-model-len": ("", int),
    "--kv-cache-dtype": ("kv_cache_dtype", str),
    "--quantize": ("quantize", str),
    "--max-num-batched-tokens": ("max_num_batched_tokens", int),
    "--instances": ("num_local_instances", int),
}


@pytest.mark.parametrize(
    ("room_mib", "length", "settings"),
    [
        (1024, 65536, {}),
        (700, 1024, {}),
        (900, 1024, {"max_num_batched_tokens": 4096}),
        (2048, 1024, {"num_pages": 5000}),
        (2048, 1024, {"kv_cache_memory_bytes": 3 * MIB}),
        (900, 1024, {"num_local_instances": 8}),
    ],
)
def test_a_refusal_shows_the_table_and_what_it_names_starts(
    room_mib: int, length: int, settings: dict[str, object]
) -> None:
    with pytest.raises(ConfigError) as refused:
        plan(room_mib * MIB, length, **settings)
    text = refused.value.message
    for name in ("allowed", "left alone", "weights", "arena", "KV cache", "in all"):
        assert re.search(rf"^ +{name}.* +\d+ MiB  ", text, re.MULTILINE), (name, text)
    named = re.findall(r"(--[a-z-]+) (\S+?)(?:;|$)", text.rpartition("fits with: ")[2])
    assert named, text
    for flag, value in named:
        name, kind = FLAGS[flag]
        asked = kind(value.removeprefix("mixed:"))
        changed = {**settings, name: asked} if name else settings
        if flag == "--num-pages":
            changed.pop("kv_cache_memory_bytes", None)
        assert plan(room_mib * MIB, asked if not name else length, **changed).fits


def test_a_length_that_is_named_is_the_largest() -> None:
    with pytest.raises(ConfigError) as refused:
        plan(1024 * MIB, 65536)
    found = re.search(r"--max-model-len (\d+)", refused.value.message)
    assert found is not None
    length = int(found[1])
    assert plan(1024 * MIB, length).fits
    with pytest.raises(ConfigError):
        plan(1024 * MIB, length + 64)


def test_where_nothing_helps_the_missing_memory_is_told() -> None:
    with pytest.raises(ConfigError, match="no setting is enough; the least is [0-9]+ MiB more"):
        plan(100 * MIB)


def test_useful_pages_are_the_end_of_what_is_taken() -> None:
    made = plan(100 * GIB, 640, max_num_seqs=4)
    assert made.num_pages == 40
    assert made.limit_bytes - made.total_bytes > 90 * GIB


# -- how much there is: control groups that a directory pretends


def host(root: Path, groups: Mapping[str, str | dict[str, object]], free_mib: int = 8192) -> Facts:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {free_mib * 1024} kB\n")
    (root / "proc/self/status").write_text(f"VmRSS: 1 kB\nRssAnon: {10 * 1024} kB\n")
    for path, content in groups.items():
        where = root / path
        where.parent.mkdir(parents=True, exist_ok=True)
        where.write_text(str(content))
    return Facts(root / "proc", root / "cgroup")


def v2(path: str, limit: int | str, used: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"cgroup{path}/memory.max": str(limit),
        f"cgroup{path}/memory.current": str(used),
        f"cgroup{path}/memory.stat": f"anon 5\ninactive_file {inactive}\nactive_file 7\n",
    }


def v1(path: str, limit: int, used: int, inactive: int = 0) -> dict[str, str]:
    return {
        f"cgroup/memory{path}/memory.limit_in_bytes": str(limit),
        f"cgroup/memory{path}/memory.usage_in_bytes": str(used),
        f"cgroup/memory{path}/memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}\n",
    }


def test_without_a_container_a_fifth_stays_for_others(tmp_path: Path) -> None:
    facts = host(tmp_path, {"proc/self/cgroup": "0::/\n"}, free_mib=1000)
    assert measure_room(facts).num_bytes == 810 * MIB
    assert available_bytes(facts) == 1000 * MIB


def test_the_tightest_group_above_us_counts_in_version_2(tmp_path: Path) -> None:
    groups = {"proc/self/cgroup": "0::/pod/box\n"}
    groups |= v2("/pod", 600 * MIB, 100 * MIB) | v2("/pod/box", "max", 50 * MIB) | v2("", "max", 0)
    facts = host(tmp_path, groups)
    room = measure_room(facts)
    assert room.num_bytes == 510 * MIB
    assert "500 MiB are left of the 600 MiB of control group /pod" in room.why


def test_cache_of_files_counts_as_left(tmp_path: Path) -> None:
    groups = {"proc/self/cgroup": "0::/\n"} | v2("", 600 * MIB, 500 * MIB, inactive=300 * MIB)
    assert available_bytes(host(tmp_path, groups)) == 400 * MIB


def test_version_1_is_read_too_and_its_unlimited_is_none(tmp_path: Path) -> None:
    cgroup = "9:name=systemd:/\n4:memory,hugetlb:/docker/abc\n0::/\n"
    unlimited = 0x7FFFFFFFFFFFF000
    groups = {"proc/self/cgroup": cgroup} | v1("/docker/abc", unlimited, MIB) | v1("", unlimited, 0)
    assert available_bytes(host(tmp_path / "free", groups)) == 8192 * MIB
    groups |= v1("/docker", 300 * MIB, 200 * MIB, inactive=50 * MIB)
    assert available_bytes(host(tmp_path / "tight", groups)) == 150 * MIB


def test_a_container_without_a_namespace_finds_its_limit_at_the_root_of_the_mount(tmp_path: Path) -> None:
    groups = {"proc/self/cgroup": "4:memory:/docker/abc\n"} | v1("", 300 * MIB, 100 * MIB)
    assert available_bytes(host(tmp_path, groups)) == 200 * MIB
    groups = {"proc/self/cgroup": "0::/../other\n"} | v2("", 300 * MIB, 100 * MIB)
    assert available_bytes(host(tmp_path / "above", groups)) == 200 * MIB


def test_a_limit_that_was_asked_for_is_taken_as_it_is(tmp_path: Path) -> None:
    facts = host(tmp_path, {"proc/self/cgroup": "0::/\n"})
    assert measure_room(facts, asked=GIB).num_bytes == GIB


def test_unreadable_files_are_no_limit(tmp_path: Path) -> None:
    groups = {"proc/self/cgroup": "0::/\n"} | v2("", "garbage", 0)
    assert available_bytes(host(tmp_path, groups)) == 8192 * MIB


def test_settings_are_replaced_not_changed() -> None:
    config = configured()
    with pytest.raises(ConfigError):
        fit(config, 65536, Room(GIB, ""), demand)
    assert config == replace(config, scheduler=SchedulerConfig())
