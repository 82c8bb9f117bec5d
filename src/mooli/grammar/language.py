"""From what a user wrote to a grammar of llguidance.

Owns the meaning of the four kinds of `Grammar`, the limits on what a grammar may cost, and the words of its refusal.
Nothing is left out in silence: a keyword that cannot be enforced is an error that names it and its place.

Sources: llguidance's syntax and JSON schema documents; SGLang's structural tags.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from mooli.errors import GrammarError
from mooli.grammar.constraint import error_text
from mooli.lark import JSON_OPTIONS, json_of, quoted, without_options
from mooli.raw_rules import Rules, escaped, parameters_of, takes_any
from mooli.types import Grammar, Reasoning

if TYPE_CHECKING:
    import llguidance

MAX_LEXER_FUEL = 200_000
"""For the first mask; 0.1 s of work. Without it a regex of 20 characters takes some seconds."""

MAX_LEXER_STATES = 50_000
"""Of one grammar, built as outputs need them: 1 to 2 KB each."""

PROBED_TOKENS = 4

_XML_END = r"/\n?<\/parameter>/"
"""Behind a value of `qwen_xml_parameter`."""

_DATA = ("enum", "const", "default", "examples")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")


def compiled(grammar: Grammar, vocabulary: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """A matcher at the start of the language, with its first mask computed.

    Raises GrammarError that says what is wrong with the grammar, and where.
    """
    # Alone first: from behind free text nothing of it would be built yet, and places in it would be others.
    matcher, starts = _checked(grammar, _written(grammar), vocabulary, [b""]), [b""]
    if grammar.kind == "calls" and grammar.calls is not None and not grammar.calls.is_forced:
        return matcher
    if grammar.reasoning is None and (grammar.calls is None or grammar.kind == "calls"):
        return matcher
    if grammar.calls is not None and grammar.kind != "calls":
        alone = Grammar("calls", "", replace(grammar.calls, is_forced=True))
        _checked(alone, _written(alone), vocabulary, [b""])
    if grammar.reasoning is not None:
        starts.append(_shortest(grammar.reasoning).encode())
    return _checked(grammar, _with_what_is_beside(grammar, _written(grammar)), vocabulary, starts)


def _checked(
    grammar: Grammar, text: str, vocabulary: llguidance.LLTokenizer, starts: Sequence[bytes]
) -> llguidance.LLMatcher:
    """starts: where to look into the language, besides its beginning."""
    import llguidance

    limits = llguidance.LLParserLimits(
        initial_lexer_fuel=MAX_LEXER_FUEL, max_lexer_states=MAX_LEXER_STATES, verbose_errors=False
    )
    matcher = llguidance.LLMatcher(vocabulary, text, log_level=0, limits=limits)
    error = matcher.get_error() or next(
        filter(None, (_probed(matcher, vocabulary.tokenize_bytes(start)) for start in starts)), ""
    )
    if error:
        raise GrammarError(f"{grammar.argument}: {_explained(error_text(error), grammar)}")
    if matcher.is_stopped():
        raise GrammarError(f"{grammar.argument}: the only output it allows is an empty one")
    return matcher


def _probed(matcher: llguidance.LLMatcher, start_ids: Sequence[int]) -> str:
    """Walk a few tokens into the language: what is only built there is built here, or fails here. What failed."""
    probe = matcher.deep_copy()
    if start_ids and not probe.consume_tokens(list(start_ids)):
        return ""  # a vocabulary that cannot write the texts around reasoning; nothing is wrong with the grammar
    for _ in range(PROBED_TOKENS):
        mask = np.frombuffer(probe.compute_bitmask(), np.uint8)
        if probe.is_stopped() or not mask.any():
            break
        word = int(np.flatnonzero(mask)[-1])
        probe.consume_token(word * 8 + int(mask[word]).bit_length() - 1)
    return probe.get_error()


def _written(grammar: Grammar) -> str:
    """The grammar alone, as llguidance reads it."""
    if grammar.kind == "calls":
        return _calls_alone(grammar)
    return _LANGUAGES[grammar.kind](grammar.text)


# -- calls and reasoning beside it -------------------------------------------------------------------------------------
_TEXT = "AHEAD_TEXT: /(.|\\n)*/"


def _calls_alone(grammar: Grammar) -> str:
    """Calls; where they are not forced, any text up to the first text that begins them, and then calls. If reasoning is
    told, what begins a call there is a word of it."""
    calls = grammar.calls
    if calls is None:
        raise GrammarError("calls: there are none")
    if calls.is_forced:
        return f"start: calls\n{calls.text}"
    begun = f"AHEAD_TEXT ({_any_of(calls.triggers)})"
    rules = ["start: ahead_begun calls_after_trigger | AHEAD_TEXT", _TEXT]
    if grammar.reasoning is not None:
        # One lexeme up to the call: of text and a marker in it, each its own, the longer would always be read.
        behind = f"AHEAD_TEXT {quoted(grammar.reasoning.closing)} {begun}"
        if grammar.reasoning.is_open:
            begun = behind
        else:
            opening = f"/\\s*/ {quoted(grammar.reasoning.opening)}"
            rules += [
                f"AHEAD_PLAIN: {begun}",
                f"AHEAD_OPENED: {opening} AHEAD_TEXT",
                f"AHEAD_BEHIND: {opening} {behind}",
            ]
            begun = "(AHEAD_PLAIN & ~AHEAD_OPENED) | AHEAD_BEHIND"
        rules.append(f"AHEAD_BEGUN: {begun}")
        begun = "AHEAD_BEGUN"
    return "\n".join([*rules, f"ahead_begun[lazy]: {begun}", calls.text])


def _with_what_is_beside(grammar: Grammar, alone: str) -> str:
    """The grammar behind its reasoning, with the calls that an output may be instead.

    Reasoning is text up to its closing one, found as soon as it is there, so inside a token too. What follows is a
    grammar of its own, whatever its kind: names of its rules mean nothing here. Models put an empty line between the
    two.
    """
    calls = None if grammar.kind == "calls" else grammar.calls
    rules, body = [_TEXT], "@ahead_rest"
    reasoning = grammar.reasoning
    if reasoning is not None and reasoning.words and grammar.kind != "calls":
        body = f"{quoted(reasoning.words)} {body}"
    if calls is not None:
        rules.append(calls.text)
        body = f"(calls | {body})"
    rules.append(f"ahead_body: {body}")
    if reasoning is None:
        rules.append("start: ahead_body")
    else:
        banned = () if grammar.calls is None or not reasoning.calls_end_it else grammar.calls.triggers
        rules += _reasoning_rules(reasoning, banned)
    rest = json.loads(alone)["grammars"][0] if alone.startswith("{") else {"lark_grammar": alone}
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}, {**rest, "name": "ahead_rest"}]})


def _reasoning_rules(reasoning: Reasoning, banned: Sequence[str]) -> list[str]:
    """`start`: reasoning, and then `ahead_body`. banned: texts that reasoning has not."""
    rules = [f"AHEAD_CLOSED: AHEAD_TEXT {quoted(reasoning.closing)}"]
    words = "AHEAD_CLOSED"
    if banned:
        rules.append(f"AHEAD_BANNED: AHEAD_TEXT ({_any_of(banned)}) AHEAD_TEXT")
        words = "AHEAD_CLOSED & ~AHEAD_BANNED"
    rules += [f"AHEAD_WORDS: {words}", "ahead_reasoning[lazy]: AHEAD_WORDS"]
    block = f"{quoted(reasoning.opening)} ahead_reasoning"
    if reasoning.again:
        again = quoted(reasoning.again)
        begun = f"ahead_reasoning {again} " if reasoning.is_open else ""
        rules.append(f"start: {begun}ahead_block* ahead_body")
        rules.append(f"ahead_block: {block} {again}")
    else:
        rules.append("AHEAD_LINES: /\\n{1,2}/")
        rules.append(f"ahead_block: {'ahead_reasoning' if reasoning.is_open else block} AHEAD_LINES?")
        rules.append(f"start: ahead_block ahead_body{'' if reasoning.is_open else ' | ahead_body'}")
    return rules


def _shortest(reasoning: Reasoning) -> str:
    """An output up to where its own words begin."""
    opening = "" if reasoning.is_open else reasoning.opening
    return opening + reasoning.closing + reasoning.again + reasoning.words


def _any_of(texts: Sequence[str]) -> str:
    return " | ".join(map(quoted, texts))


# -- the four kinds ----------------------------------------------------------------------------------------------------
def _json_schema(text: str) -> str:
    import llguidance

    return llguidance.LLMatcher.grammar_from_json_schema(json.dumps(_schema(json.loads(text))), overrides=JSON_OPTIONS)


def _schema(schema: Any) -> dict[str, Any]:
    if schema is True:
        return {}
    if not isinstance(schema, dict):
        raise GrammarError(f"json_schema: a schema is an object, not {_short(schema)}")
    return without_options(schema)


def _regex(text: str) -> str:
    import llguidance

    # It is the whole output that matches, so anchors at its ends say nothing; in their place they are not supported.
    pattern = text.removeprefix("^")
    if re.search(r"(?<!\\)(?:\\\\)*\$$", pattern):
        pattern = pattern[:-1]
    return llguidance.LLMatcher.grammar_from_regex(pattern)


def _ebnf(text: str) -> str:
    import llguidance

    try:
        return llguidance.grammar_from("ebnf", text)
    except (ValueError, RecursionError) as exc:
        raise GrammarError(f"ebnf: {exc}") from exc


def _lark(text: str) -> str:
    """A grammar as part of another: without the line of options that only a whole one has."""
    return _ebnf(text).removeprefix("%llguidance {}")


def _structural_tag(text: str) -> str:
    import llguidance

    tag = json.loads(text)
    if not isinstance(tag, dict):
        raise GrammarError(f"structural_tag: it is an object, not {_short(tag)}")
    writer = _TagWriter()
    if "structures" in tag:
        structures = _list(tag, "structures")
        form: Any = {
            "type": "triggered_tags",
            "triggers": _list(tag, "triggers"),
            "tags": [
                {
                    "begin": _field(item, "begin", f"structures[{i}]"),
                    "content": {"type": "json_schema", "json_schema": item.get("schema", True)},
                    "end": _field(item, "end", f"structures[{i}]"),
                }
                for i, item in enumerate(structures)
            ],
            "at_least_one": tag.get("at_least_one", False),
        }
    elif "format" in tag:
        form = tag["format"]
    else:
        raise GrammarError("structural_tag: it has neither format, nor structures and triggers")
    start = writer.expression(form, "format")
    return llguidance.LLMatcher.grammar_from_lark("\n".join([f"start: {start}", *writer.rules]))


class _TagWriter:
    """Writes the formats of a structural tag as rules of Lark."""

    def __init__(self) -> None:
        self.rules = ["TEXT: /(.|\\n)*/"]

    def expression(self, form: Any, where: str) -> str:
        """Lark for a format. Raises GrammarError for one that is not known, with its place."""
        if not isinstance(form, dict):
            raise GrammarError(f"structural_tag: {where} is {_short(form)}, not an object with a type")
        kind = form.get("type")
        if form.get("excludes"):
            raise GrammarError(f"structural_tag: {where}.excludes cannot be enforced: leave it out")
        if kind == "const_string":
            return _quoted(_field(form, "value", where))
        if kind == "json_schema":
            return self._rule(json_of(_schema(form.get("json_schema", True)), JSON_OPTIONS))
        if kind == "qwen_xml_parameter":
            return self._xml_parameters(form, where)
        if kind == "regex":
            return self._rule("/" + _field(form, "pattern", where).replace("/", r"\/") + "/")
        if kind == "grammar":
            # The brace that ends it stands in a line of its own, as the last one may be a comment.
            return self._rule(f"%lark {{\n{_lark(_field(form, 'grammar', where))}\n}}")
        if kind == "any_text":
            return "TEXT"
        if kind == "repeat":
            least, most = form.get("min", 0), form.get("max", -1)
            if not _is_count(least) or not (most in (None, -1) or (_is_count(most) and most >= max(1, least))):
                given = f"min={_short(least)} and max={_short(most)}"
                raise GrammarError(f"structural_tag: {where} repeats from {given}; max: -1 for any number")
            times = f"{least},{'' if most in (None, -1) else most}"
            return self._rule(f"({self.expression(form.get('content'), f'{where}.content')}){{{times}}}")
        if kind in ("sequence", "or"):
            elements = _list(form, "elements", where)
            if not elements:
                raise GrammarError(f"structural_tag: {where}.elements is empty")
            parts = [self.expression(item, f"{where}.elements[{i}]") for i, item in enumerate(elements)]
            return self._rule((" " if kind == "sequence" else " | ").join(parts))
        if kind in ("optional", "star", "plus"):
            mark = {"optional": "?", "star": "*", "plus": "+"}[kind]
            return self._rule(f"({self.expression(form.get('content'), f'{where}.content')}){mark}")
        if kind == "tag":
            begin = _quoted(_field(form, "begin", where), " ")
            return self._rule(f"{begin}{self._content(form, where)}" or '""')
        if kind == "triggered_tags":
            return self._triggered(form, where)
        if kind == "tags_with_separator":
            tags = [
                self.expression({**item, "type": "tag"}, f"{where}.tags[{i}]") for i, item in self._tags(form, where)
            ]
            one = self._rule(" | ".join(tags))
            many = self._rule(f"{one} ({_quoted(_field(form, 'separator', where), ' ')}{one})*")
            some = one if form.get("stop_after_first") else many
            return some if form.get("at_least_one") else f"({some})?"
        raise GrammarError(f"structural_tag: {where}.type={_short(kind)} is not supported")

    def _content(self, form: Mapping[str, Any], where: str) -> str:
        """What is inside a tag, and its end. Any text there ends with the first end of the tag."""
        content, end = form.get("content"), _quoted(_field(form, "end", where))
        inside = self.expression(content, f"{where}.content")
        if inside == "TEXT" and end:
            return self._rule(f"TEXT {end}", "[lazy]")
        return f"{inside} {end}"

    def _xml_parameters(self, form: Mapping[str, Any], where: str) -> str:
        """Raw values between tags, in the order of the schema; a line break may stand on both sides of each tag."""
        schema, place = _schema(form.get("json_schema", True)), f"structural_tag: {where}.json_schema"
        rules = Rules(mark=f"{len(self.rules)}_")
        told = []
        for key, value, is_required in parameters_of(schema, place):
            if not key or re.search(r"[<>\n]", key):
                raise GrammarError(f"{place}: {_short(key)} cannot be the name in a tag")
            one = self._xml_parameter(rules, escaped(key), value, schema, f"{place}.properties.{key}")
            told.append(one if is_required else f"({one})?")
        if takes_any(schema):
            more = schema.get("additionalProperties")
            any_one = self._xml_parameter(rules, r"[^<>\n]+", more, schema, f"{place}.additionalProperties")
            told = [f"({any_one})*"]
        self.rules += rules.lines
        return self._rule(" ".join(told) or '""')

    def _xml_parameter(self, rules: Rules, key: str, schema: Any, root: Mapping[str, Any], where: str) -> str:
        """key: a regular expression for the name."""
        # White space and the tag beside it are one lexeme: of two that begin alike, the longer would always be read.
        opening = rules.add(f"/\\n?<parameter={key}>\\n?/", is_terminal=True)
        return f"{opening} {rules.value(schema, root, '</parameter>', _XML_END, where)}"

    def _triggered(self, form: Mapping[str, Any], where: str) -> str:
        """Free text up to a trigger, from where on one of its tags is enforced; and again."""
        triggers = _list(form, "triggers", where)
        if not triggers or not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise GrammarError(f"structural_tag: {where}.triggers must be texts that are not empty")
        bodies: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        for i, tag in self._tags(form, where):
            begin = _field(tag, "begin", f"{where}.tags[{i}]")
            trigger = next((text for text in triggers if begin.startswith(text)), None)
            if trigger is None:
                raise GrammarError(f"structural_tag: {where}.tags[{i}].begin={_short(begin)} begins with no trigger")
            rest = {**tag, "type": "tag", "begin": begin[len(trigger) :]}
            bodies[trigger].append(self.expression(rest, f"{where}.tags[{i}]"))
        calls = []
        for trigger, tags in bodies.items():
            if tags:
                head = self._rule(f"TEXT {_quoted(trigger)}", "[lazy]")
                calls.append(self._rule(f"{head} ({' | '.join(tags)})"))
        if not calls:
            raise GrammarError(f"structural_tag: {where}.tags is empty")
        call = self._rule(" | ".join(calls))
        if form.get("stop_after_first"):
            return call if form.get("at_least_one") else f"({call} | TEXT)"
        return self._rule(f"{call}{'+' if form.get('at_least_one') else '*'} TEXT")

    def _tags(self, form: Mapping[str, Any], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
        tags = _list(form, "tags", where)
        if not tags:
            raise GrammarError(f"structural_tag: {where}.tags is empty")
        for i, tag in enumerate(tags):
            if not isinstance(tag, dict):
                raise GrammarError(f"structural_tag: {where}.tags[{i}] is {_short(tag)}, not an object")
            yield i, tag

    def _rule(self, body: str, options: str = "") -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}")
        return name


_LANGUAGES = {"json_schema": _json_schema, "regex": _regex, "ebnf": _ebnf, "structural_tag": _structural_tag}


def _list(form: Mapping[str, Any], name: str, where: str = "") -> list[Any]:
    value = form.get(name)
    if not isinstance(value, list):
        raise GrammarError(f"structural_tag: {where}{'.' if where else ''}{name} must be a list, not {_short(value)}")
    return value


def _field(form: Any, name: str, where: str) -> str:
    value = form.get(name) if isinstance(form, dict) else None
    if not isinstance(value, str):
        raise GrammarError(f"structural_tag: {where}.{name} must be a text, not {_short(value)}")
    return value


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _quoted(text: str, then: str = "") -> str:
    """A literal of Lark; nothing for no text."""
    return quoted(text) + then if text else ""


# -- refusals ----------------------------------------------------------------------------------------------------------
def _explained(message: str, grammar: Grammar) -> str:
    """llguidance's message with the place of what it names."""
    if grammar.kind == "json_schema":
        return _of_schema(message, json.loads(grammar.text))
    if grammar.calls is None:
        return message
    # A function's schema is a rule of its own: its line has that, and whoever names the rule is the call.
    found = re.match(r"at (\d+)\(\d+\): failed to compile JSON schema: (.*)", message)
    if found is None:
        return message
    rule, _, body = _calls_alone(grammar).splitlines()[int(found[1]) - 1].partition(":")
    call = re.search(rf'^\w+: *("(?:[^"\\]|\\.)*")[^\n]*\b{re.escape(rule)}\b', grammar.calls.text, re.MULTILINE)
    where = f" in the parameters of the call that begins {_short(json.loads(call[1]))}" if call else ""
    with contextlib.suppress(ValueError):
        schema, _ = json.JSONDecoder().raw_decode(body.partition("%json ")[2])
        return _of_schema(found[2], schema) + where
    return found[2] + where


