"""Chat templates: the model's Jinja in a sandbox, with the names and filters Hugging Face gives it.

Templates come from the model or the operator, never from a request; requests bring messages, tools
and allow-listed keywords. No tokens here (see `chat.py`), no files.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.exceptions
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from xllm.errors import ConfigError, RequestError

MAX_RENDERED_CHARS = 64 * 1024 * 1024
"""Largest prompt a template may produce; twice the largest default request body."""

MAX_MESSAGE_CHARS = 300
"""Of the text a template gives to `raise_exception`."""

MAX_RANGE_STEPS = 1_000_000
"""Of all `range()` loops of one rendering together."""

TEMPLATE_KWARGS = frozenset(
    {
        "add_vision_id",
        "builtin_tools",
        "clear_thinking",
        "custom_tools",
        "date_string",
        "documents",
        "enable_thinking",
        "model_identity",
        "preserve_thinking",
        "reasoning_effort",
        "thinking",
        "thinking_budget",
        "tools_in_user_message",
    }
)
"""What `chat_template_kwargs` of a request may set; everything else is refused by name."""

_SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_CANNOT_RENDER = "the model's chat template cannot render these messages"


class ChatTemplate:
    """One compiled template. Safe to share between threads.

    `text_config` gives the special tokens (bos_token, eos_token, …) the template may name.
    """

    def __init__(
        self,
        source: str,
        text_config: Mapping[str, Any],
        *,
        now: Callable[[], datetime.datetime] = datetime.datetime.now,
    ) -> None:
        """Raises ConfigError when `source` is not a valid template."""
        env = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        env.filters["tojson"] = _tojson
        env.globals["raise_exception"] = _raise_exception
        env.globals["strftime_now"] = lambda form: now().strftime(form)
        try:
            self._template = env.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ConfigError("chat_template: the template is not valid Jinja; give another one") from error
        self._special = {k: text_config[k] for k in _SPECIAL_KEYS if isinstance(text_config.get(k), str)}
        self.source = source

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """The prompt text. `kwargs` must be in TEMPLATE_KWARGS.

        Raises RequestError (template_error): the template refused, failed, or wrote more than
        MAX_RENDERED_CHARS; (invalid_value): a keyword that is not allowed.
        """
        for key in kwargs:
            if key not in TEMPLATE_KWARGS:
                raise RequestError(
                    "chat_template_kwargs has a key that is not supported", param="chat_template_kwargs"
                )
        variables = {
            **self._special,
            **kwargs,
            "messages": messages,
            "tools": tools,
            "documents": kwargs.get("documents"),
            "add_generation_prompt": add_generation_prompt,
            "range": _budgeted_range(),
        }
        try:
            return _joined(self._template.generate(variables))
        except RequestError:
            raise
        except _Refused as error:
            raise RequestError(f"chat template: {error.text}", code="template_error") from error
        except Exception as error:  # noqa: BLE001  a template can fail in any way Python can
            raise RequestError(_CANNOT_RENDER, code="template_error") from error


def _joined(pieces: Iterable[str]) -> str:
    parts: list[str] = []
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_RENDERED_CHARS:
            raise RequestError("the rendered chat prompt is too long", code="template_error")
        parts.append(piece)
    return "".join(parts)


def _budgeted_range() -> Callable[..., range]:
    """`range` whose lengths are summed over one rendering, so that nested loops end as well."""
    left = MAX_RANGE_STEPS

    def limited(*args: int) -> range:
        nonlocal left
        steps = range(*args)
        left -= len(steps)
        if left < 0:
            raise jinja2.exceptions.SecurityError("range is used for too many steps")
        return steps

    return limited


class _Refused(jinja2.TemplateError):
    """The template called `raise_exception`; `text` is its own message."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def _raise_exception(message: object) -> str:
    raise _Refused(str(message)[:MAX_MESSAGE_CHARS])


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML and sorts keys, which no model was trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The immutable sandbox, in which multiplication cannot allocate without bound either."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise jinja2.exceptions.SecurityError("powers are not available")
        for value, count in ((left, right), (right, left)):
            if (
                isinstance(value, (str, list, tuple))
                and isinstance(count, int)
                and len(value) * count > MAX_RENDERED_CHARS
            ):
                raise jinja2.exceptions.SecurityError("repetition is too long")
        return super().call_binop(context, operator, left, right)


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's part for training; here it is its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
