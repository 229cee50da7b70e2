"""Router policies compared on shared-prefix, multi-turn load, in virtual time.

    python -m benchmarks.routing [--instances 3 8] [--seeds 3] [--json FILE]

The policies, their memory, the KV index and the cost fit are the real ones; engines are a queue with
chunked prefill, batched decoding, an LRU page cache and a step time. Every policy gets the same
conversations: system prompts of Zipf popularity, turns that repeat all that was said before, think times.
Nothing is timed here; the results depend on the seeds only.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from xllm.config import FrontConfig
from xllm.cost import CostFitter, StepCost, attention_work
from xllm.prefix import page_digest, root_digest
from xllm.service.kvindex import KvIndex
from xllm.service.router.base import InstanceView, RequestView, RouterPolicy, RouterSnapshot
from xllm.service.router.memory import PlacementMemory
from xllm.service.router.registry import load_policy
from xllm.types import PAGE_SIZE, EngineSnapshot
from xllm.wire.messages import KvDelta

POLICIES = ("round-robin", "least-load", "cache-aware", "slo-aware")
STEP = StepCost((2.0, 0.1, 0.00005, 0.3, 0.0002))
"""About SmolLM2-135M on two cores: 0.1 ms a prompt row, 2 ms a step."""
CHUNK = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One load. `rate` is new conversations a second and instance; `cache_pages` is per instance."""

    name: str
    num_instances: int
    rate: float
    cache_pages: int
    num_systems: int = 12
    zipf: float = 1.0
    num_conversations: int = 300
    think_s: float = 4.0
    slow: float = 1.0
    """How much slower the last instance is than the others."""


@dataclass(slots=True)
class Job:
    """One turn: its prompt, and its answer, which is known beforehand so that the next turn can repeat it."""

    request_id: str
    prompt: list[int]
    answer: list[int]
    after: Callable[[], None]
    chain: list[bytes] = field(default_factory=list)
    arrived: float = 0.0
    computed: int = 0
    hit: int = 0
    drawn: int = 0
    ttft_ms: float | None = None


