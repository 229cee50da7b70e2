"""From a draft to the RequestSpec that an engine gets: everything open is resolved, then checked.

Pure but for the seed it draws. The checks themselves are `limits.validate_spec`, the only place
where a request is judged.
"""

from __future__ import annotations

import msgspec

from xllm.ids import new_request_id, new_seed
from xllm.limits import validate_spec
from xllm.service.bad_words import bad_word_ids
from xllm.service.draft import RequestDraft
from xllm.text.assets import TextAssets
from xllm.types import SLO, ModelCard, RequestSpec, TokenSegment

_NONE_ASKED_FOR = SLO()


def assemble(
    draft: RequestDraft, card: ModelCard, text: TextAssets, usual: SLO = _NONE_ASKED_FOR
) -> RequestSpec:
    """The accepted request. Raises RequestError with the JSON path of what is wrong.

    `usual` objectives hold where an online request asks for none: routers and engines then need no rule of
    their own.
    """
    params = draft.params
    num_prompt = len(draft.prompt_token_ids)
    max_tokens = params.max_tokens
    spec = RequestSpec(
        request_id=new_request_id(),
        model=card.model_id,
        segments=(TokenSegment(draft.prompt_token_ids),),
        params=msgspec.structs.replace(
            params,
            stop=params.stop_strings,
            seed=new_seed() if params.seed is None else params.seed,
            max_tokens=max(1, card.max_model_len - num_prompt) if max_tokens is None else max_tokens,
        ),
        adapter=draft.adapter,
        cls=draft.cls,
        priority=draft.priority,
        slo=draft.slo if draft.cls == "offline" else _objectives(draft.slo, usual),
        deadline_ms=draft.deadline_ms,
        tenant=draft.tenant,
        cache_salt=draft.cache_salt,
        trace=draft.trace,
    )
    validate_spec(spec, card)
    if not params.bad_words:
        return spec
    # Tokenised only once their number and length are known to be within limits.
    banned = bad_word_ids(text.tokenizer, tuple(params.bad_words))
    return msgspec.structs.replace(
        spec, params=msgspec.structs.replace(spec.params, bad_words_token_ids=banned)
    )


def _objectives(asked: SLO, usual: SLO) -> SLO:
    return SLO(
        ttft_ms=asked.ttft_ms or usual.ttft_ms, tpot_ms=asked.tpot_ms or usual.tpot_ms, ttlt_ms=asked.ttlt_ms
    )
