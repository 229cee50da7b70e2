"""The sandbox: what templates can do, and what they and requests cannot."""

from __future__ import annotations

import datetime

import pytest

from xllm.errors import ConfigError, RequestError
from xllm.text import ChatTemplate

HELLO = [{"role": "user", "content": "hi"}]


def render(source: str, **kwargs: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(HELLO, **kwargs)  # type: ignore[arg-type]


def test_a_template_sees_messages_special_tokens_and_the_prompt_flag() -> None:
    source = "{{ bos_token }}{% for m in messages %}\n{{ m.role }}: {{ m['content'] }}\n{% endfor %}"
    assert render(source) == "<s>user: hi\n"
    assert render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"


def test_tojson_keeps_order_and_characters() -> None:
    assert render("{{ tools | tojson }}", tools=[{"b": "é<", "a": 1}]) == '[{"b": "é<", "a": 1}]'


def test_loop_controls_and_the_generation_tag_work() -> None:
    source = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert render(source) == "01"
    assert render("a{% generation %}b{% endgeneration %}c") == "abc"


def test_the_clock_is_handed_in() -> None:
    template = ChatTemplate("{{ strftime_now('%Y') }}", {}, now=lambda: datetime.datetime(2001, 2, 3))
    assert template.render(HELLO) == "2001"


def test_a_refusal_shows_the_templates_own_words_cut_short() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate' + 'x' * 9999) }}")
    assert caught.value.code == "template_error"
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ messages[7].content.x }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ 'x' * 10 ** 12 }}",
        "{{ 'x' * 999999999999 }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxx{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(10 * 1000 * 1000 * 1000) %}{% endfor %}",
        "{% include 'secret' %}",
    ],
)
def test_failing_or_hostile_templates_end_in_one_fixed_error(source: str) -> None:
    with pytest.raises(RequestError) as caught:
        render(source)
    assert caught.value.code == "template_error"
    assert "secret" not in caught.value.message
    assert "__" not in caught.value.message


def test_a_broken_template_is_a_config_error() -> None:
    with pytest.raises(ConfigError):
        ChatTemplate("{% for %}", {})


def test_allowed_keywords_reach_the_template_and_others_are_refused() -> None:
    assert render("{{ enable_thinking }}", enable_thinking=False) == "False"
    for key in ("chat_template", "tokenize", "messages2", "__class__", "raise_exception"):
        with pytest.raises(RequestError) as caught:
            render("x", **{key: 1})
        assert caught.value.param == "chat_template_kwargs"
