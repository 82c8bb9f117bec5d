"""Chat messages to prompt text, through the model's own Jinja template.

Owns the sandbox the template runs in and what the template may see: plain JSON data, the special tokens' texts, and the
few functions that published templates use. Renders what Hugging Face's `apply_chat_template` renders. Never turns text
into ids and never touches the messages it was given.

A template comes with the model, so it is code of somebody else. It runs in Jinja's immutable sandbox, any use of an
underscore attribute is refused, and every render has a budget of work and of text, so that a template can fail but not
hang the caller. Jinja filters that pad text run unmetered: this is no replacement for trust in the model's origin.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from mooli.errors import ChatTemplateError

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

_MAX_STEPS = 300_000
"""Loop rounds and calls in one render. A chat of a thousand messages takes some ten thousand."""

_MAX_CHARS = 32_000_000
"""Characters in one render and in any string made on the way; a million tokens of context are about four million."""

_MAX_POWER_BITS = 4096

_CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_MARK "
"""Put after the message to continue; what follows it in the rendered text is the template's closing of the message. The
space at its end tells whether the template strips the message."""

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
"""Names under which clients send a message's reasoning; templates read the first, some the second."""

_LOOP_FILTER = "mooli_counted"
_TEXT_FILTER = "mooli_bounded"


class _Budget:
    def __init__(self) -> None:
        self._steps_left = _MAX_STEPS

    def spend(self, num_steps: int = 1) -> None:
        self._steps_left -= num_steps
        if self._steps_left < 0:
            raise ChatTemplateError(
                f"the chat template took more than {_MAX_STEPS} loop rounds and calls; it probably never ends. "
                "Check the template, or give another one"
            )


_budget: ContextVar[_Budget | None] = ContextVar("mooli_chat_template_budget", default=None)


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

        messages: dicts of JSON values, at least one; keys whose value is None count as missing.
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

    chunks: list[str] = []
    num_chars = 0
    token = _budget.set(_Budget())
    try:
        for chunk in template.generate(names):
            chunks.append(chunk)
            num_chars += len(chunk)
            _check_length(num_chars)
    except ChatTemplateError:
        raise
    except jinja2.exceptions.SecurityError as exc:
        raise ChatTemplateError(
            f"the chat template was refused, it reaches for what the sandbox forbids: {exc}"
        ) from exc
    except jinja2.exceptions.UndefinedError as exc:
        raise ChatTemplateError(
            f"the chat template uses something that was not given: {exc}; check that each message has the keys it needs"
        ) from exc
    except jinja2.exceptions.TemplateError as exc:
        raise ChatTemplateError(f"the chat template refuses these messages: {exc}") from exc
    # A template is a program over values of the caller: whatever it raises, it is this chat that cannot be rendered.
    except Exception as exc:
        raise ChatTemplateError(
            f"the chat template failed on these messages ({type(exc).__name__}: {exc}); check that roles and contents "
            "have the form the model expects"
        ) from exc
    finally:
        _budget.reset(token)
    return "".join(chunks)


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


def _plain(value: Any, where: str) -> Any:
    """A deep copy made of plain JSON types, so that a template meets no method of a richer object."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(item, where) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
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


@lru_cache(maxsize=16)
def _compile(source: str) -> jinja2.Template:
    import jinja2

    environment = _environment()
    try:
        return environment.from_string(_metered(environment, source))
    except jinja2.exceptions.TemplateError as exc:
        line = getattr(exc, "lineno", None)
        at = f" (line {line})" if line else ""
        raise ChatTemplateError(
            f"the chat template does not compile{at}: {exc}; correct it or give another one"
        ) from exc
    except RecursionError as exc:
        raise ChatTemplateError("the chat template is nested too deeply to compile") from exc


def _metered(environment: ImmutableSandboxedEnvironment, source: str) -> jinja2.nodes.Template:
    """Parse, then pass what every loop runs over and every `~` result through a filter that watches the budget."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def through(name: str, expression: nodes.Node) -> nodes.Filter:
        return nodes.Filter(expression, name, [], [], None, None, lineno=expression.lineno)

    class Meter(NodeTransformer):
        def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 — Jinja asks for this name
            self.generic_visit(node)
            node.iter = through(_LOOP_FILTER, node.iter)
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 — Jinja asks for this name
            self.generic_visit(node)
            return through(_TEXT_FILTER, node)

    tree: nodes.Template = Meter().visit(environment.parse(source))
    tree.set_environment(environment)
    return tree


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    # Imported here, not above: an engine that is given token ids never needs Jinja, and it costs 40 ms.
    import jinja2
    from jinja2 import nodes, sandbox
    from jinja2.ext import Extension, loopcontrols

    class Environment(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "+"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "*":
                for text, count in ((left, right), (right, left)):
                    if isinstance(text, (str, list)) and isinstance(count, int):
                        _check_length(len(text) * count)
            whole = isinstance(left, int) and isinstance(right, int)
            if operator == "**" and whole and left.bit_length() * max(right, 0) > _MAX_POWER_BITS:
                raise jinja2.exceptions.SecurityError(f"{left} ** {right} is too large a number")
            return _bounded(super().call_binop(context, operator, left, right))

        def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
            _spend()
            return super().call(context, called, *args, **kwargs)

        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            # Jinja hands out an undefined value, which prints as nothing. A template that reaches for the interpreter
            # is refused at once instead; a changing method such as `append` stays undefined, as templates may ask for
            # it.
            if attribute.startswith("_") or sandbox.is_internal_attribute(obj, attribute):
                raise jinja2.exceptions.SecurityError(f"attribute {attribute!r} of a {type(obj).__name__}")
            return super().unsafe_undefined(obj, attribute)

    class GenerationBlocks(Extension):
        """`{% generation %}` marks the assistant's words for training; for a prompt it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 — Jinja declares it as an instance variable

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> str:
            return str(caller())

    class Namespace(jinja2.utils.Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r}")
            super().__setitem__(name, value)

    def namespace(*args: Any, **kwargs: Any) -> Namespace:
        made = Namespace()
        for name, value in dict(*args, **kwargs).items():
            made[name] = value
        return made

    def make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # Not Jinja's own: that one escapes HTML characters, and no model was trained on these escapes.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.now().strftime(form)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlocks, loopcontrols])
    # pass_context keeps Jinja from running these while it compiles.
    environment.filters[_LOOP_FILTER] = jinja2.pass_context(lambda context, value: _counted(value))
    environment.filters[_TEXT_FILTER] = jinja2.pass_context(lambda context, value: _bounded(value))
    environment.filters["tojson"] = tojson
    del environment.globals["lipsum"]
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=make_dict, namespace=namespace
    )
    return environment


def _spend(num_steps: int = 1) -> None:
    budget = _budget.get()
    if budget is not None:
        budget.spend(num_steps)


def _check_length(num_chars: int) -> None:
    if num_chars > _MAX_CHARS:
        raise ChatTemplateError(
            f"the chat template makes a text of more than {_MAX_CHARS} characters; shorten the messages or check the "
            "template"
        )


def _bounded(value: Any) -> Any:
    if isinstance(value, (str, list)):
        _check_length(len(value))
    return value


def _counted(value: Iterable[Any]) -> Iterable[Any]:
    try:
        _spend(len(value))  # type: ignore[arg-type]
    except TypeError:
        return _count_each(value)
    return value


def _count_each(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend()
        yield value
