"""Metrics: the names dashboards know, values that add up, and no series made by clients."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

from tests.null.api.conftest import Site

NAMES = """
vllm:num_requests_running vllm:num_requests_waiting vllm:kv_cache_usage_perc vllm:prefix_cache_queries
vllm:prefix_cache_hits vllm:num_preemptions vllm:prompt_tokens vllm:generation_tokens vllm:request_success
vllm:time_to_first_token_seconds vllm:inter_token_latency_seconds vllm:request_time_per_output_token_seconds
vllm:e2e_request_latency_seconds vllm:request_queue_time_seconds vllm:request_prefill_time_seconds
vllm:request_decode_time_seconds vllm:request_inference_time_seconds vllm:request_prompt_tokens
vllm:request_generation_tokens vllm:cache_config_info xllm:requests_aborted xllm:owned_pages
xllm:http_responses
""".split()


async def scrape(site: Site) -> dict[str, dict[tuple[str, ...], float]]:
    """family → {(sample name, label values…): value}"""
    text = (await site.client.get("/metrics")).text
    return {
        f.name: {(s.name, *s.labels.values()): s.value for s in f.samples}
        for f in text_string_to_metric_families(text)
    }


async def test_every_name_is_there(site: Site) -> None:
    await site.complete()
    assert set(NAMES) <= set(await scrape(site))


async def test_a_request_is_counted_once_everywhere(site: Site) -> None:
    for _ in range(3):
        await site.complete(max_tokens=4)
    found = await scrape(site)
    assert found["vllm:request_success"]["vllm:request_success_total", "length", "sample"] == 3
    for name in ("vllm:e2e_request_latency_seconds", "vllm:time_to_first_token_seconds"):
        assert found[name][f"{name}_count", "sample"] == 3
    assert found["vllm:request_generation_tokens"]["vllm:request_generation_tokens_sum", "sample"] == 12
    assert found["xllm:http_responses"]["xllm:http_responses_total", "/v1/completions", "200"] == 3


async def test_clients_cannot_make_series(site: Site) -> None:
    async def nonsense(i: int) -> None:
        await site.client.request(f"METHOD{i}", "/v1/completions")
        await site.client.get(f"/path{i}", headers={"x-request-id": f"id{i}"})
        await site.complete(model=f"model{i}", user=f"user{i}")

    await nonsense(0)
    await scrape(site)  # which is a response too
    before = {k: set(v) for k, v in (await scrape(site)).items()}
    for i in range(1, 30):
        await nonsense(i)
    assert {k: set(v) for k, v in (await scrape(site)).items()} == before
