"""Bytes per second of KV pages between two processes, by way, against a copy of the same pages in one.

    python -m benchmarks.transfer --pages 16 --page-kib 1440 --out transfer.json
    python -m benchmarks.transfer --model smollm2 --prompt-len 1024

Medians of rounds, all in one run; the other process runs on the same machine. A round begins when pages are
pushed to a receiver that has leased its own, and ends with its word that they are right. With a model: how
much of a transfer is hidden behind the prefill that fills its pages, and what that costs the prefill.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.compare import machine
from benchmarks.native_step import sequences, step
from xllm.clock import SystemClock
from xllm.config import EngineConfig
from xllm.config.load import from_keywords
from xllm.engine.build import build_engine
from xllm.engine.kvtransfer import mooncake
from xllm.engine.kvtransfer.base import Failed, Manifest, Offered, Pushed, Released, Sent, TransferEvent
from xllm.engine.kvtransfer.copying import page_digests
from xllm.engine.kvtransfer.memory import GroupMemory, KVMemory, anonymous_pages, of_layers
from xllm.engine.kvtransfer.plane import DataPlane, Ways
from xllm.engine.kvtransfer.sharing import PageKind
from xllm.types import PAGE_SIZE, KVGroup, KVLayout
from xllm.wire.hello import INSTANCE, Identity

KIND = PageKind(numerics_class="benchmark", layout_digest="benchmark", page_size=64)


@dataclass(slots=True)
class End:
    memory: KVMemory
    plane: DataPlane
    events: queue.SimpleQueue[TransferEvent]

    def wait(self, kind: type[TransferEvent]) -> TransferEvent:
        while not isinstance(event := self.events.get(timeout=60.0), kind):
            if isinstance(event, Failed):
                raise SystemExit(f"a transfer failed: {event.error.message}")
        return event


def make_end(ways: Ways, num_pages: int, page_bytes: int, in_file: bool, num_layers: int = 1) -> End:
    """Pages that have been touched, as those of an engine that has served are."""
    shared = anonymous_pages("benchmark") if in_file else None
    empty = np.zeros((num_pages, page_bytes), np.uint8) if shared is None else None
    pages = shared.next_group(num_pages, page_bytes) if shared is not None else empty
    assert pages is not None
    pages[:] = np.random.default_rng(0).integers(0, 256, page_bytes, np.uint8)
    group = KVGroup(kind="full", layers=tuple(range(num_layers)), num_kv_heads=1, head_dim=1)
    memory = of_layers(KVLayout(groups=(group,), dtype="uint8"), [pages], shared)
    events: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
    plane = DataPlane(memory, KIND, Identity(role=INSTANCE), events.put, ways=ways)
    plane.start()
    return End(memory, plane, events)


def receive(ways: Ways, num_pages: int, page_bytes: int, in_file: bool, num_layers: int) -> None:
    """The other process: takes whatever is offered, until its input ends."""
    end = make_end(ways, num_pages, page_bytes, in_file, num_layers)
    print(json.dumps(end.plane.endpoints), flush=True)

    def serve() -> None:
        while True:
            event = end.events.get()
            if isinstance(event, Offered):
                end.plane.accept(event.transfer_id, tuple(tuple(range(n)) for n in event.num_pages))

    threading.Thread(target=serve, daemon=True).start()
    sys.stdin.read()
    end.plane.close()


def one_round(end: End, endpoints: tuple[str, ...], name: str, num_pages: int) -> float:
    all_pages = (tuple(range(num_pages)),)
    end.plane.send(name, endpoints, (num_pages,))
    while end.plane.num_pending(name) is None:
        time.sleep(0.0005)
    started_s = time.perf_counter()
    end.plane.push(name, Pushed(indices=all_pages, pages=all_pages))
    end.plane.finish(name, Manifest(num_prompt=0))
    end.wait(Sent)
    elapsed_s = time.perf_counter() - started_s
    end.wait(Released)
    return elapsed_s


def measure(ways: str, num_pages: int, page_bytes: int, rounds: int) -> list[float]:
    """Seconds of each round. `stream` is a Unix socket between pages that lie in no file."""
    in_file = ways != "stream"
    way: Ways = "shm" if ways == "stream" else ways  # type: ignore[assignment]
    with receiver(way, num_pages, page_bytes, in_file) as endpoints:
        end = make_end(way, num_pages, page_bytes, in_file)
        times = [one_round(end, endpoints, f"{ways}{i}", num_pages) for i in range(rounds + 2)]
        end.plane.close()
    return times[2:]


@contextlib.contextmanager
def receiver(
    way: Ways, num_pages: int, page_bytes: int, in_file: bool, num_layers: int = 1
) -> Iterator[tuple[str, ...]]:
    """The other process; its endpoints."""
    command = [sys.executable, "-m", "benchmarks.transfer", "--receive", way, "--pages", str(num_pages)]
    command += ["--page-bytes", str(page_bytes), "--layers", str(num_layers)]
    command += () if in_file else ("--private",)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        if other.stdout is None:
            raise SystemExit("the other process has no output")
        line = other.stdout.readline()
        while not line.startswith("["):  # mooncake has things to say
            line = other.stdout.readline()
        yield tuple(json.loads(line))
        other.communicate("", timeout=60)


def behind_prefill(ways: Sequence[str], model: str, prompt_len: int, rounds: int) -> None:
    """One prompt in one step, pushed layer by layer; in turns with steps that push nothing."""
    num_pages = -(-prompt_len // PAGE_SIZE)
    for way in ways:
        shared = anonymous_pages("benchmark")
        keywords = {
            "model": model,
            "platform": "native",
            "num_pages": 2 * num_pages,
            "max_model_len": prompt_len + 1,
            "max_num_batched_tokens": prompt_len,
        }
        config = from_keywords(EngineConfig, keywords)
        engine = build_engine(config, SystemClock(), lambda *_: None, shared=shared)
        memory = engine.runner.kv_memory(shared)
        if memory is None or len(memory.groups) != 1:
            raise SystemExit(
                "this measures models with one KV group on a platform that lets its pages be read"
            )
        events: queue.SimpleQueue[TransferEvent] = queue.SimpleQueue()
        identity, names = Identity(role=INSTANCE), itertools.count()
        plane = DataPlane(memory, KIND, identity, events.put, watch=engine.runner, ways=way)  # type: ignore[arg-type]
        plane.start()
        end = End(memory, plane, events)
        rng = np.random.default_rng(1)
        alone_s, pushing_s, moved = [], [], []
        shape = 2 * num_pages, memory.groups[0].page_bytes, True, len(memory.groups[0].layers)
        with receiver(way, *shape) as endpoints:  # type: ignore[arg-type]
            for i in range(rounds + 1):
                prompt = sequences(rng, 1, prompt_len, engine.core.card.vocab_size)
                alone = step(engine.runner, prompt)
                name = f"{way}{next(names)}"
                plane.send(name, endpoints, (num_pages,))
                while plane.num_pending(name) is None:
                    time.sleep(0.0005)
                pages = (tuple(range(num_pages)),)
                prompt = sequences(rng, 1, prompt_len, engine.core.card.vocab_size)
                plane.push(name, Pushed(indices=pages, pages=pages, after_layer=True))
                pushing = step(engine.runner, prompt)
                plane.step_done()
                plane.finish(name, Manifest(num_prompt=0))
                sent = end.wait(Sent)
                end.wait(Released)
                if i and isinstance(sent, Sent):  # the first makes programs and maps pages
                    alone_s.append(alone)
                    pushing_s.append(pushing)
                    moved.append((sent.transfer_ms, sent.exposed_ms))
        plane.close()
        engine.core.close()
        transfer_ms, exposed_ms = (median(column) for column in zip(*moved, strict=True))
        alone_ms, pushing_ms = median(alone_s) * 1e3, median(pushing_s) * 1e3
        print(f"{way:9} prefill of {prompt_len} {alone_ms:.1f} ms, pushing {pushing_ms:.1f} ms", end="; ")
        print(f"transfer {transfer_ms:.2f} ms, exposed {exposed_ms:.2f} ms", end=": ")
        print(f"{1 - exposed_ms / transfer_ms:.0%} hidden")


def memcpy(num_pages: int, page_bytes: int, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds for copying the same pages within a process, and for their digests."""
    source = np.random.default_rng(0).integers(0, 256, (num_pages, page_bytes), np.uint8)
    target = np.ones_like(source)
    group = GroupMemory(target)
    copies, digests = [], []
    for _ in range(rounds):
        started_s = time.perf_counter()
        target[:] = source
        copied_s = time.perf_counter()
        page_digests(group, range(num_pages))
        copies.append(copied_s - started_s)
        digests.append(time.perf_counter() - copied_s)
    return copies, digests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", type=int, default=16, help="16 pages hold 1024 tokens")
    parser.add_argument("--page-kib", type=int, default=1440, help="of SmolLM2-135M in bfloat16: 1440")
    parser.add_argument("--page-bytes", type=int)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--ways", nargs="*", default=["shm", "stream", "tcp", "mooncake"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--prompt-len", type=int, default=1024)
    parser.add_argument("--receive")
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--layers", type=int, default=1)
    args = parser.parse_args()
    page_bytes = args.page_bytes or args.page_kib << 10
    if args.receive:
        receive(args.receive, args.pages, page_bytes, not args.private, args.layers)
        return
    if args.model:
        behind_prefill(args.ways, args.model, args.prompt_len, args.rounds)
        return
    num_bytes = args.pages * page_bytes
    copies, digests = memcpy(args.pages, page_bytes, args.rounds)
    seconds = {"memcpy": copies, "digests alone": digests}
    for ways in args.ways:
        if ways == "mooncake" and (reason := mooncake.why_not()) is not None:
            print(f"mooncake: {reason}")
            continue
        seconds[ways] = measure(ways, args.pages, page_bytes, args.rounds)
    again, _ = memcpy(args.pages, page_bytes, args.rounds)
    seconds["memcpy again"] = again
    base = median(copies + again)
    for name, times in seconds.items():
        middle = median(times)
        print(
            f"{name:14} {num_bytes / middle / 1e9:7.2f} GB/s   {middle * 1e3:8.2f} ms "
            f"({min(times) * 1e3:.2f} to {max(times) * 1e3:.2f})   {base / middle:6.1%} of memcpy"
        )
    if args.out is not None:
        figures = {
            name: {"median_s": median(t), "min_s": min(t), "max_s": max(t)} for name, t in seconds.items()
        }
        args.out.write_text(
            json.dumps({"machine": machine.describe(), "bytes": num_bytes, "ways": figures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
