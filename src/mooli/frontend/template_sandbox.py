"""The sandbox a chat template runs in: what it may call, and what each call may cost.

Owns the Jinja environment and its meter. A template comes with the model, so it is code of somebody else: it may fail,
but it must not reach the interpreter, hang the caller or take its memory. It runs in Jinja's immutable sandbox, any use
of an underscore attribute is refused, and all that can make or look through much is metered before it is done: loop
rounds, calls, filters, tests, methods of strings, operators, comparisons and what is written. Filters and methods are
those on a list; of them, the answers are Jinja's own. Nothing is computed while a template is compiled.

What the meter cannot end is one operation on values within its bounds, such as sorting a list or splitting a string: it
takes less than a second. Never knows what a message is.
"""

from __future__ import annotations

import json
import re
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any

from mooli.errors import ChatTemplateError

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE_CHARS = 1 << 17
"""Published templates have up to 40,000."""

_MAX_LEXEMES = 40_000
_MAX_BRACKETS = 100
_MAX_ELIFS = 500
_MAX_NAMES_BY_BRANCHES = 2_000_000
"""Jinja looks through all names at each branch."""

_MAX_STEPS = 1_000_000
"""Loop rounds, calls and parts of values looked at in one render. A chat of a thousand messages takes some ten
thousand."""

_MAX_SECONDS = 5.0
"""Processor time of one render."""

_MAX_CHARS = 1 << 23
"""Characters in any one string; a million tokens of context are about four million."""

_MAX_WORK_CHARS = 1 << 27
"""Characters made in one render, all together."""

_MAX_NUMBER_BITS = 1 << 14
_MAX_PRECISION = 100
_MAX_FILL_CHARS = 64
_MAX_CONVERSIONS = 1000
_MAX_STRIPPED = 256
_PIECE_CHARS = 16
"""What a piece of a split string takes beside its characters."""

_READS_A_CHAR = 8
"""Characters that can be looked through in the time in which one is made."""

_SHORT_CHARS = 512
"""A string up to here is paid for, and whether that was too much is seen at the next step."""

_STEPS_A_LOOK = 200
"""So often the clock is looked at."""


