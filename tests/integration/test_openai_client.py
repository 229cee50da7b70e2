"""The official `openai` client against a real server with a real model."""

from __future__ import annotations

import openai
import pytest

MODEL = "smollm2"
QUESTION = [{"role": "user", "content": "What is the capital of France? Answer in one short sentence."}]


def test_models_are_listed_with_their_context(client: openai.OpenAI) -> None:
    names = [m.id for m in client.models.list().data]
    assert MODEL in names
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_greedy_chat_answer_is_sensible_and_counted(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=40)
    choice = answer.choices[0]
    assert "Paris" in choice.message.content
    assert choice.finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint


def test_streamed_chat_equals_the_whole_answer(client: openai.OpenAI) -> None:
    fields = {"model": MODEL, "messages": QUESTION, "temperature": 0.7, "seed": 3, "max_tokens": 40}
    whole = client.chat.completions.create(**fields)
    chunks = list(
        client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_completions_stream_equals_whole_with_n_two(client: openai.OpenAI) -> None:
    fields = {
        "model": MODEL,
        "prompt": "Once upon a time",
        "temperature": 1.0,
        "seed": 8,
        "max_tokens": 20,
        "n": 2,
    }
    whole = client.completions.create(**fields)
    texts = ["", ""]
    for chunk in client.completions.create(**fields, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [c.text for c in whole.choices]
    assert texts[0] != texts[1]
    assert whole.usage.completion_tokens == 40


def test_seeds_decide_the_answer(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="My name is", temperature=1.0, seed=seed, max_tokens=12
        )
        return answer.choices[0].text

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) > 1


def test_a_stop_string_is_cut_and_its_overrun_not_counted(client: openai.OpenAI) -> None:
    fields = {"model": MODEL, "prompt": "Count: one, two, three, four,", "temperature": 0, "max_tokens": 30}
    free = client.completions.create(**fields).choices[0].text
    stop = free.split()[2]
    stopped = client.completions.create(**fields, stop=[stop])
    assert stopped.choices[0].text == free[: free.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < 30


def test_chat_logprobs_carry_token_bytes_and_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=QUESTION, temperature=0, max_tokens=6, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert bytes(entry.bytes).decode(errors="replace") == entry.token or entry.token
        assert len(entry.top_logprobs) == 3
        # Greedy: the drawn token is the likeliest one.
        assert entry.top_logprobs[0].token == entry.token
        assert entry.logprob <= 0


def test_echoed_prompt_logprobs_agree_with_generated_ones(client: openai.OpenAI) -> None:
    prompt = "The sky is blue because"
    first = client.completions.create(model=MODEL, prompt=prompt, temperature=0, max_tokens=5, logprobs=1)
    whole = prompt + first.choices[0].text
    echoed = client.completions.create(
        model=MODEL, prompt=whole, temperature=0, max_tokens=1, echo=True, logprobs=1
    )
    lp = echoed.choices[0].logprobs
    assert lp.token_logprobs[0] is None
    start = len(lp.tokens) - 1 - len(first.choices[0].logprobs.tokens)
    assert lp.tokens[start:-1] == first.choices[0].logprobs.tokens
    # The same bits, whether a row was computed as prompt or as output.
    assert lp.token_logprobs[start:-1] == first.choices[0].logprobs.token_logprobs


def test_token_arrays_are_prompts_too(client: openai.OpenAI) -> None:
    by_ids = client.completions.create(
        model=MODEL, prompt=[[504, 2365, 282], [28, 216]], temperature=0, max_tokens=4
    )
    assert [c.index for c in by_ids.choices] == [0, 1]


def test_return_token_ids(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="Hello", temperature=0, max_tokens=4, extra_body={"return_token_ids": True}
    )
    assert len(answer.choices[0].token_ids) == 4


@pytest.mark.parametrize(
    ("fields", "error", "code"),
    [
        ({"model": "nobody"}, openai.NotFoundError, "model_not_found"),
        ({"max_tokens": 0}, openai.BadRequestError, None),
        ({"temperature": 3}, openai.BadRequestError, None),
        ({"messages": []}, openai.BadRequestError, None),
        ({"max_tokens": 100_000}, openai.BadRequestError, "context_length_exceeded"),
    ],
)
def test_errors_are_the_clients_own_classes(
    client: openai.OpenAI, fields: dict, error: type, code: str | None
) -> None:
    request = {"model": MODEL, "messages": QUESTION, "max_tokens": 5, **fields}
    with pytest.raises(error) as caught:
        client.chat.completions.create(**request)
    assert caught.value.body["message"]
    if code is not None:
        assert caught.value.code == code
