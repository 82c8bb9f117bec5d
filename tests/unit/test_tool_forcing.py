"""What an answer is held to when tools and reasoning are in play: grammars behind reasoning, calls, budgets."""

from __future__ import annotations

import itertools
import json
import random

import numpy as np
import pytest
from fake_engine import EOS, VOCAB_SIZE, FakeEngine, byte_tokenizer, says

from mooli.errors import GrammarError, RequestError
from mooli.frontend.parts import PLAIN_TEXT
from mooli.frontend.sampling import parse_sampling_params
from mooli.frontend.tool_forcing import tool_grammar
from mooli.frontend.tools import Tool, ToolSet
from mooli.frontend.wire_formats.choice import CALL_FORMATS, MessageFormat
from mooli.frontend.wire_formats.hermes import Hermes
from mooli.frontend.wire_formats.json_list import JsonList
from mooli.frontend.wire_formats.reasoning import REASONING_FORMATS, Harmony, ReasoningPair
from mooli.grammar import language
from mooli.grammar.compiler import Compilation
from mooli.grammar.constraint import GrammarConstraint
from mooli.grammar.language import compiled
from mooli.grammar.thinking import Markers, ThinkingConstraint
from mooli.grammar.vocabulary import open_vocabulary
from mooli.types import Calls, Grammar, Reasoning, ThinkingBudget, TokenBytes

POINT = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}
THINK = ReasoningPair("qwen3", "<think>", "</think>")
FORMAT = MessageFormat(THINK, Hermes("hermes"), JsonList())
OPEN, MAYBE = Reasoning("<think>", "</think>", True), Reasoning("<think>", "</think>", False)
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
TOOLS = (Tool("f", parameters=POINT), Tool("g", parameters={"type": "object", "properties": {"s": {"type": "string"}}}))

PIECES = [b"<tool_call>", b"</tool_call>", b"<think>", b"</think>", b">\n\n", b'ink>{"', b"\xc3", b"<|channel|>"]
TOKENS = [bytes([byte]) for byte in range(256)] + PIECES + [b"<eos>"]
SIZE = len(TOKENS)
BYTES = TokenBytes(TOKENS, [SIZE - 1], [SIZE - 1], [256, 257, 258, 259, 263])


@pytest.fixture(scope="module")
def vocabulary():
    return open_vocabulary(BYTES, SIZE)


@pytest.fixture
def fake(monkeypatch):
    return FakeEngine(monkeypatch)


def calls(*, forced, tools=TOOLS, parallel=True):
    call_format = Hermes("hermes")
    tool_set = ToolSet(tools, "required", parallel)
    return Calls(call_format.calls_grammar(tool_set), forced, call_format.triggers())


def held_to(vocabulary, grammar):
    return GrammarConstraint(Compilation(grammar, matcher=compiled(grammar, vocabulary)))


def ids_of(*parts):
    """Texts byte by byte; bytes are one token."""
    return [i for part in parts for i in ([TOKENS.index(part)] if isinstance(part, bytes) else part.encode())]