class Meter:
    """What one render may still do. Raises ChatTemplateError when it is used up."""

    def __init__(self) -> None:
        self._steps_left = _MAX_STEPS
        self._chars_left = _MAX_WORK_CHARS
        self._until_look = _STEPS_A_LOOK
        self._ends_at = time.thread_time() + _MAX_SECONDS

    def spend(self, num_steps: int = 1, num_chars: int = 0) -> None:
        self._steps_left -= num_steps
        self._chars_left -= num_chars
        if self._steps_left < 0:
            raise ChatTemplateError(
                f"the chat template took more than {_MAX_STEPS} loop rounds and calls; it probably never ends. "
                "Check the template, or give another one"
            )
        if self._chars_left < 0:
            raise ChatTemplateError(
                f"the chat template makes more than {_MAX_WORK_CHARS} characters on its way; shorten the messages or"
                " check the template"
            )
        self._until_look -= num_steps + (num_chars >> 12)
        if self._until_look < 0:
            self._until_look = _STEPS_A_LOOK
            if time.thread_time() > self._ends_at:
                raise ChatTemplateError(
                    f"the chat template worked for more than {_MAX_SECONDS:g} seconds; shorten the messages or check"
                    " the template"
                )

    def make(self, num_chars: int) -> None:
        """A string of so many characters is about to be made."""
        if num_chars > _MAX_CHARS:
            raise ChatTemplateError(
                f"the chat template makes a text of more than {_MAX_CHARS} characters; shorten the messages or check "
                "the template"
            )
        self.spend(0, num_chars)

    def made(self, value: Any) -> Any:
        """`value`, which is there now and may be kept."""
        if isinstance(value, str):
            if len(value) <= _SHORT_CHARS:
                self._chars_left -= len(value)
            else:
                self.make(len(value))
        elif isinstance(value, (list, tuple, dict)):
            self.spend(0, _PIECE_CHARS * len(value))
        return value

    def weigh(self, value: Any) -> tuple[int, int, int]:
        """Characters, parts and depth of a value, whatever it shares with itself: (chars, parts, depth)."""
        if isinstance(value, str):
            return len(value), 1, 0
        if not isinstance(value, (list, tuple, dict)):
            return _number_chars(value), 1, 0
        chars, parts, deepest = 0, 0, 0
        waiting: list[tuple[Iterator[Any], int]] = [(iter((value,)), 0)]
        while waiting:
            items, depth = waiting[-1]
            for item in items:
                parts += 1
                if isinstance(item, str):
                    chars += len(item)
                elif isinstance(item, (list, tuple, dict)):
                    self.spend(1 + len(item))
                    inside = iter(_keys_and_values(item)) if isinstance(item, dict) else iter(item)
                    waiting.append((inside, depth + 1))
                    deepest = max(deepest, depth + 1)
                    break
                else:
                    chars += _number_chars(item)
            else:
                waiting.pop()
            if chars > _MAX_CHARS:
                self.make(chars)
        return chars, parts, deepest

    def read(self, value: Any) -> Any:
        """`value`, which is about to be looked through: compared, searched or hashed."""
        if isinstance(value, str):
            if len(value) > _SHORT_CHARS:
                self.spend(0, len(value) // _READS_A_CHAR)
        elif isinstance(value, (list, tuple, dict)):
            self.weigh(value)
        return value

    def text(self, value: Any) -> str:
        """`str(value)`; a string of markup stays one."""
        if isinstance(value, str):
            self.made(value)
            return value
        if isinstance(value, (list, tuple, dict)):
            chars, parts, _ = self.weigh(value)
            self.make(chars + 4 * parts)
        return str(value)

    def rounds(self, values: Any, chars_a_round: int = 0) -> Any:
        """`values`, each of which costs a step and so many characters when it is taken."""
        if not hasattr(values, "__iter__"):
            return values
        return _Rounds(self, values, chars_a_round) if hasattr(values, "__len__") else self._each(values, chars_a_round)

    def _each(self, values: Iterable[Any], chars_a_round: int) -> Iterator[Any]:
        for value in values:
            self.spend(1, chars_a_round)
            yield value


class _Rounds:
    """Keeps the length that `loop.length` asks for, and the ends that `last` and `reverse` begin at."""

    def __init__(self, meter: Meter, values: Any, chars_a_round: int) -> None:
        self._meter, self._values, self._chars = meter, values, chars_a_round

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        return self._meter._each(self._values, self._chars)

    def __reversed__(self) -> Iterator[Any]:
        return self._meter._each(reversed(self._values), self._chars)


_current: ContextVar[Meter] = ContextVar("mooli_chat_template_meter")


_meter = _current.get


def generate(template: jinja2.Template, names: dict[str, Any]) -> str:
    """The text that `template` makes of `names`. Raises ChatTemplateError where it costs too much, and whatever the
    template raises."""
    chunks: list[str] = []
    num_chars = 0
    meter = Meter()
    token = _current.set(meter)
    try:
        for chunk in template.generate(names):
            chunks.append(chunk)
            num_chars += len(chunk)
            meter.make(num_chars if num_chars > _MAX_CHARS else len(chunk))
    finally:
        _current.reset(token)
    return "".join(chunks)


@lru_cache(maxsize=16)
def compile_template(source: str) -> jinja2.Template:
    """Raises ChatTemplateError for a source that is too large to compile in a moment, and whatever Jinja raises."""
    if len(source) > MAX_SOURCE_CHARS:
        raise ChatTemplateError(
            f"the chat template has {len(source)} characters; at most {MAX_SOURCE_CHARS} are compiled. Give another one"
        )
    environment = _environment()
    _check_lexemes(environment, source)
    return environment.from_string(_metered(environment, source))


def _check_lexemes(environment: ImmutableSandboxedEnvironment, source: str) -> None:
    """What is deep or long takes the compilers' stack and time; here it has neither."""
    brackets = branches = elifs = 0
    names: set[str] = set()
    for count, (_, kind, text) in enumerate(environment.lex(source)):
        if kind == "operator":
            brackets += (text in "([{") - (text in ")]}")
        elif kind == "name":
            branches += text in ("if", "elif", "for")
            elifs += text == "elif"
            names.add(text)
        is_slow = len(names) * branches > _MAX_NAMES_BY_BRANCHES
        if count > _MAX_LEXEMES or brackets > _MAX_BRACKETS or elifs > _MAX_ELIFS or is_slow:
            raise ChatTemplateError(
                f"the chat template is too large or too deep to compile: more than {_MAX_LEXEMES} parts,"
                f" {_MAX_BRACKETS} open brackets, {_MAX_ELIFS} times elif, or names times branches. Give another one"
            )


_LOOP = "mooli_rounds"
_TEXT = "mooli_text"
_READ = "mooli_read"
_SEARCHED = "mooli_searched"
_MADE = "mooli_made"


def _metered(environment: ImmutableSandboxedEnvironment, source: str) -> jinja2.nodes.Template:
    """Parse, and put the meter around what Jinja computes without asking the environment."""
    import jinja2
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    refused: dict[type[nodes.Node], str] = {
        nodes.Include: "include",
        nodes.Import: "import",
        nodes.FromImport: "import",
        nodes.Extends: "extends",
        nodes.ScopedEvalContextModifier: "autoescape",
    }

    def through(name: str, expression: Any, *arguments: nodes.Expr) -> Any:
        parts = expression.items if isinstance(expression, (nodes.List, nodes.Tuple)) else [expression]
        if name != _LOOP and all(isinstance(part, nodes.Const) for part in parts):
            return expression
        return nodes.Filter(expression, name, list(arguments), [], None, None, lineno=expression.lineno)

    class Metered(NodeTransformer):
        def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
            if (tag := refused.get(type(node))) is not None:
                raise jinja2.exceptions.TemplateAssertionError(f"a chat template has no {tag}", node.lineno)
            return super().generic_visit(node, *args, **kwargs)

        def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 — Jinja asks for these names
            if node.recursive:
                raise jinja2.exceptions.TemplateAssertionError("a chat template has no recursive loop", node.lineno)
            self.generic_visit(node)
            written = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            node.iter = through(_LOOP, node.iter, nodes.Const(written, lineno=node.lineno))
            return node

        def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
            self.generic_visit(node)
            node.nodes = [through(_TEXT, part) for part in node.nodes]
            made: nodes.Node = through(_MADE, node)
            return made

        def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
            self.generic_visit(node)
            node.expr = through(_READ, node.expr)
            for operand in node.ops:
                operand.expr = through(_SEARCHED if "in" in operand.op else _READ, operand.expr)
            return node

        def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
            self.generic_visit(node)
            if not isinstance(node.arg, nodes.Slice):
                return node
            if isinstance(node.node, nodes.Const):  # of which Python warns, as it has the constant before it
                node.node = nodes.List([node.node], lineno=node.lineno)
                node.node = nodes.Filter(node.node, "first", [], [], None, None, lineno=node.lineno)
            part: nodes.Node = through(_MADE, node)
            return part

        def visit_Pair(self, node: nodes.Pair) -> nodes.Node:  # noqa: N802
            self.generic_visit(node)
            node.key = through(_READ, node.key)
            return node

    tree: nodes.Template = Metered().visit(environment.parse(source))
    tree.set_environment(environment)
    return tree


@lru_cache(maxsize=1)
def _environment() -> ImmutableSandboxedEnvironment:
    # Imported here, not above: an engine that is given token ids never needs Jinja, and it costs 40 ms.
    import jinja2
    from jinja2 import nodes, runtime, sandbox
    from jinja2.ext import Extension, loopcontrols

    class Formatter(sandbox.SandboxedFormatter):
        def format_field(self, value: Any, format_spec: str) -> Any:
            _check_widths(format_spec)
            if isinstance(value, (list, tuple, dict)):
                value = _meter().text(value)
            return _meter().made(super().format_field(value, format_spec))

        def convert_field(self, value: Any, conversion: Any) -> Any:
            if conversion is not None:
                chars, parts, _ = _meter().weigh(value)
                _meter().make(chars + 4 * parts)
            return super().convert_field(value, conversion)

    class Environment(sandbox.ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"*", "**", "+", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+" and type(left) is str and type(right) is str:
                return _meter().made(left + right)  # of two strings that were paid for
            _check_operation(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: Any, called: Any, /, *args: Any, **kwargs: Any) -> Any:
            meter = _meter()
            meter.spend()
            if not isinstance(called, runtime.Macro):
                args = _checked_call(called, args, kwargs)
            return meter.made(super().call(context, called, *args, **kwargs))

        def getitem(self, obj: Any, argument: Any) -> Any:
            return super().getitem(obj, _meter().read(argument) if isinstance(argument, tuple) else argument)

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            if super().wrap_str_format(value) is None:
                return None
            text, takes_mapping = value.__self__, value.__name__ == "format_map"
            if type(text) is not str:
                raise jinja2.exceptions.SecurityError("format of text that is marked as safe")

            def formatted(*args: Any, **kwargs: Any) -> str:
                if takes_mapping:
                    (kwargs,), args = args, ()
                return Formatter(self).vformat(text, args, kwargs)

            return formatted

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
        def __repr__(self) -> str:
            return "<Namespace>"

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

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def strftime_now(form: str) -> str:
        _meter().make(len(form) * _MAX_STRIPPED)  # as much as the library makes of a form at most
        return datetime.now().strftime(form)

    environment = Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[GenerationBlocks, loopcontrols],
        optimized=False,
        # pass_context keeps Jinja from running this while it compiles.
        finalize=jinja2.pass_context(_text),
    )
    tables: Any = environment  # Jinja declares them more narrowly than it uses them
    tables.filters = _filters(tables.filters)
    tables.tests = _tests(tables.tests)
    del environment.globals["lipsum"]
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=make_dict, namespace=namespace
    )
    return environment


