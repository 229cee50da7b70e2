"""Our tokenizers, templates and dequantised weights against transformers on real GGUF files.

SmolLM2 is fetched if need be; the larger catalogue models are compared only where they were pulled.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from xllm.artifacts import ModelSource, resolve
from xllm.errors import ConfigError
from xllm.text import TextAssets, encode_chat

TEXTS = [
    "",
    "Hello, world!",
    " leading and trailing ",
    "two  three   four    spaces",
    "tabs\tand\nlines\n\n\n  and\r\nmore \n x",
    "1234567890 3.14159 1,000,000 x2y3",
    "don't we'll I'M THEY'RE it's",
    "Zoë façade naïve ﬁ",
    "日本語のテキスト、中文文本。 한국어 Русский العربية עברית हिन्दी",
    "🙂👨‍👩‍👧‍👦🇩🇪 emoji",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # ok\n",
    "<|im_start|>user\nhi<|im_end|>\n",
    "https://example.com/a?b=c&d=%20#e",
    "(((([[[[{{{{<<<<====----____",
    "a" * 300,
    "\u00a0\u2003\u3000\u200b\ufeff",
]

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  Why?\n"}],
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Sure?"},
    ],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's <b>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]

MODELS = [
    "smollm2",
    pytest.param("qwen2.5-coder-0.5b-instruct", marks=pytest.mark.slow),
    pytest.param("gemma3-270m", marks=pytest.mark.slow),
]


@cache
def source(name: str) -> ModelSource | None:
    try:
        return resolve(name, allow_pull=name == "smollm2")
    except ConfigError:
        return None


@cache
def assets(name: str) -> TextAssets:
    found = source(name)
    if found is None:
        pytest.skip(f"{name} is not on this machine (xllm pull {name})")
    return TextAssets.from_card_assets(found.assets())


@cache
def theirs(name: str) -> Any:
    transformers = pytest.importorskip("transformers")
    found = source(name)
    assert found is not None
    return transformers.AutoTokenizer.from_pretrained(found.path.parent, gguf_file=found.path.name)


@pytest.mark.parametrize("name", MODELS)
def test_texts_become_the_same_tokens(name: str) -> None:
    ours, reference = assets(name).tokenizer, theirs(name)
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False) == reference.encode(
            text, add_special_tokens=False
        ), text


def test_where_transformers_simplifies_gguf_tokenizers_we_follow_the_original_ones() -> None:
    """Its GGUF conversion drops two steps that the models' own tokenizer.json files have."""
    smollm2 = assets("smollm2").tokenizer
    pieces = [smollm2.token_bytes(i) for i in smollm2.encode("a ½")]
    # Every number stands alone, also apart from the blank before it.
    assert pieces[:2] == [b"a", b" "]
    qwen = assets("qwen2.5-coder-0.5b-instruct").tokenizer
    assert qwen.encode("e\u0301") == qwen.encode("é")


@pytest.mark.parametrize("name", MODELS)
def test_tokens_become_the_same_text(name: str) -> None:
    ours, reference = assets(name).tokenizer, theirs(name)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False)
        for skip in (True, False):
            assert ours.decode(ids, skip) == reference.decode(
                ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )


@pytest.mark.parametrize("name", MODELS[:2])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [True, False])
def test_conversations_become_the_same_prompt(name: str, tools: Any, prompt: bool) -> None:
    ours, reference = assets(name), theirs(name)
    assert ours.template is not None
    for messages in CHATS:
        wanted = reference.apply_chat_template(
            messages, tools=tools, add_generation_prompt=prompt, tokenize=False
        )
        assert ours.template.render(messages, tools, prompt) == wanted
        ids = encode_chat(ours.tokenizer, ours.template, messages, tools=tools, add_generation_prompt=prompt)
        assert ids == reference.encode(wanted, add_special_tokens=False)


def test_every_dequantised_tensor_of_smollm2_equals_transformers() -> None:
    """Names, rotary order, dequantisation and tying, bit for bit."""
    transformers = pytest.importorskip("transformers")
    found = source("smollm2")
    if found is None:
        pytest.skip("SmolLM2 is not here and could not be fetched")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        found.path.parent, gguf_file=found.path.name, dtype="float32"
    )
    reference = {n: p.detach().numpy() for n, p in model.named_parameters()}
    tensors = found.tensors()
    assert set(tensors.names()) == set(reference)
    for name in tensors.names():
        np.testing.assert_array_equal(tensors.load_f32(name), reference[name], err_msg=name)