def _of_schema(message: str, schema: Any) -> str:
    keys = re.match(r"Unimplemented keys: \[(.*)\]", message)
    if keys:
        names = re.findall(r'"([^"]+)"', keys[1])
        places = [place for name in names for place in _places(schema, lambda node, name=name: name in node, name)]
        return f"{', '.join(names)} cannot be enforced{_at(places)}: leave it out, or say it in another way"
    unknown = re.match(r"Unknown format: (.*)", message)
    if unknown:
        return message + _at(_places(schema, lambda node: node.get("format") == unknown[1], "format"))
    return message


def _at(places: list[str]) -> str:
    return f" (at {', '.join(places[:3])})" if places else ""


def _places(node: Any, is_it: Any, keyword: str, path: str = "#") -> list[str]:
    """JSON pointers to a keyword of the schemas in `node`."""
    found: list[str] = []
    if isinstance(node, list):
        for i, item in enumerate(node):
            found += _places(item, is_it, keyword, f"{path}/{i}")
    elif isinstance(node, dict):
        if is_it(node):
            found.append(f"{path}/{keyword}")
        for name, value in node.items():
            if name in _NAMED and isinstance(value, dict):
                for key, item in value.items():
                    found += _places(item, is_it, keyword, f"{path}/{name}/{key}")
            elif name not in _DATA:
                found += _places(value, is_it, keyword, f"{path}/{name}")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