def _filters(jinjas: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The filters of a template by name: Jinja's own behind the meter."""
    import jinja2

    def around(name: str, check: Callable[..., Any]) -> Callable[..., Any]:
        """`check` is given what the filter is given, and returns what is filtered."""
        function = jinjas[name]
        has_context = hasattr(function, "jinja_pass_arg")

        @wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            context, (value, *rest) = (args[:1], args[1:]) if has_context else ((), args)
            _meter().spend()
            return _meter().made(function(*context, check(value, *rest, **kwargs), *rest, **kwargs))

        return metered

    def take(value: Any, *_: Any, **__: Any) -> Any:
        return value

    def rounds(value: Any, *_: Any, **__: Any) -> Any:
        return _meter().rounds(value)

    def compared(value: Any, *_: Any, **__: Any) -> Any:
        values = list(_meter().rounds(value))
        _meter().read(values)
        return values

    def text(value: Any, *_: Any, **__: Any) -> str:
        return _meter().text(value)

    def words(value: Any, *_: Any, **__: Any) -> str:
        made = _meter().text(value)
        _meter().spend(0, _PIECE_CHARS * len(made))
        return made

    def by_method(name: str) -> Callable[..., Any]:
        def check(value: Any, *args: Any, **kwargs: Any) -> str:
            made = _meter().text(value)
            _meter().make(_STRING_METHODS[name](made, *args, **kwargs))
            return made

        return check

    def indented(value: Any, width: int | str = 4, *_: Any, **__: Any) -> str:
        if not isinstance(value, str):
            raise TypeError(f"a {type(value).__name__} has no lines to indent")
        made = _meter().text(value)
        lines = made.splitlines()
        _meter().make(len(made) + (len(lines) + 1) * (1 + (width if isinstance(width, int) else len(width))))
        return made

    def joined(value: Any, d: Any = "", attribute: Any = None) -> list[Any]:
        values = list(_meter().rounds(value))
        if attribute is None:
            values = [_meter().text(item) for item in values]
            _meter().make(sum(map(len, values)) + len(values) * len(_meter().text(d)))
        elif values:
            # What the attributes are is seen when they are there; each is at most all of the values.
            chars, parts, _ = _meter().weigh(values)
            _meter().make(chars + 4 * parts + len(values) * len(_meter().text(d)))
        return values

    def rounded(value: Any, precision: int = 0, *_: Any, **__: Any) -> Any:
        if abs(precision) > _MAX_PRECISION:
            raise ChatTemplateError(f"the chat template rounds to {str(precision)[:40]} digits")
        return value

    def formatted(value: Any, *args: Any, **kwargs: Any) -> str:
        made = _meter().text(value)
        _meter().make(_formatted_chars(made, kwargs or args))
        return made

    @jinja2.pass_context
    def total(context: Any, value: Any, attribute: Any = None, start: Any = 0) -> Any:
        from jinja2.filters import make_attrgetter

        of = make_attrgetter(context.environment, attribute) if attribute is not None else take
        for item in _meter().rounds(value):
            start = context.environment.call_binop(context, "+", start, of(item))
        return start

    checks: dict[Callable[..., Any], tuple[str, ...]] = {
        take: ("abs", "attr", "count", "d", "default", "first", "float", "int", "items", "last", "length"),
        rounds: ("list", "map", "reject", "rejectattr", "reverse", "select", "selectattr"),
        compared: ("groupby", "max", "min", "sort", "unique"),
        text: ("capitalize", "e", "escape", "lower", "safe", "string", "upper"),
        words: ("title", "wordcount"),
    }
    allowed = {name: around(name, check) for check, names in checks.items() for name in names}
    allowed["reverse"] = around(
        "reverse", lambda value: _meter().text(value) if isinstance(value, str) else rounds(value)
    )
    allowed["truncate"] = around("truncate", lambda value, *_, **__: text(value) if isinstance(value, str) else value)
    allowed["dictsort"] = around("dictsort", lambda value, *_, **__: _meter().read(value))
    allowed["replace"] = _with_context(jinjas["replace"], by_method("replace"))
    centered, stripped = by_method("center"), by_method("strip")
    allowed["center"] = around("center", lambda value, width=80: centered(value, width))
    allowed["trim"] = around("trim", lambda value, chars=None: stripped(value, chars))
    allowed["indent"] = around("indent", indented)
    allowed["join"] = around("join", joined)
    allowed["round"] = around("round", rounded)
    allowed["format"] = around("format", formatted)
    allowed["sum"] = total
    allowed["tojson"] = _to_json
    for name, own in ((_LOOP, _rounds), (_TEXT, _text), (_READ, _read), (_SEARCHED, _searched), (_MADE, _made)):
        allowed[name] = jinja2.pass_context(own)
    return allowed


def _with_context(function: Callable[..., Any], check: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def metered(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        _meter().spend()
        return _meter().made(function(context, check(value, *args, **kwargs), *args, **kwargs))

    return metered


def _tests(jinjas: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """The tests of a template by name: those that compare or compute behind the meter."""
    free = {"defined", "undefined", "filter", "test", "none", "boolean", "false", "true", "integer", "float", "string"}
    free |= {"mapping", "number", "sequence", "iterable", "callable", "sameas", "escaped"}

    def reading(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def metered(*args: Any) -> Any:
            meter = _meter()
            meter.spend()
            return function(*map(meter.read, args))

        return metered

    def of_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def metered(*args: Any) -> Any:
            if any(isinstance(arg, str) for arg in args):
                raise TypeError("a string is neither odd nor even nor divisible")
            return function(*args)

        return metered

    counted = ("odd", "even", "divisibleby")
    return {
        name: test if name in free else of_numbers(test) if name in counted else reading(test)
        for name, test in jinjas.items()
    }


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not Jinja's own: that one escapes HTML characters, and no model was trained on these escapes.
    meter = _meter()
    chars, parts, depth = meter.weigh(value)
    fill = 0 if indent is None else len(indent) if isinstance(indent, str) else max(0, indent)
    fills = [fill, *map(len, separators or ())]
    if max(fills) > _MAX_FILL_CHARS:
        raise ChatTemplateError(f"the chat template indents or separates JSON by {max(fills)} characters")
    meter.make(chars + parts * (4 + fill * depth + sum(fills)))
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# What the meter has put into the template, as filters.


def _rounds(context: Any, values: Any, chars_a_round: int) -> Any:
    return _meter().rounds(values, chars_a_round)


def _text(context: Any, value: Any) -> str:
    return _meter().text(value)


def _read(context: Any, value: Any) -> Any:
    is_small = value is None or value is True or value is False or (type(value) is str and len(value) <= _SHORT_CHARS)
    return value if is_small else _meter().read(value)


def _searched(context: Any, value: Any) -> Any:
    """A table is searched by the hashes of its keys, whatever it holds."""
    return value if isinstance(value, dict) else _meter().read(value)


def _made(context: Any, value: Any) -> Any:
    return _meter().made(value)


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Pay for `left operator right`, before it is computed."""
    meter = _meter()
    meter.spend()
    if operator == "%":
        if isinstance(left, str):
            meter.make(_formatted_chars(left, right))
    elif operator == "+":
        if isinstance(left, str) and isinstance(right, str):
            meter.make(6 * (len(left) + len(right)))  # what is marked as safe escapes the other
        elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
            meter.make(_PIECE_CHARS * (len(left) + len(right)))
    elif isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(right, 0)
        if bits > _MAX_NUMBER_BITS:
            raise ChatTemplateError(f"the chat template computes a number of {bits} bits")
    else:
        for text, count in ((left, right), (right, left)):
            if isinstance(text, (str, list, tuple)) and isinstance(count, int):
                meter.make((1 if isinstance(text, str) else _PIECE_CHARS) * len(text) * count)


def _checked_call(called: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call that may be made. ChatTemplateError for a method that is not on the lists, or would make
    too much."""
    meter = _meter()
    owner = getattr(called, "__self__", None)
    is_method = isinstance(called, (types.BuiltinMethodType, types.MethodType))
    if is_method and isinstance(owner, str):
        name = called.__name__
        if name not in _STRING_METHODS:
            raise ChatTemplateError(
                f"the chat template calls {name!r} of a string, which is not among what it may call"
            )
        if name == "join" and args:
            args = ([meter.text(item) for item in meter.rounds(args[0])], *args[1:])
        factor = 1 if type(owner) is str else 6  # text that is marked as safe escapes what is put into it
        meter.make(factor * _STRING_METHODS[name](owner, *args, **kwargs))
        return args
    if isinstance(called, types.BuiltinMethodType) and not isinstance(owner, types.ModuleType):
        names = next((names for kind, names in _METHODS.items() if isinstance(owner, kind)), ())
        if called.__name__ not in names:
            raise ChatTemplateError(
                f"the chat template calls {called.__name__!r} of a {type(owner).__name__}, which is not among what it"
                " may call"
            )
        if called.__name__ in ("count", "index"):
            meter.read(owner)
    for arg in (*args, *kwargs.values()):
        meter.read(arg)
    return args


_METHODS: dict[type, tuple[str, ...]] = {
    dict: ("copy", "get", "items", "keys", "values"),
    list: ("copy", "count", "index"),
    tuple: ("count", "index"),
    int: ("bit_length",),
    float: ("is_integer",),
}
"""Methods that only look, by the type they are of. Those of strings are in `_STRING_METHODS`."""


def _same(text: str, *_: Any, **__: Any) -> int:
    return len(text)


def _grown(text: str, *_: Any, **__: Any) -> int:
    return 3 * len(text)


def _filled(text: str, width: int = 0, *_: Any, **__: Any) -> int:
    return max(len(text), width)


def _replaced(text: str, old: Any, new: Any, *_: Any, **__: Any) -> int:
    old, new = _meter().text(old), _meter().text(new)
    times = text.count(old) if old else len(text) + 1
    return len(text) + times * max(0, len(new) - len(old))


def _stripped(text: str, chars: Any = None, *_: Any, **__: Any) -> int:
    if isinstance(chars, str) and len(chars) > _MAX_STRIPPED:
        raise ChatTemplateError(f"the chat template strips {len(chars)} different characters")
    return len(text)


def _tabbed(text: str, tabsize: int = 8) -> int:
    return len(text) + text.count("\t") * max(0, tabsize)


def _joined(text: str, values: Iterable[Any]) -> int:
    lengths = [len(value) for value in values]
    return sum(lengths) + len(lengths) * len(text)


_STRING_METHODS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("capitalize", "casefold", "lower", "swapcase", "title", "upper"), _grown),
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _filled),
    **dict.fromkeys(("count", "endswith", "find", "index", "rfind", "rindex", "startswith"), _same),
    **dict.fromkeys(("partition", "removeprefix", "removesuffix", "rpartition"), _same),
    **dict.fromkeys(("isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower"), _same),
    **dict.fromkeys(("isnumeric", "isprintable", "isspace", "istitle", "isupper"), _same),
    **dict.fromkeys(("split", "rsplit", "splitlines"), _same),
    **dict.fromkeys(("strip", "lstrip", "rstrip"), _stripped),
    "replace": _replaced,
    "expandtabs": _tabbed,
    "join": _joined,
}
"""Methods of strings that a template may call, and how many characters each makes or looks through."""

_CONVERSION = re.compile(r"%(?:\([^)]{0,200}\))?[-#0 +]*(\*|\d*)(?:\.(\*|\d*))?")


def _formatted_chars(form: str, values: Any) -> int:
    """Characters of `form % values` at most."""
    if form.count("%") > _MAX_CONVERSIONS:
        raise ChatTemplateError(f"the chat template formats more than {_MAX_CONVERSIONS} values at once")
    widths = [number for match in _CONVERSION.finditer(form) for number in match.groups() if number]
    if "*" in widths or any(len(number) > 6 for number in widths):
        raise ChatTemplateError("the chat template formats to a width that it computes or that is out of all measure")
    if isinstance(values, Mapping):
        values = dict(values)
    chars, parts, _ = _meter().weigh(values)
    return len(form) + sum(map(int, widths)) + form.count("%") * (chars + 4 * parts + 400)


def _check_widths(spec: str) -> None:
    if any(len(number) > 6 for number in re.findall(r"\d+", spec)):
        raise ChatTemplateError("the chat template formats to a width that is out of all measure")


def _number_chars(value: Any) -> int:
    return value.bit_length() // 3 if isinstance(value, int) else 0


def _keys_and_values(value: Mapping[Any, Any]) -> Iterator[Any]:
    for key, item in value.items():
        yield key
        yield item