def allowed(made, drafts=()):
    masks = np.zeros((1 + len(drafts), -(-SIZE // 32)), np.uint32)
    made.mask(drafts, masks)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def accepts(made, *parts):
    for token_id in ids_of(*parts):
        if made.has_ended or token_id not in allowed(made)[0]:
            return False
        made.advance([token_id])
    return made.has_ended or SIZE - 1 in allowed(made)[0]


# -- grammars behind reasoning -----------------------------------------------------------------------------------------
KINDS = [
    ("json_schema", json.dumps(POINT), '{"a":1}', "{}"),
    ("regex", "^ab+$", "abb", "a"),
    ("ebnf", 'start: ahead_body "!"\nahead_body: "x"\n%ignore / /', "x !", "x"),
    ("ebnf", 'root ::= "x" [0-9]+ tail\ntail ::= "!"', "x12!", "x12"),
    (
        "structural_tag",
        json.dumps({"structures": [{"begin": "<f>", "schema": POINT, "end": "</f>"}], "triggers": ["<f>"]}),
        'hi <f>{"a":1}</f>',
        "<f>1",
    ),
]


@pytest.mark.parametrize(("kind", "text", "right", "wrong"), KINDS)
def test_all_kinds_hold_behind_reasoning_and_nothing_holds_in_it(vocabulary, kind, text, right, wrong):
    for ahead in (
        ["{é <", b"</think>"],
        ["{</think>"],
        ["</thin</think>\n"],
        ["x</think", b">\n\n"],
        [b"</think>", "\n\n"],
    ):
        assert accepts(held_to(vocabulary, Grammar(kind, text, None, OPEN)), *ahead, right), ahead
        assert not accepts(held_to(vocabulary, Grammar(kind, text, None, OPEN)), *ahead, wrong), ahead
    assert not accepts(held_to(vocabulary, Grammar(kind, text, None, OPEN)), "never closed")


def test_an_answer_whose_prompt_says_nothing_may_reason_or_not(vocabulary):
    grammar = Grammar("json_schema", json.dumps(POINT), None, MAYBE)
    for ahead in ([], [b"<think>", "hm", b"</think>", "\n\n"], ["<think>hm</think>"]):
        assert accepts(held_to(vocabulary, grammar), *ahead, '{"a":1}'), ahead
    assert not accepts(held_to(vocabulary, grammar), "hm", b"</think>", '{"a":1}')


def test_a_token_that_closes_reasoning_and_begins_the_answer_is_right_by_construction(vocabulary):
    grammar = Grammar("json_schema", json.dumps(POINT), None, OPEN)
    assert accepts(held_to(vocabulary, grammar), "x</th", b'ink>{"', 'a":1}')
    made = held_to(vocabulary, Grammar("regex", "x", None, OPEN))
    made.advance(ids_of("x</th"))
    assert TOKENS.index(b'ink>{"') not in allowed(made)[0]
    drafts = ids_of("ink>x")
    assert made.num_allowed([*drafts, ord("y")]) == len(drafts) - 1
    assert allowed(made, drafts[:-1])[-1] == {ord("x"), ord("\n")}


def test_harmony_holds_in_the_final_channel(vocabulary):
    reasoning = Harmony().reasoning_ahead("<|start|>assistant")
    grammar = Grammar("json_schema", json.dumps(POINT), None, reasoning)
    thought = "<|channel|>analysis<|message|>{ hm<|end|><|start|>assistant"
    final = '<|channel|>final<|message|>{"a":1}'
    for said, is_right in ((final, True), (thought + final, True), (thought * 2 + final, True), ('{"a":1}', False)):
        assert accepts(held_to(vocabulary, grammar), said.replace("<|channel|>", "\0")) is False
        parts = said.split("<|channel|>")
        tokens = [part for text in parts for part in (b"<|channel|>", text)][1:]
        assert accepts(held_to(vocabulary, grammar), *tokens) == is_right, said
    assert Harmony().reasoning_ahead("<|channel|>final<|message|>") is None
    assert Harmony().reasoning_ahead("<|channel|>analysis<|message|>").is_open


@pytest.mark.parametrize(
    ("pair", "tail", "expected"),
    [
        (THINK, "assistant\n", MAYBE),
        (THINK, "assistant\n<think>\n", OPEN),
        (THINK, "assistant\n<think>\n\n</think>\n\n", None),
        (ReasoningPair("r1", "<think>", "</think>", starts_inside=True), "assistant\n", OPEN),
        (ReasoningPair("r1", "<think>", "</think>", starts_inside=True).continued, "assistant\n", MAYBE),
        (FORMAT, "<think>", OPEN),
        (PLAIN_TEXT, "<think>", None),
    ],
)
def test_the_end_of_the_prompt_says_whether_an_answer_reasons(pair, tail, expected):
    assert pair.reasoning_ahead(tail) == expected


def test_places_of_errors_are_those_of_the_grammar_alone(vocabulary):
    wrong = json.dumps({"properties": {"x": {"not": {}}}})
    for grammar in (
        Grammar("json_schema", wrong, None, OPEN),
        Grammar("json_schema", wrong, calls(forced=False), OPEN),
    ):
        with pytest.raises(GrammarError, match=r"^json_schema: not cannot be enforced \(at #/properties/x/not\)"):
            compiled(grammar, vocabulary)


# -- calls -------------------------------------------------------------------------------------------------------------
def test_a_forced_call_is_nothing_but_calls(vocabulary):
    grammar = Grammar("calls", "", calls(forced=True), OPEN)
    for said in ([CALL], ["hm", b"</think>", "x"], ["hm", b"</think>", CALL.replace("1", "x")]):
        assert not accepts(held_to(vocabulary, grammar), *said), said
    tokens = [b"<tool_call>", CALL[11:-12], b"</tool_call>"]
    assert accepts(held_to(vocabulary, grammar), "hm", b"</think>", "\n\n", *tokens)
    assert accepts(held_to(vocabulary, grammar), "hm", b"</think>", *tokens, "\n", *tokens)
    one = Grammar("calls", "", calls(forced=True, parallel=False), OPEN)
    assert not accepts(held_to(vocabulary, one), "hm", b"</think>", *tokens, "\n", *tokens)


@pytest.mark.parametrize("trigger", [[b"<tool_call>"], ["<tool_call>"]])
def test_reasoning_holds_no_call(vocabulary, trigger):
    """A parser would end the reasoning there."""
    made = held_to(vocabulary, Grammar("calls", "", calls(forced=True), OPEN))
    *before, last = ids_of("hm", *trigger)
    for token_id in before:
        assert token_id in allowed(made)[0]
        made.advance([token_id])
    assert last not in allowed(made)[0]


def test_free_calls_are_text_up_to_a_trigger_and_then_calls(vocabulary):
    grammar = Grammar("calls", "", calls(forced=False))
    tokens = [b"<tool_call>", CALL[11:-12], b"</tool_call>"]
    for said in (
        ["any <tool_cal text"],
        [""],
        ["text ", *tokens],
        [b"<think>", "x", b"</think>", *tokens, "\n", *tokens],
    ):
        assert accepts(held_to(vocabulary, grammar), *said), said
    for said in ([b"<tool_call>", "x"], ["<tool_call>x"], [b"<tool_call>"]):
        assert not accepts(held_to(vocabulary, grammar), *said), said


def test_what_begins_a_call_in_reasoning_that_no_call_ends_is_a_word_of_it(vocabulary):
    tokens = [b"<tool_call>", CALL[11:-12], b"</tool_call>"]
    for is_open in (True, False):
        begun = [] if is_open else [" \n", b"<think>"]
        grammar = Grammar("calls", "", calls(forced=False), Reasoning("<think>", "</think>", is_open, "", "", False))
        for said in (
            [*begun, "never closed ", b"<tool_call>", "x"],
            [*begun, b"<tool_call>", "x", b"</think>", "text <tool_cal"],
            [*begun, b"<tool_call>", "x", b"</think>", "text ", *tokens, "\n", *tokens],
            [*begun, "<tool_call></thin</think>", *tokens],
            [""],
        ):
            assert accepts(held_to(vocabulary, grammar), *said), said
        for said in (
            [*begun, b"<tool_call>", "x", b"</think>", b"<tool_call>", "x"],
            [*begun, "x", b"</think>", "<tool_call>x"],
            [*begun, "x", b"</think>", *tokens, "x"],
        ):
            assert not accepts(held_to(vocabulary, grammar), *said), said
        if not is_open:
            assert accepts(held_to(vocabulary, grammar), "text ", *tokens)
            assert not accepts(held_to(vocabulary, grammar), "text <think>", b"<tool_call>", "x"), "none is begun later"
        forced = Grammar("calls", "", calls(forced=True), grammar.reasoning)
        assert accepts(held_to(vocabulary, forced), *begun[1:], b"<tool_call>", "x", b"</think>", *tokens)


@pytest.mark.parametrize(
    ("reasoning", "form", "expected"),
    [
        ("qwen3", "hermes", True),
        ("deepseek-r1", "hermes", False),
        ("deepseek-r1", "trinity", True),
        ("minimax-m3", "minimax-m3", False),
        ("gpt-oss", "gpt-oss", True),
    ],
)
def test_a_call_ends_reasoning_where_the_parser_ends_it_and_only_there(reasoning, form, expected):
    wire_format = MessageFormat(REASONING_FORMATS[reasoning], CALL_FORMATS[form]).with_tools(ToolSet(STRICT))
    opening = getattr(wire_format.without_calls, "opening", "<|channel|>analysis<|message|>")
    ahead = wire_format.reasoning_ahead(opening)
    assert ahead is not None and ahead.is_open and ahead.calls_end_it == expected
    held = tool_grammar(wire_format, ToolSet(STRICT), {})
    assert parse(**held, reasoning_ahead=ahead).grammar == Grammar(
        "calls", "", held["calls"], None if expected else ahead
    )
    if reasoning != "gpt-oss":
        trigger = CALL_FORMATS[form].triggers()[0]
        parts = wire_format.parser(opening).push(f"m{trigger}", [1] * (1 + len(trigger)))
        assert "".join(part.text for part in parts) == ("m" if expected else f"m{trigger}"[: -len(trigger)] + trigger)


@pytest.mark.parametrize(("kind", "text", "right", "wrong"), KINDS[:4])
def test_beside_a_grammar_of_the_user_an_answer_is_a_call_or_held_to_it(vocabulary, kind, text, right, wrong):
    tokens = [b"<tool_call>", CALL[11:-12], b"</tool_call>"]
    for reasoning, ahead in ((None, []), (OPEN, ["x", b"</think>", "\n"])):
        grammar = Grammar(kind, text, calls(forced=False), reasoning)
        assert accepts(held_to(vocabulary, grammar), *ahead, *tokens)
        assert accepts(held_to(vocabulary, grammar), *ahead, right)
        assert not accepts(held_to(vocabulary, grammar), *ahead, wrong)
        assert not accepts(held_to(vocabulary, grammar), *ahead, b"<tool_call>", "x")


def test_a_schema_of_a_tool_that_cannot_be_enforced_is_named(vocabulary):
    tools = (TOOLS[0], Tool("bad", parameters={"type": "object", "properties": {"x": {"items": {"not": {}}}}}))
    words = r'^tools: not cannot be enforced \(at #/properties/x/items/not\).*in the parameters of.*"bad"'
    for grammar in (
        Grammar("calls", "", calls(forced=True, tools=tools)),
        Grammar("regex", "a", calls(forced=False, tools=tools)),
    ):
        with pytest.raises(GrammarError, match=words):
            compiled(grammar, vocabulary)


@pytest.mark.parametrize("name", sorted(CALL_FORMATS))
def test_calls_of_every_format_can_be_forced_free_and_beside_a_grammar(vocabulary, name):
    wire_format = MessageFormat(THINK, CALL_FORMATS[name], JsonList())
    for choice, params, kind in (
        ("required", {}, "calls"), ("auto", {}, "calls"), ("auto", {"regex": "xy"}, "regex")
    ):  # fmt: skip
        for parallel in (True, False):
            found = tool_grammar(wire_format, ToolSet(STRICT, choice, parallel), params)
            if not found:
                assert choice == "auto" and not params, "a format whose calls begin as any text does"
                continue
            reasoning = None if choice == "auto" and not params else OPEN
            made = held_to(vocabulary, Grammar(kind, "xy" if params else "", found["calls"], reasoning))
            if choice == "auto":
                assert accepts(made, *([] if reasoning is None else ["z", b"</think>", "\n"]), "xy")


STRICT = (Tool("f", parameters=POINT, strict=True), TOOLS[1])


def test_which_calls_are_enforced():
    def made(choice, tools=TOOLS, wire_format=FORMAT, **params):
        found = tool_grammar(wire_format, ToolSet(tools, choice), params)
        return found.get("calls")

    assert tool_grammar(FORMAT, None, {}) == {}
    assert made("none") is made("auto") is made("auto", ()) is made("none", STRICT, json_schema="{}") is None
    assert made("required").is_forced
    assert json.dumps(POINT)[1:-1] in made("required").text
    held = made("auto", STRICT)
    assert not held.is_forced and held.triggers == ("<tool_call>",)
    assert json.dumps(POINT)[1:-1] in held.text and '"s"' not in held.text, "only strict tools' schemas are enforced"
    beside = made("auto", json_schema="{}")
    assert beside is not None and '"a"' not in beside.text
    unknown = MessageFormat(PLAIN_TEXT, None, JsonList())
    assert '"parameters' in made("required", wire_format=unknown).text.replace("\\", "")
    assert made("auto", STRICT, wire_format=unknown) is None
    assert made("required", wire_format=unknown).triggers == ()
    with pytest.raises(RequestError, match="there are none"):
        made("required", ())
    deep: dict = {}
    for _ in range(100_000):
        deep = {"items": deep}
    for wrong in (Tool("f", parameters=deep), Tool("\ud800"), Tool("f", parameters={"const": "a" * (1 << 20)})):
        with pytest.raises(RequestError, match=r"^tools "):
            made("required", (wrong,))
    with pytest.raises(RequestError, match="not known how this model writes calls"):
        made("required", wire_format=PLAIN_TEXT)


def parse(**params):
    return parse_sampling_params(params, vocab_size=100, next_seed=itertools.count().__next__)


def test_a_forced_call_and_a_grammar_exclude_each_other():
    forced, free = calls(forced=True), calls(forced=False)
    with pytest.raises(GrammarError, match="json_schema is given, and a tool must be called"):
        parse(json_schema="{}", calls=forced)
    assert parse(calls=forced, reasoning_ahead=OPEN).grammar == Grammar("calls", "", forced, OPEN)
    assert parse(calls=free, reasoning_ahead=OPEN).grammar == Grammar("calls", "", free)
    assert parse(calls=free, regex="a", reasoning_ahead=OPEN).grammar == Grammar("regex", "a", free, OPEN)
    for name in ("calls", "reasoning_ahead"):
        with pytest.raises(RequestError, match=f"no sampling parameter '{name}'"):
            parse(**{name: "start: "})


# -- budgets -----------------------------------------------------------------------------------------------------------
def test_how_a_budget_is_given():
    assert parse().thinking is parse(max_thinking_tokens=-1).thinking is None
    assert parse(max_thinking_tokens=5).thinking == ThinkingBudget(5)
    assert parse(custom_params={"thinking_budget": 5}, reasoning_ahead=OPEN).thinking == ThinkingBudget(5, OPEN)
    assert parse(max_thinking_tokens=5, reasoning_ahead=None).thinking is None
    for params in ({"max_thinking_tokens": 1.5}, {"max_thinking_tokens": -2}, {"custom_params": {"x": 1}}):
        with pytest.raises(RequestError, match=next(iter(params))):
            parse(**params)


def budget(max_tokens, reasoning=OPEN, held=None):
    return ThinkingConstraint(max_tokens, Markers(ThinkingBudget(max_tokens, reasoning), BYTES), held)


def test_after_so_many_tokens_the_closing_text_is_all_that_may_come():
    made = budget(3)
    assert len(allowed(made)[0]) >= SIZE
    assert made.forced(8) == []
    assert [len(row) for row in allowed(made, ids_of("abc"))][1:] == [len(allowed(made)[0])] * 2 + [1]
    made.advance(ids_of("abc"))
    closing = TOKENS.index(b"</think>")
    assert made.forced(8) == [closing] and allowed(made) == [{closing}]
    assert made.num_allowed([closing, 5]) == 2 and made.num_allowed([5]) == 0
    made.advance([closing])
    assert made.forced(8) == [] and len(allowed(made)[0]) >= SIZE


@pytest.mark.parametrize(
    ("reasoning", "said", "then"),
    [
        (OPEN, "ab</th", "ink>"),
        (OPEN, "ab<", "/think>"),
        (OPEN, "", "</think>"),
        (MAYBE, "<think>", "</think>"),
        (MAYBE, " \n<think>ab", "</think>"),
    ],
)
def test_closing_text_that_is_half_written_is_completed(reasoning, said, then):
    made = budget(0, reasoning)
    place = made._markers.start
    for token_id in ids_of(said):
        place = made._markers.after(place, token_id)
    written = b""
    while (must := made._markers.must_follow(place, 0)) is not None:
        written += TOKENS[must]
        place = made._markers.after(place, must)
    assert written == then.encode() and place.phase == "over"


def test_half_a_character_is_finished_first_and_no_reasoning_has_no_bound():
    made = budget(1)
    made.advance(ids_of(b"\xc3"))
    assert made.forced(1) == [], "the character is not whole"
    made.advance([0xA9])
    assert made.forced(1) == [TOKENS.index(b"</think>")]
    free = budget(0, MAYBE)
    free.advance(ids_of("hm<think>"))
    assert free.forced(1) == []


HARMONY = Harmony().reasoning_ahead("<|start|>assistant<|channel|>analysis<|message|>")


def test_a_bound_holds_for_all_messages_of_reasoning_together():
    made = budget(3, HARMONY)
    for said, due in (("ab", []), ("c", [ord("<")]), ("<|end|>", []), ("<|start|>assistant", [])):
        made.advance(ids_of(said))
        assert made.forced(1) == due, said
    more, final = ids_of("<|channel|>analysis<|message|>"), ids_of("<|channel|>final<|message|>and so on")
    assert made.num_allowed(final) == len(final)
    made.advance(more)
    assert bytes(made.forced(99)) == b"<|end|>"


@pytest.mark.parametrize("reasoning", [OPEN, MAYBE, HARMONY], ids=["open", "maybe", "harmony"])
def test_whatever_is_sampled_reasoning_ends_in_time(reasoning):
    """Tokens at random of what is allowed, those that may end or begin reasoning more often."""
    rng = random.Random(4)
    likely = ids_of("<></think>|", b"<think>", b"\n", b"\xc3", "\xe9", b">\n\n")
    for trial in range(60):
        most = rng.randrange(12)
        made = budget(most, reasoning)
        written, num_inside = b"" if reasoning.is_open else reasoning.opening.encode(), 0
        made.advance([*written])
        for _ in range(60):
            masks = np.zeros((1, -(-SIZE // 32)), np.uint32)
            made.mask([], masks)
            ids = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")[: SIZE - 1])
            ids = ids if len(ids) == 1 or rng.random() < 0.3 else np.intersect1d(ids, likely)
            token_id = int(rng.choice(ids))
            assert made.forced(1) in ([], [token_id]) and made.num_allowed([token_id]) == 1
            made.advance([token_id])
            written += TOKENS[token_id]
            if reasoning.closing.encode() in written:
                break
            num_inside += 1
        assert reasoning.closing.encode() in written, written
        assert num_inside <= most + 3 + len(reasoning.closing), (trial, most, written)


def test_a_budget_and_a_grammar_hold_together(vocabulary):
    made = budget(2, OPEN, held_to(vocabulary, Grammar("regex", "ab+", None, OPEN)))
    made.advance(ids_of("hm"))
    assert allowed(made) == [{TOKENS.index(b"</think>")}]
    assert made.num_allowed(ids_of(b"</think>", "abx")) == 3
    made.advance(ids_of(b"</think>"))
    assert allowed(made)[0] == {ord("a"), ord("\n")}
    made.advance(ids_of("ab"))
    assert allowed(made)[0] == {ord("b"), SIZE - 1} and not made.has_ended
    made.advance([SIZE - 1])
    assert made.has_ended


# -- engines -----------------------------------------------------------------------------------------------------------
def test_a_budget_ends_reasoning_in_an_engine_and_costs_others_nothing(fake):
    engine = fake(says("thinking for long"), reasoning_parser="qwen3")
    free = engine.generate("<think>>", {"max_new_tokens": 20})
    bound = engine.generate("<think>>", {"max_new_tokens": 20, "max_thinking_tokens": 6}, require_reasoning=True)
    # Text behind the marker is no reasoning of the prompt's: its tail is no open marker.
    assert free["text"] == bound["text"] == "thinking for long"
    engine = fake(says("thinking for long", after="<think>"), reasoning_parser="qwen3")
    params = {"max_new_tokens": 20, "max_thinking_tokens": 6, "ignore_eos": True}
    bound = engine.generate("<think>", params, require_reasoning=True)
    assert bound["text"].startswith("thinki</think>")
    assert bound["meta_info"]["reasoning_tokens"] == len("thinki</think>")
    assert engine.generate("<think>", {"max_thinking_tokens": 0, "max_new_tokens": 8})["text"] == "</think>"
    assert engine.generate("<think></think>", {"max_thinking_tokens": 0, "max_new_tokens": 4})["text"] != "</th"


def test_a_budget_where_nothing_is_known_of_reasoning_is_refused(fake):
    with pytest.raises(RequestError, match="nothing is known of reasoning"):
        fake().generate(">", {"max_thinking_tokens": 6})
    engine = fake(reasoning_parser="qwen3", grammar_backend="none")
    with pytest.raises(GrammarError, match="max_thinking_tokens is not possible here"):
        engine.generate("<think>", {"max_thinking_tokens": 6})


def test_a_grammar_waits_for_reasoning_only_where_it_is_told_to(fake):
    engine = fake(says("hm</think>\nabb", after="<think>"), reasoning_parser="qwen3")
    params = {"regex": "ab+c", "max_new_tokens": 30}
    assert engine.generate("<think>", params)["text"][0] == "a"
    text = engine.generate("<think>", params, require_reasoning=True)["text"]
    assert text.startswith("hm</think>\nabb") and text.endswith("c")
    assert engine.generate("<think></think>", params, require_reasoning=True)["text"][0] == "a"


def test_a_forced_call_at_a_high_temperature_is_valid(fake):
    jsonschema = pytest.importorskip("jsonschema")
    engine = fake(reasoning_parser="qwen3")
    tools = ToolSet(TOOLS, "required", parallel=False)
    made = tool_grammar(FORMAT, tools, {})["calls"]
    num_whole = 0
    for seed in range(4):
        params = {
            "calls": made,
            "temperature": 1.5,
            "max_new_tokens": 100,
            "sampling_seed": seed,
            "max_thinking_tokens": 5,
        }
        answer = engine.generate("<think>", params, require_reasoning=True)
        parser = FORMAT.with_tools(tools).parser("<think>")
        parts = [*parser.push(answer["text"], [len(answer["text"])]), *parser.flush()]
        if answer["meta_info"]["finish_reason"]["type"] == "stop":
            num_whole += 1
            assert [part.kind for part in parts if part.kind != "text"][-1] == "call_end"
            name = next(part.text for part in parts if part.kind == "call_begin")
            arguments = "".join(part.text for part in parts if part.kind == "arguments")
            jsonschema.validate(json.loads(arguments), tools.named(name).parameters)
    assert num_whole


GRAMMARS: list[dict] = [
    {"json_schema": json.dumps(POINT)},
    {"regex": '\\{"a":[0-9]\\}|x+'},
    {"calls": calls(forced=True)},
    {"calls": calls(forced=False)},
    {"calls": calls(forced=False), "json_schema": json.dumps(POINT)},
    {},
]


@pytest.mark.slow
@pytest.mark.parametrize("params", GRAMMARS, ids=lambda params: "-".join(params) or "free")
def test_guesses_over_the_end_of_reasoning_change_no_token(fake, params):
    """What was said before is guessed again, through the marker and into the grammar, rightly and wrongly."""
    rng = random.Random(str(sorted(params)))
    said = 'hm x</think>\n{"a":3}' if "calls" not in params else "hm x</think>\n" + CALL
    prompts = [f"{said} {said[: rng.randrange(len(said))]}~{said}<think>" for _ in range(4)]

    def next_token(context):
        text = bytes(i for i in context if i < 256)
        start = text.rfind(b"<think>") + 7
        position = len(text) - start
        return said.encode()[position] if position < len(said) else None

    outputs = []
    for options in (
        {},
        {"speculative_algorithm": "NGRAM"},
        {"speculative_algorithm": "NGRAM", "chunked_prefill_size": 8},
    ):
        engine = fake(
            next_token, reasoning_parser="qwen3", context_length=400, runner_options={"favoured_logit": 11.0}, **options
        )
        answers = engine.generate(
            prompts,
            [
                {
                    **params,
                    "temperature": 1.0,
                    "max_new_tokens": 70,
                    "sampling_seed": i,
                    **({"max_thinking_tokens": 3 * i} if i % 2 else {}),
                }
                for i in range(4)
            ],
            require_reasoning=True,
            return_logprob=True,
        )
        outputs.append([(a["output_ids"], a["meta_info"]["output_token_logprobs"]) for a in answers])
        kinds = {a["meta_info"]["finish_reason"]["type"] for a in answers}
        assert kinds <= {"stop", "length"}
        if options:
            assert any(a["meta_info"]["spec_accept_length"] > 1 for a in answers)
    assert outputs[0] == outputs[1] == outputs[2]


# -- a grammar that grows too large in the middle ----------------------------------------------------------------------
def test_a_grammar_that_outgrows_its_limits_ends_the_answer_as_its_sender_s_error(fake, monkeypatch):
    monkeypatch.setattr(language, "MAX_LEXER_STATES", 60)
    letters = random.Random(1).choices(b"ab", k=128)
    engine = fake(lambda context: letters[len(context)])
    params = {"regex": "(a|b)*a(a|b){9}x", "max_new_tokens": 110}
    with pytest.raises(GrammarError, match=r"became too large \d+ tokens into the answer"):
        engine.generate(">", params)
    answer, other = engine.generate([">", ">"], [params, {"regex": "abc"}])
    reason = answer["meta_info"]["finish_reason"]
    assert (reason["type"], reason["status_code"], reason["err_type"]) == ("error", 400, "GrammarError")
    assert answer["text"] and set(answer["text"]) <= {*"abx"}, "what there is of it is told"
    assert other["text"] == "abc"


# -- the vocabulary ----------------------------------------------------------------------------------------------------
def test_markers_that_a_wire_format_names_are_text_to_grammars():
    from tokenizers import AddedToken

    from mooli.frontend.tokenizer import Tokenizer

    backend = byte_tokenizer()._backend
    names = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "[unused16]", "<|other|>"]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in names])
    made = Tokenizer(backend, eos_ids=[EOS], chat_template=byte_tokenizer().chat_template)
    assert made.eos_ids == {EOS}, "<|end|> ends one message of several"
    found = made.grammar_tokens(10_000, (EOS,), Harmony.marker_tokens)
    assert [made.token_text(i) for i in found.special_ids if i > VOCAB_SIZE - 1] == ["[unused16]", "<|other|>"]
