"""Nothing inside a message acts as a special token, wherever it stands and however it is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.null.text.tokenizers_for_tests import byte_level
from xllm.errors import RequestError
from xllm.testing.tiny_tokenizer import SPECIAL_TOKENS
from xllm.text import ChatTemplate, encode_chat

END, START = "<|im_end|>", "<|im_start|>"
hostile = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<|im_", "start|>", "end|>", "<", "|>", ">", "a", " ", "\n", "é"]),
    max_size=6,
).map("".join)


def encode(messages: list[dict[str, object]], template: str | None = None, **kwargs: object) -> list[int]:
    assets = byte_level()
    chosen = ChatTemplate(template, assets.text_config) if template else assets.template
    assert chosen is not None
    return encode_chat(assets.tokenizer, chosen, messages, **kwargs)  # type: ignore[arg-type]


@given(st.lists(hostile, min_size=1, max_size=4))
def test_special_tokens_come_from_the_template_only_and_the_text_is_kept(contents: list[str]) -> None:
    assets = byte_level()
    assert assets.template is not None
    messages: list[dict[str, object]] = [{"role": "user", "content": c} for c in contents]
    ids = encode(messages)
    special = [i for i in ids if i in assets.tokenizer.special_ids]
    assert special == [1, 2] * len(contents) + [1]
    assert assets.tokenizer.decode(ids, False) == assets.template.render(messages)


@given(hostile, hostile)
def test_neighbouring_strings_cannot_make_a_special_token_together(left: str, right: str) -> None:
    ids = encode([{"role": left, "content": right}], "{{ messages[0].role }}{{ messages[0].content }}")
    tokenizer = byte_level().tokenizer
    assert not tokenizer.special_ids.intersection(ids)
    assert tokenizer.decode(ids) == left + right


def test_harmless_conversations_encode_like_their_rendered_text() -> None:
    assets = byte_level()
    assert assets.template is not None
    messages: list[dict[str, object]] = [{"role": "user", "content": "Hello there."}]
    assert encode(messages) == assets.tokenizer.encode(assets.template.render(messages))


def test_literals_in_tools_and_keywords_are_plain_text_too() -> None:
    template = "{{ tools | tojson }}{{ reasoning_effort }}"
    tools = [{"function": {"name": END, START: [END]}}]
    ids = encode([{"role": "user", "content": "x"}], template, tools=tools, reasoning_effort=START)
    assert not byte_level().tokenizer.special_ids.intersection(ids)
    assert (
        byte_level().tokenizer.decode(ids)
        == f'[{{"function": {{"name": "{END}", "{START}": ["{END}"]}}}}]{START}'
    )


def test_the_final_message_can_be_continued() -> None:
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "count"},
        {"role": "assistant", "content": "one, two "},
    ]
    ids = encode(messages, continue_final_message=True)
    assert byte_level().tokenizer.decode(ids, False).endswith(f"{START}assistant\none, two ")
    with pytest.raises(RequestError, match="final message"):
        encode([], continue_final_message=True)


def test_a_refusal_shows_the_clients_text_and_not_our_markers() -> None:
    with pytest.raises(RequestError, match=r"bad role <\|im_end\|>"):
        encode([{"role": END, "content": ""}], "{{ raise_exception('bad role ' + messages[0].role) }}")


def test_the_limit_counts_all_parts() -> None:
    messages: list[dict[str, object]] = [{"role": "user", "content": f"1{END}2" * 20}]
    assert len(encode(messages)) > 100
    with pytest.raises(RequestError) as caught:
        encode(messages, max_tokens=100)
    assert caught.value.code == "context_length_exceeded"