class Engine:
    """One simulated instance: steps of chunked prefill and decoding over an LRU of named pages."""

    def __init__(self, name: str, cost: StepCost, cache_pages: int, rng: random.Random) -> None:
        self.name, self.cost, self.cache_pages, self.rng = name, cost, cache_pages, rng
        self.queue: list[Job] = []
        self.decoding: list[Job] = []
        self.pages: OrderedDict[bytes, None] = OrderedDict()
        self.fitter = CostFitter()
        self.seq = 0
        self.running = False
        self.busy_ms = 0.0
        self.in_flight_ms = 0.0
        self.num_served = 0
        self.rows = 0
        self.snapshot = EngineSnapshot()

    def start_job(self, job: Job) -> None:
        for digest in job.chain[: (len(job.prompt) - 1) // PAGE_SIZE]:
            if digest not in self.pages:
                break
            self.pages.move_to_end(digest)
            job.hit += PAGE_SIZE
        job.computed = job.hit

    def publish(self, digests: list[bytes]) -> KvDelta:
        stored, removed = [], []
        for digest in digests:
            if digest not in self.pages:
                stored.append(digest)
            self.pages[digest] = None
            self.pages.move_to_end(digest)
        while len(self.pages) > self.cache_pages:
            removed.append(self.pages.popitem(last=False)[0])
        gone = set(removed)
        delta = KvDelta(
            seq=self.seq, stored=tuple(d for d in stored if d not in gone), removed=tuple(removed)
        )
        self.seq += 1
        return delta

    def plan(self) -> tuple[list[tuple[Job, int]], float]:
        """The prompt chunks of the next step, and how long the step takes."""
        budget, chunks, work = CHUNK - len(self.decoding), [], 0
        for job in self.queue:
            if budget <= 0:
                break
            if job.computed == 0:
                self.start_job(job)
            rows = min(budget, len(job.prompt) - job.computed)
            chunks.append((job, rows))
            work += attention_work(job.computed, rows)
            budget -= rows
        num_rows = sum(rows for _, rows in chunks)
        context = sum(len(j.prompt) + j.drawn for j in self.decoding)
        ms = self.cost.step_ms(num_rows, work, len(self.decoding), context) * self.rng.uniform(0.95, 1.1)
        self.fitter.observe(num_rows, work, len(self.decoding), context, ms)
        self.busy_ms += ms
        self.rows += num_rows
        self.in_flight_ms += ms * (len(self.queue) + len(self.decoding))
        return chunks, ms

    def see(self) -> None:
        cost = self.fitter.cost()
        self.snapshot = EngineSnapshot(
            num_running=len(self.decoding) + bool(self.queue),
            num_requests=len(self.queue) + len(self.decoding),
            backlog_tokens=sum(len(j.prompt) - j.computed for j in self.queue),
            num_decoding=len(self.decoding),
            decode_context=sum(len(j.prompt) + j.drawn for j in self.decoding),
            cost=cost.coefficients if cost else (),
            cost_error=self.fitter.error,
            total_pages=self.cache_pages,
            free_pages=self.cache_pages - len(self.pages),
            cached_pages=len(self.pages),
        )


class World:
    """The event loop and the front: places jobs as `Front` does and collects what happened."""

    def __init__(self, case: Case, policy: RouterPolicy, seed: int) -> None:
        self.case, self.policy = case, policy
        self.rng = random.Random(seed)
        self.now = 0.0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.num_events = 0
        slow = StepCost(tuple(c * case.slow for c in STEP.coefficients))
        costs = [STEP] * (case.num_instances - 1) + [slow]
        self.engines = {
            f"e{i}": Engine(f"e{i}", cost, case.cache_pages, random.Random(seed * 100 + i))
            for i, cost in enumerate(costs)
        }
        self.index, self.memory = KvIndex(), PlacementMemory()
        for name in self.engines:
            self.index.apply(name, KvDelta(seq=0, reset=True))
            self.engines[name].seq = 1
        self.mine: dict[str, set[str]] = {name: set() for name in self.engines}
        self.mine_backlog: dict[str, dict[str, int]] = {name: {} for name in self.engines}
        self.turn = 0
        self.ttfts: list[float] = []
        self.num_prompt = self.num_hit = self.num_ideal = 0
        self.ever: set[bytes] = set()
        self.root = root_digest("class", None, "")

    def at(self, delay_s: float, call: Callable[[], None]) -> None:
        self.num_events += 1
        heapq.heappush(self.events, (self.now + delay_s, self.num_events, call))

    def run(self) -> None:
        self.load()
        while self.events:
            self.now, _, call = heapq.heappop(self.events)
            call()
        self.index.check()

    # -- load ---------------------------------------------------------------------------------

    def load(self) -> None:
        case, rng = self.case, random.Random(self.rng.random())
        systems = [self.text(rng, rng.randint(6, 24) * PAGE_SIZE) for _ in range(case.num_systems)]
        weights = [1 / (i + 1) ** case.zipf for i in range(case.num_systems)]
        when = 0.0
        for c in range(case.num_conversations):
            when += rng.expovariate(case.rate * case.num_instances)
            system = rng.choices(systems, weights)[0]
            own = random.Random(rng.random())
            self.at(when, lambda c=c, system=system, own=own: self.talk(f"c{c}", own, list(system), 0))

    @staticmethod
    def text(rng: random.Random, length: int) -> list[int]:
        return [rng.randrange(50_000) for _ in range(length)]

    def talk(self, name: str, rng: random.Random, history: list[int], turn: int) -> None:
        prompt = history + self.text(rng, rng.randint(30, 200))
        answer = self.text(rng, rng.randint(30, 120))
        goes_on, pause = rng.random() < 0.8, rng.expovariate(1 / self.case.think_s)

        def after() -> None:
            if goes_on:
                self.at(pause, lambda: self.talk(name, rng, prompt + answer, turn + 1))

        self.arrive(Job(f"{name}.{turn}", prompt, answer, after, arrived=self.now))

    # -- front --------------------------------------------------------------------------------

    def arrive(self, job: Job) -> None:
        parent = self.root
        for i in range(len(job.prompt) // PAGE_SIZE):
            parent = page_digest(parent, job.prompt[i * PAGE_SIZE : (i + 1) * PAGE_SIZE])
            job.chain.append(parent)
        found = self.index.match(job.chain)
        recent = self.memory.recent_ms(self.engines.keys())
        views = tuple(
            InstanceView(
                name=name,
                num_reqs=len(self.mine[name]),
                max_reqs=320,
                engine=engine.snapshot,
                backlog_tokens=sum(self.mine_backlog[name].values()),
                matched=self.memory.matched(name, job.chain, found.get(name, ())),
                recent_ms=recent[name],
            )
            for name, engine in sorted(self.engines.items())
        )
        request = RequestView(
            request_id=job.request_id, model="m", num_prompt_tokens=len(job.prompt), max_tokens=128
        )
        placement = self.policy(request, RouterSnapshot(instances=views, turn=self.turn), FrontConfig())
        assert placement is not None
        self.turn += 1
        name = placement.instance
        self.memory.placed(job.request_id, name, placement.work_ms, self.engines.keys(), job.chain)
        matched = sum(n for _, n in next(v.matched for v in views if v.name == name))
        self.mine[name].add(job.request_id)
        self.mine_backlog[name][job.request_id] = max(1, len(job.prompt) - matched)
        engine = self.engines[name]
        engine.queue.append(job)
        if not engine.running:
            engine.running = True
            self.step(engine)

    # -- engine -------------------------------------------------------------------------------

    def step(self, engine: Engine) -> None:
        chunks, ms = engine.plan()
        batch = list(engine.decoding)
        self.at(ms / 1000, lambda: self.stepped(engine, chunks, batch))

    def stepped(self, engine: Engine, chunks: list[tuple[Job, int]], batch: list[Job]) -> None:
        published: list[bytes] = []
        ended: list[Job] = []
        for job in batch:
            job.drawn += 1
            if job.drawn == len(job.answer):
                ended.append(job)
        for job, rows in chunks:
            before = job.computed // PAGE_SIZE
            job.computed += rows
            published += job.chain[before : job.computed // PAGE_SIZE]
            if job.computed == len(job.prompt):
                engine.queue.remove(job)
                engine.decoding.append(job)
                self.answered(engine, job)
        for job in ended:
            engine.decoding.remove(job)
            published += self.answer_pages(job)
            engine.num_served += 1
            self.mine[engine.name].discard(job.request_id)
            job.after()
        if published:
            self.ever.update(published)
            assert self.index.apply(engine.name, engine.publish(published))
        engine.see()
        engine.running = bool(engine.queue or engine.decoding)
        if engine.running:
            self.step(engine)

    def answered(self, engine: Engine, job: Job) -> None:
        job.ttft_ms = (self.now - job.arrived) * 1000
        job.drawn = 1
        self.ttfts.append(job.ttft_ms)
        self.num_prompt += len(job.prompt)
        self.num_hit += job.hit
        for digest in job.chain[: (len(job.prompt) - 1) // PAGE_SIZE]:
            if digest not in self.ever:
                break
            self.num_ideal += PAGE_SIZE
        self.memory.settled(job.request_id)
        self.mine_backlog[engine.name].pop(job.request_id, None)

    @staticmethod
    def answer_pages(job: Job) -> list[bytes]:
        tokens, parent, pages = job.prompt + job.answer[:-1], job.chain[-1], []
        for i in range(len(job.chain), len(tokens) // PAGE_SIZE):
            parent = page_digest(parent, tokens[i * PAGE_SIZE : (i + 1) * PAGE_SIZE])
            pages.append(parent)
        return pages


def spread(values: list[float]) -> float:
    return max(values) / statistics.mean(values)


def measure(case: Case, policy: str, seed: int) -> dict[str, float]:
    world = World(case, load_policy(policy), seed)
    world.run()
    engines = list(world.engines.values())
    ordered = sorted(world.ttfts)
    return {
        "num_reqs": len(ordered),
        "hit_rate": world.num_hit / world.num_prompt,
        "of_ideal": world.num_hit / world.num_ideal,
        "ttft_p50_ms": statistics.median(ordered),
        "ttft_p90_ms": ordered[int(0.9 * len(ordered))],
        "ttft_mean_ms": statistics.mean(ordered),
        "use": sum(e.busy_ms for e in engines) / len(engines) / (world.now * 1000),
        "load_busy": spread([e.busy_ms for e in engines]),
        "load_reqs": spread([e.num_served for e in engines]),
        "load_in_flight": spread([e.in_flight_ms for e in engines]),
    }


def cases(num_instances: list[int]) -> list[Case]:
    found = []
    for n in num_instances:
        plain = Case(
            name=f"{n} instances", num_instances=n, rate=0.5, cache_pages=2000, num_conversations=100 * n
        )
        found += [
            plain,
            replace(plain, name=f"{n}, light load", rate=0.1),
            replace(plain, name=f"{n}, heavy load", rate=1.3),
            replace(plain, name=f"{n}, small caches", cache_pages=400),
            replace(plain, name=f"{n}, one hot prompt", num_systems=2, zipf=3.0),
            replace(plain, name=f"{n}, a slow one", slow=2.0),
        ]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--instances", type=int, nargs="+", default=[3, 8])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(
        f"{'':24}{'policy':13}{'hit':>6}{'ideal':>7}{'p50':>8}{'p90':>8}{'use':>6}{'busy':>7}{'reqs':>6}{'flight':>7}"
    )
    for case in cases(args.instances):
        for policy in args.policies:
            runs = [measure(case, policy, seed) for seed in range(args.seeds)]
            mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
            worst = {f"{key}_max": max(run[key] for run in runs) for key in ("load_busy", "load_reqs")}
            rows.append({"case": case.name, "policy": policy, "seeds": args.seeds, **mean, **worst})
            print(
                f"{case.name:24}{policy:13}{mean['hit_rate']:6.3f}{mean['of_ideal']:7.3f}"
                f"{mean['ttft_p50_ms']:8.1f}{mean['ttft_p90_ms']:8.1f}{mean['use']:6.2f}"
                f"{mean['load_busy']:7.2f}{mean['load_reqs']:6.2f}{mean['load_in_flight']:7.2f}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
