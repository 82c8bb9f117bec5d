"""Chat messages to prompt text, through the model's own Jinja template.

Owns what a template may see: plain JSON data, the special tokens' texts and what the caller names. What it may do is
`template_sandbox`'s. Renders what Hugging Face's `apply_chat_template` renders. Never turns text into ids and never
touches the messages it was given.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mooli.errors import ChatTemplateError
from mooli.frontend.template_sandbox import compile_template, generate

if TYPE_CHECKING:
    import jinja2

_MAX_DEPTH = 64
_MAX_REASON_CHARS = 1000

_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_MARK "
"""Put after the message to continue; what follows it in the rendered text is the template's closing of the message. The
space at its end tells whether the template strips the message."""

_NULL_CONTENT = re.compile(r"\bcontent['\"]?\]?\s+(is|==)\s+(not\s+)?none\b", re.IGNORECASE)
"""How a template asks whether a message with calls says anything. Others would write the word None."""

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients send a message's reasoning; templates read the first, some the second."""


class ChatTemplate:
    """A model's chat template, compiled when it is first used. Thread-safe.

    source: the template, or several by name; of several, "tool_use" is taken when tools are given, else "default".
    bos_token, eos_token: their texts, which templates write themselves; None leaves the name undefined in the template.
    special_tokens: further names templates may use, such as unk_token or pad_token.

    Raises ChatTemplateError when there is no template to choose.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        *,
        bos_token: str | None = None,
        eos_token: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        named = {"default": source} if isinstance(source, str) else dict(source)
        for name, text in named.items():
            if not isinstance(text, str):
                raise ChatTemplateError(f"the chat template {name!r} is a {type(text).__name__}, not a string")
        if "default" not in named:
            raise ChatTemplateError(
                f"none of the chat templates {sorted(named)} is named 'default'; give the one to use as the template"
            )
        self._sources = named
        given = {"bos_token": bos_token, "eos_token": eos_token, **(special_tokens or {})}
        self._special_tokens = {name: text for name, text in given.items() if text is not None}

    @property
    def source(self) -> str:
        """The text of the default template."""
        return self._sources["default"]

    @property
    def source_with_tools(self) -> str:
        """The text of the template that conversations with tools are written by."""
        return self._sources.get("tool_use", self.source)

    @property
    def has_tools(self) -> bool:
        """Whether it says anywhere which functions there are."""
        return any(re.search(r"\btools\b", source) for source in self._sources.values())

    def with_source(self, source: str) -> ChatTemplate:
        """Another template that sees the same special tokens."""
        return ChatTemplate(source, special_tokens=self._special_tokens)

    def compile(self) -> None:
        """Compile now, to hear at once that a template is broken. Raises ChatTemplateError if one is."""
        for text in self._sources.values():
            _compile(text)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """Return the prompt text for a chat.

        messages: dicts of JSON values, at least one; keys whose value is None count as missing, but for the content
            beside `tool_calls` where the template asks for it.
        add_generation_prompt: end with the header of the assistant's next message.
        tools: JSON schemas of the functions the model may call.
        continue_final_message: leave the last message open, for the model to continue it; excludes
            `add_generation_prompt`.
        kwargs: further names for the template, such as `enable_thinking`; they win over the special tokens.

        The text holds the special tokens as text: encode it with `add_special_tokens=False`.

        Raises ChatTemplateError when the template does not compile, refuses the messages, uses what the sandbox
        forbids, or works without end.
        """
        if continue_final_message and add_generation_prompt:
            raise ChatTemplateError(
                "continue_final_message and add_generation_prompt exclude each other; to continue the last message, "
                "pass add_generation_prompt=False"
            )
        name = "tool_use" if tools is not None and "tool_use" in self._sources else "default"
        chat = _plain_messages(messages)
        if _NULL_CONTENT.search(self._sources[name]):
            for message in chat:
                if message.get("tool_calls") and not message.get("content"):
                    message["content"] = None
        opening = ""
        if continue_final_message:
            opening = _mark_final_message(chat, self._sources[name])
        names: dict[str, Any] = {**self._special_tokens, "documents": None}
        names.update(_plain(kwargs, "template arguments"))
        names.update(
            messages=chat,
            tools=None if tools is None else _plain(list(tools), "tools"),
            add_generation_prompt=add_generation_prompt,
        )
        text = _render(_compile(self._sources[name]), names)
        return _cut_at_mark(text, opening) if continue_final_message else text


def _render(template: jinja2.Template, names: dict[str, Any]) -> str:
    import jinja2

    try:
        return generate(template, names)
    except ChatTemplateError:
        raise
    except jinja2.exceptions.SecurityError as exc:
        raise ChatTemplateError(
            f"the chat template was refused, it reaches for what the sandbox forbids: {_reason(exc)}"
        ) from exc
    except jinja2.exceptions.UndefinedError as exc:
        raise ChatTemplateError(
            f"the chat template uses something that was not given: {_reason(exc)}; check that each message has the keys"
            " it needs"
        ) from exc
    except jinja2.exceptions.TemplateError as exc:
        raise ChatTemplateError(f"the chat template refuses these messages: {_reason(exc)}") from exc
    # A template is a program over values of the caller: whatever it raises, it is this chat that cannot be rendered.
    except Exception as exc:
        raise ChatTemplateError(
            f"the chat template failed on these messages ({type(exc).__name__}: {_reason(exc)}); check that roles and"
            " contents have the form the model expects"
        ) from exc


def _plain_messages(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ChatTemplateError(f"messages must be a list of dicts, got a {type(messages).__name__}")
    if not messages:
        raise ChatTemplateError("messages is empty; give at least one message")
    chat = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatTemplateError(
                f"messages[{index}] is a {type(message).__name__}; each message is a dict with 'role' and 'content'"
            )
        plain = _plain({key: value for key, value in message.items() if value is not None}, f"messages[{index}]")
        reasoning = next((plain[key] for key in _REASONING_KEYS if plain.get(key) is not None), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        chat.append(plain)
    return chat


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A deep copy made of plain JSON types, so that a template meets no method of a richer object."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > _MAX_DEPTH:
        raise ChatTemplateError(f"{where} is nested more than {_MAX_DEPTH} deep; give flatter values")
    if isinstance(value, Mapping):
        return {_plain(key, where, depth + 1): _plain(item, where, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where, depth + 1) for item in value]
    for scalar in (str, int, float):
        if isinstance(value, scalar):
            return getattr(scalar, "__str__" if scalar is str else f"__{scalar.__name__}__")(value)
    raise ChatTemplateError(f"{where} holds a {type(value).__name__}; only JSON values can be given to a chat template")


def _mark_final_message(chat: list[dict[str, Any]], source: str) -> str:
    """Append the mark to the text of the last message, in place, and return that text without it."""
    content = chat[-1].get("content")
    if content is None:
        raise ChatTemplateError("continue_final_message is set, but the last message has no 'content' to continue")
    if "content" not in source:
        raise ChatTemplateError("continue_final_message is set, but the chat template does not use 'content'")
    if isinstance(content, str):
        chat[-1]["content"] = content + _CONTINUE_MARK
        return content
    parts = content if isinstance(content, list) else []
    for part in reversed(parts):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + _CONTINUE_MARK
            return text
    raise ChatTemplateError("continue_final_message is set, but the last message has no text to continue")


def _cut_at_mark(text: str, opening: str) -> str:
    mark = _CONTINUE_MARK.strip()
    if mark not in text or opening.strip() not in text:
        raise ChatTemplateError(
            "continue_final_message is set, but this chat template drops or rewrites the last message, so there is no "
            "place to continue from"
        )
    end = text.rindex(mark)
    kept = text[:end]
    return kept if text.startswith(_CONTINUE_MARK, end) else kept.rstrip()


def _compile(source: str) -> jinja2.Template:
    import jinja2

    try:
        return compile_template(source)
    except ChatTemplateError:
        raise
    except jinja2.exceptions.TemplateError as exc:
        line = getattr(exc, "lineno", None)
        at = f" (line {line})" if line else ""
        raise ChatTemplateError(
            f"the chat template does not compile{at}: {_reason(exc)}; correct it or give another one"
        ) from exc
    # Python compiles what Jinja writes, and what is nested too deeply fails there in several ways.
    except Exception as exc:
        raise ChatTemplateError(
            f"the chat template does not compile, it is nested too deeply or malformed ({type(exc).__name__}:"
            f" {_reason(exc)}); give another one"
        ) from exc


def _reason(exc: Exception) -> str:
    """What a template says may be as long as it likes."""
    return str(exc)[:_MAX_REASON_CHARS]
