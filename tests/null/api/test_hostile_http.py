"""The raw-socket cases of the server spike, held against the server that was chosen."""

from __future__ import annotations

from typing import Any

import pytest

from xllm.testing.hostile_http import HttpCase, cases, run_case, verdict

HEAD_S = BODY_S = 1.0
MAX_BODY = 2 * 1024 * 1024
TABLE = cases(HEAD_S, BODY_S, MAX_BODY)


@pytest.mark.parametrize("case", TABLE, ids=lambda c: c.name)
async def test_hostile_bytes_get_a_clean_end_and_hurt_nobody(make_site: Any, case: HttpCase) -> None:
    site = await make_site(header_timeout_s=HEAD_S, body_timeout_s=BODY_S, max_body_bytes=MAX_BODY)
    before = (await site.complete(seed=1)).json()["choices"]
    outcome = await run_case(case, "127.0.0.1", site.port)
    assert verdict(case, outcome) == "", outcome.raw[:300]
    assert outcome.json_errors
    assert (await site.complete(seed=1)).json()["choices"] == before
    assert site.front.snapshot().num_inflight_reqs == 0
    assert site.server.num_connections <= 1
