"""Grammars: what they allow, what is refused and in which words, and that they are compiled aside."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading

import numpy as np
import pytest
from fake_engine import EOS, VOCAB_SIZE, FakeEngine, byte_tokenizer, says

import mooli.grammar.language as language
from mooli.errors import GrammarError, QueueFullError
from mooli.grammar import compiler
from mooli.grammar.compiler import Compilation, Grammars
from mooli.grammar.constraint import GrammarConstraint
from mooli.grammar.language import compiled
from mooli.grammar.vocabulary import ByteEncoder, open_vocabulary
from mooli.lark import MAX_SPACES
from mooli.types import Grammar, Request, SamplingParams, TokenBytes
from schemas import random_schema
from valid_output import check

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture
def fake(monkeypatch):
    return FakeEngine(monkeypatch)


@pytest.fixture(scope="module")
def vocabulary():
    return open_vocabulary(byte_tokenizer().grammar_tokens(VOCAB_SIZE, (EOS,)), VOCAB_SIZE)


def constraint(vocabulary, kind, text):
    text = text if isinstance(text, str) else json.dumps(text)
    return GrammarConstraint(Compilation(Grammar(kind, text), matcher=compiled(Grammar(kind, text), vocabulary)))


def allowed_ids(made, drafts=()):
    """The ids that may follow the output and each draft."""
    masks = np.zeros((1 + len(drafts), -(-VOCAB_SIZE // 32)), np.uint32)
    made.mask(drafts, masks)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def accepts(made, text):
    """Whether the bytes of `text` and then an end are an output."""
    for byte in text.encode():
        if made.has_ended or byte not in allowed_ids(made)[0]:
            return False
        made.advance([byte])
    return made.has_ended or EOS in allowed_ids(made)[0]


STRUCTURES = {
    "structures": [
        {"begin": "<f=a>", "schema": {"type": "integer", "maximum": 9, "minimum": 0}, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"type": "boolean"}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}


@pytest.mark.parametrize(
    ("kind", "text", "right", "wrong"),
    [
        ("regex", "[ab]+c?", ["a", "abbac"], ["", "c", "ax"]),
        ("regex", "^(yes|no)$", ["yes", "no"], ["yesno", "^yes", "no$"]),
        ("regex", r"a\$", ["a$"], ["a"]),
        ("ebnf", 'start: "a" B\nB: /[0-9]+/', ["a1", "a12"], ["a", "1"]),
        ("ebnf", 'root ::= "a" [0-9]+ tail\ntail ::= "!" | "?"', ["a1!", "a22?"], ["a!", "a1"]),
        ("json_schema", PERSON, ['{"name":"é","age":7}', '{ "name": "", "age": 0 }'], ['{"age":1}', "{}", "x"]),
        ("json_schema", "{}", ["1", "[]", '{"a": null}'], ["", "x"]),
        ("json_schema", "true", ["1"], ["x"]),
        ("json_schema", {"type": "object"}, ["{}", '{"a": [1.5, {}]}'], ["[]", '{"a"}', '{"a": 1,}']),
        ("json_schema", {"enum": ["</", 1]}, ['"</"', "1"], ["2"]),
        ("structural_tag", STRUCTURES, ["hi", "", "a <f=a>1</f> <f=b>true</f>"], ["<f=a>true</f>", "<f=c>", "<f=a>1"]),
        ("structural_tag", {**STRUCTURES, "at_least_one": True}, ["a<f=a>1</f>"], ["hi"]),
        (
            "structural_tag",
            {"format": {"type": "sequence", "elements": [
                {"type": "const_string", "value": "<a>"}, {"type": "json_schema", "json_schema": {"type": "null"}},
                {"type": "star", "content": {"type": "regex", "pattern": "/[x]"}}]}},
            ["<a>null", "<a>null/x/x"], ["<a>", "<a>null/"],
        ),
        (
            "structural_tag",
            {"type": "structural_tag", "format": {"type": "tags_with_separator", "separator": ",", "at_least_one": True,
             "tags": [{"begin": "[", "content": {"type": "const_string", "value": "x"}, "end": "]"}]}},
            ["[x]", "[x],[x]"], ["", "[x],"],
        ),
        (
            "structural_tag",
            {"format": {"type": "tags_with_separator", "separator": ",", "stop_after_first": True,
             "tags": [{"begin": "[", "content": {"type": "const_string", "value": "x"}, "end": "]"}]}},
            ["[x]", ""], ["[x],[x]"],
        ),
        (
            "structural_tag",
            {"format": {"type": "sequence", "elements": [
                {"type": "tag", "begin": "<a>", "end": "</a>", "content": {"type": "any_text"}},
                {"type": "const_string", "value": "!"}]}},
            ["<a></a>!", "<a>b < c\n</b></a>!"], ["<a>b!", "<a>b</a>c</a>!"],
        ),
        (
            "structural_tag",
            {"format": {"type": "repeat", "min": 2, "max": 3, "content": {"type": "const_string", "value": "ab"}}},
            ["abab", "ababab"], ["ab", "abababab"],
        ),
        (
            "structural_tag",
            {"format": {"type": "repeat", "min": 2, "content": {"type": "regex", "pattern": "[ab]"}}},
            ["ab", "abbbba"], ["a", ""],
        ),
        (
            "structural_tag",
            {"format": {"type": "sequence", "elements": [
                {"type": "grammar", "grammar": 'root ::= "a" [0-9]+ tail\ntail ::= "!" | "?"'},
                {"type": "grammar", "grammar": 'start: "x" B // }\nB: /[0-9]/'}]}},
            ["a1!x2", "a22?x0"], ["a!x2", "a1!", "a1!x"],
        ),
        (
            "structural_tag",
            {"format": {"type": "tag", "begin": "<function=f>\n", "end": "\n</function>",
             "content": {"type": "qwen_xml_parameter", "json_schema": {"type": "object", "required": ["s"],
              "properties": {"s": {"type": "string", "maxLength": 9}, "n": {"$ref": "#/$defs/n"},
               "e": {"enum": ["a/"]}}, "$defs": {"n": {"type": "integer", "maximum": 9}}}}}},
            ["<function=f>\n<parameter=s>\nOslo\n</parameter>\n</function>",
             "<function=f>\n<parameter=s></parameter><parameter=n>5</parameter>\n<parameter=e>\na/\n</parameter>\n</function>"],
            ["<function=f>\n\n</function>", "<function=f>\n<parameter=s>more than nine</parameter>\n</function>",
             "<function=f>\n<parameter=s>a</parameter><parameter=n>10</parameter>\n</function>",
             "<function=f>\n<parameter=s>a</parameter>\n<parameter=e>b</parameter>\n</function>"],
        ),
        (
            "structural_tag",
            {"format": {"type": "sequence", "elements": [
                {"type": "qwen_xml_parameter", "json_schema": {"type": "object"}},
                {"type": "regex", "pattern": "!"},
                {"type": "qwen_xml_parameter", "json_schema": {"properties": {"a/b": {"type": "boolean"}}}}]}},
            ["!", "<parameter=x>\n[1] <b></parameter>!", "<parameter=x>1</parameter>\n<parameter=y>2</parameter>!"
             "<parameter=a/b>true</parameter>"],
            ["<parameter=x>1!", "!<parameter=a/b>1</parameter>", "<parameter=>1</parameter>!"],
        ),
    ],
)  # fmt: skip
def test_what_each_kind_allows(vocabulary, kind, text, right, wrong):
    for output in right:
        assert accepts(constraint(vocabulary, kind, text), output), output
    for output in wrong:
        assert not accepts(constraint(vocabulary, kind, text), output), output


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_schema", {"properties": {"a": {"not": {}}}}, r"not cannot be enforced \(at #/properties/a/not\)"),
        ("json_schema", {"items": {"uniqueItems": True}}, r"uniqueItems .*#/items/uniqueItems"),
        (
            "json_schema",
            {"properties": {"if": {"if": True, "then": True}}},
            r"#/properties/if/if, #/properties/if/then",
        ),
        ("json_schema", {"items": {"type": "string", "format": "spam"}}, r"Unknown format: spam \(at #/items/format\)"),
        ("json_schema", {"type": "string", "minLength": 5, "maxLength": 2}, "minLength .5. is greater than maxLength"),
        ("json_schema", False, "a schema is an object"),
        ("json_schema", {"$ref": "http://x/y"}, "http://x/y"),
        ("json_schema", {"pattern": "(?=a)b", "type": "string"}, "look-around"),
        ("json_schema", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ("regex", "(ab", "unclosed group"),
        ("regex", "(a{1000}){1000}", "too many expressions"),
        ("ebnf", "start: nothing", "nothing"),
        ("ebnf", "root ::= nothing", "nothing"),
        ("structural_tag", {"a": 1}, "neither format"),
        ("structural_tag", {"format": {"type": "dispatch"}}, "format.type='dispatch' is not supported"),
        ("structural_tag", {"format": {"type": "token"}}, "format.type='token' is not"),
        (
            "structural_tag",
            {"format": {"type": "qwen_xml_parameter", "json_schema": {"properties": {"x": {"not": {}}}}}},
            "format.json_schema.properties.x: a schema with not needs a type",
        ),
        (
            "structural_tag",
            {"format": {"type": "qwen_xml_parameter", "json_schema": {"properties": {"a>": {}}}}},
            "format.json_schema: 'a>' cannot be the name in a tag",
        ),
        (
            "structural_tag",
            {"format": {"type": "qwen_xml_parameter", "json_schema": 3}},
            "a schema is an object, not 3",
        ),
        ("structural_tag", {"format": {"type": "token", "token": 5}}, "format.type='token' is not supported"),
        ("structural_tag", {"format": {"type": "any_text", "excludes": ["x"]}}, "format.excludes cannot be enforced"),
        ("structural_tag", {"format": {"type": "grammar", "grammar": "start: nothing"}}, "nothing"),
        (
            "structural_tag",
            {"format": {"type": "repeat", "min": 3, "max": 2, "content": {"type": "any_text"}}},
            "repeats from min=3 and max=2",
        ),
        ("structural_tag", {"structures": [{"begin": "x", "end": "y"}], "triggers": ["<"]}, "begins with no trigger"),
        ("structural_tag", {"structures": [{"end": "y"}], "triggers": ["<"]}, r"structures\[0\].begin must be a text"),
        ("structural_tag", {"structures": [], "triggers": "<"}, "triggers must be a list"),
    ],
)
def test_what_cannot_be_had_is_refused_by_its_name_and_place(vocabulary, kind, text, words):
    with pytest.raises(GrammarError, match=words) as raised:
        constraint(vocabulary, kind, text)
    assert "<non-verbose/>" not in str(raised.value)


def test_whitespace_is_bounded_and_options_of_the_library_are_taken_out(vocabulary):
    schema = {"type": "object", "x-guidance": {"lenient": True, "whitespace_flexible": True}}
    for spaces, is_right in ((MAX_SPACES, True), (MAX_SPACES + 1, False)):
        assert accepts(constraint(vocabulary, "json_schema", schema), "{" + " " * spaces + "}") == is_right
    with pytest.raises(GrammarError, match="not cannot be enforced"):
        constraint(vocabulary, "json_schema", {**schema, "not": {}})
    # A property may have that name.
    named = {"type": "object", "properties": {"x-guidance": {"type": "null"}}, "required": ["x-guidance"]}
    assert accepts(constraint(vocabulary, "json_schema", named), '{"x-guidance":null}')


# -- the library's traps ----------------------------------------------------------------------------------------------
MARKERS = (b"<tool_call>", b"</tool_call>", b"<think>", b"</think>", b"[TOOL_CALLS]")


def marked_vocabulary():
    """Bytes, then markers, an end, and a special token that is no text."""
    tokens = [bytes([byte]) for byte in range(256)] + [*MARKERS, b"<|end|>", b"<|start|>"]
    whole = range(256, 256 + len(MARKERS))
    return TokenBytes(tokens, [len(tokens) - 1], [len(tokens) - 2], list(whole)), len(tokens)


@pytest.mark.parametrize("marker", MARKERS)
def test_trap_1_markers_are_text_that_a_grammar_writes(marker):
    given, size = marked_vocabulary()
    made = constraint(open_vocabulary(given, size), "ebnf", f'start: "{marker.decode()}" /(.|\\n)*/')
    marker_id, special_id = 256 + MARKERS.index(marker), size - 1
    masks = np.zeros((2, -(-size // 32)), np.uint32)
    made.mask([marker_id], masks)
    is_allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    assert is_allowed[0, marker_id] and is_allowed[1, marker_id]
    assert not is_allowed[:, special_id].any()


def test_trap_1_the_tokenizer_s_own_list_of_specials_leaves_markers_out():
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    from mooli.frontend.tokenizer import Tokenizer

    backend: Backend = byte_tokenizer()._backend
    names = [marker.decode() for marker in MARKERS]
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (*names, "<|start|>")])
    made = Tokenizer(backend).grammar_tokens(10_000, (EOS,))
    assert [made.tokens[258 + i] for i in range(len(MARKERS))] == list(MARKERS)
    assert made.whole_ids == [258 + i for i in range(len(MARKERS))]
    assert made.special_ids == [256, 257, 258 + len(MARKERS)]
    assert made.eos_ids == [EOS]


def test_trap_2_guesses_over_a_forced_end_leave_no_trace(vocabulary):
    made = constraint(vocabulary, "regex", "abc")
    assert made.num_allowed([*b"abc"]) == 2, "after the last nothing can follow"
    assert made.num_allowed([*b"abc", EOS]) == 2
    assert made.num_allowed([*b"ax"]) == 1
    assert allowed_ids(made, [*b"ab"]) == [{*b"a"}, {*b"b"}, {*b"c"}]
    made.advance([*b"ab"])
    assert allowed_ids(made) == [{*b"c"}]
    assert not made.has_ended
    made.advance([*b"c"])
    assert made.has_ended


def test_trap_2_an_end_that_is_chosen_ends(vocabulary):
    made = constraint(vocabulary, "regex", "ab*")
    assert made.num_allowed([*b"ab", EOS]) == 2
    made.advance([*b"ab"])
    assert allowed_ids(made) == [{*b"b", EOS}]
    made.advance([EOS])
    assert made.has_ended


def test_trap_3_a_matcher_in_trouble_is_an_error_and_no_end(vocabulary):
    made = constraint(vocabulary, "regex", "ab")
    with pytest.raises(GrammarError):
        made.advance([*b"x"])
    with pytest.raises(GrammarError):
        allowed_ids(made)


def test_forced_bytes_are_cut_into_tokens_by_merging():
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b"bc", b"abc", "é".encode(), b"<eos>"]
    tokens.append(b"a<x>")
    encode = ByteEncoder(tokens, frozenset([260]), [261])
    assert encode(b"ba<x>bc") == [ord("b"), 261, 257]
    assert encode(b"abc") == [258]
    assert encode(b"bc") == [257]
    assert encode("é<eos>".encode()) == [259, *b"<eos>"]
    data = bytes(random.Random(1).randrange(256) for _ in range(500))
    assert b"".join(tokens[i] for i in encode(data)) == data


def test_nothing_is_imported_before_the_first_grammar():
    code = "import mooli.engine.build, mooli.frontend.engine, sys; assert 'llguidance' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# -- compiled aside ---------------------------------------------------------------------------------------------------
class Held:
    """Compilation that waits until it is let go."""

    def __init__(self, monkeypatch):
        self.begun, self.go = threading.Semaphore(0), threading.Event()
        self.count = 0
        real = language.compiled

        def compiled(grammar, vocabulary):
            self.count += 1
            self.begun.release()
            assert self.go.wait(60)
            return real(grammar, vocabulary)

        monkeypatch.setattr(language, "compiled", compiled)


def test_a_request_that_waits_for_its_grammar_holds_up_nobody(fake, monkeypatch):
    held = Held(monkeypatch)
    engine = fake()
    stream = engine.generate(">", {"regex": "ab", "max_new_tokens": 5}, stream=True)
    assert held.begun.acquire(timeout=60)
    assert engine.generate(">", {"max_new_tokens": 3, "ignore_eos": True})["meta_info"]["completion_tokens"] == 3
    steps = engine.get_server_info()["internal_states"][0]
    assert steps["waiting"] == 1
    assert not engine._loop.call(lambda: engine._core.has_work), "the loop would spin"
    held.go.set()
    assert list(stream)[-1]["text"] == "ab"


def test_what_waits_for_its_grammar_can_be_aborted(fake, monkeypatch):
    held = Held(monkeypatch)
    engine = fake()
    stream = engine.generate(">", {"regex": "ab"}, rid="r", stream=True)
    assert held.begun.acquire(timeout=60)
    engine._loop.abort(["r"], "away")
    assert list(stream)[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    held.go.set()
    assert engine.generate(">", {"regex": "ab"})["text"] == "ab"
    assert held.count == 1


def test_a_grammar_that_takes_too_long_is_refused_and_others_go_on(fake, monkeypatch):
    held = Held(monkeypatch)
    engine = fake()
    engine._core._grammars._deadline_s = 0.05
    with pytest.raises(GrammarError, match="longer than"):
        engine.generate(">", {"regex": "slow"})
    held.go.set()
    engine._core._grammars._deadline_s = 60
    assert engine.generate(">", {"regex": "slow"})["text"] == "slow", "it may have been the machine"
    assert engine.generate(">", {"regex": "b"})["text"] == "b"


def grammars(**options):
    made = Grammars(VOCAB_SIZE, **options)
    woken = threading.Semaphore(0)
    made.bind(lambda: byte_tokenizer().grammar_tokens(VOCAB_SIZE, (EOS,)), woken.release)
    return made, woken


def regex(rid, text):
    params = SamplingParams(grammar=Grammar("regex", text))
    return Request(rid=rid, prompt_ids=np.zeros(1, np.int32), sampling=params)


def test_a_grammar_is_compiled_once_and_so_is_its_refusal(monkeypatch):
    made, woken = grammars()
    first, second = made.constraint_of(regex("1", "ab")), made.constraint_of(regex("2", "ab"))
    assert woken.acquire(timeout=60)
    first.advance([*b"a"])
    assert [allowed_ids(item) for item in (first, second)] == [[{*b"b"}], [{*b"a"}]]
    held = Held(monkeypatch)  # or it might be refused before both have asked
    made.constraint_of(regex("3", "(a"))
    made.constraint_of(regex("4", "(a"))
    held.go.set()
    assert woken.acquire(timeout=60)
    assert [rid for rid, _ in made.take_failures()] == ["3", "4"]
    assert made.take_failures() == []
    with pytest.raises(GrammarError, match="unclosed group"):
        made.constraint_of(regex("5", "(a"))
    assert made.constraint_of(Request(rid="6", prompt_ids=np.zeros(1, np.int32))) is None


def test_a_grammar_that_an_output_found_too_large_is_compiled_anew():
    made, woken = grammars()
    first = made.constraint_of(regex("1", "ab"))
    assert woken.acquire(timeout=60)
    with pytest.raises(GrammarError):
        first.advance([*b"x"])
    second = made.constraint_of(regex("2", "ab"))
    assert not second.is_ready
    assert woken.acquire(timeout=60)
    assert second.is_ready


def test_so_many_are_kept_and_so_many_wait(monkeypatch):
    held = Held(monkeypatch)
    monkeypatch.setattr(compiler, "MAX_KEPT", 2)
    monkeypatch.setattr(compiler, "MAX_WAITING", 1)
    made, woken = grammars()
    for i in range(compiler.MAX_AT_ONCE + 1):
        made.constraint_of(regex(str(i), f"a{i}"))
    with pytest.raises(QueueFullError):
        made.constraint_of(regex("9", "z"))
    held.go.set()
    for _ in range(compiler.MAX_AT_ONCE + 1):
        assert woken.acquire(timeout=60)
    assert held.count == 3
    made.constraint_of(regex("10", "a1"))
    made.constraint_of(regex("11", "a0"))
    assert woken.acquire(timeout=60)
    assert held.count == 4, "the one used least recently was forgotten"


@pytest.mark.parametrize("options", [{"skip_tokenizer_init": True}, {"grammar_backend": "none"}])
def test_without_a_tokenizer_or_on_demand_there_are_no_grammars(fake, options):
    engine = fake(**options)
    with pytest.raises(GrammarError, match="regex is not possible here"):
        engine.generate(input_ids=[1], sampling_params={"regex": "a"})


# -- beside everything else a request may have -------------------------------------------------------------------------
def test_an_end_of_the_grammar_ends_the_answer_whatever_else_is_asked_for(fake):
    engine = fake()
    answer = engine.generate(">", {"regex": "abc", "ignore_eos": True, "min_new_tokens": 9, "max_new_tokens": 20})
    assert answer["text"] == "abc"
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": ord("c")}
    exact = engine.generate(">", {"regex": "abc", "max_new_tokens": 3})
    assert exact["meta_info"]["finish_reason"]["type"] == "stop"


def test_a_lone_end_is_not_banned_by_min_new_tokens(fake):
    answer = fake(says("aaa")).generate(">", {"regex": "(aa)?b|a", "min_new_tokens": 1})
    assert answer["text"] in ("a", "aab", "b")


def test_length_and_stop_strings_cut_an_answer_short_and_say_so(fake):
    engine = fake()
    short = engine.generate(">", {"regex": "abcdef", "max_new_tokens": 2})
    assert (short["text"], short["meta_info"]["finish_reason"]["type"]) == ("ab", "length")
    cut = engine.generate(">", {"regex": "abcdef", "stop": "cd"})
    assert (cut["text"], cut["meta_info"]["finish_reason"]["matched"]) == ("ab", "cd")
    token = engine.generate(">", {"regex": "abcdef", "stop_token_ids": [ord("c")]})
    assert (token["text"], token["meta_info"]["finish_reason"]["matched"]) == ("ab", ord("c"))


def test_each_sample_has_its_own_place_and_each_prompt_its_own_grammar(fake):
    engine = fake()
    answers = engine.generate(">", {"regex": "[ab]{6}", "n": 4, "temperature": 1.5})
    assert len({answer["text"] for answer in answers}) > 1
    assert all(len(answer["text"]) == 6 and set(answer["text"]) <= {*"ab"} for answer in answers)
    answers = engine.generate(
        [">", ">", ">"], [{"regex": "x+", "max_new_tokens": 3}, {"regex": "(a"}, {"ebnf": 'start: "é"'}]
    )
    assert (answers[0]["text"], answers[2]["text"]) == ("xxx", "é")
    assert answers[1]["meta_info"]["finish_reason"]["status_code"] == 400


def test_log_probabilities_are_of_what_is_allowed(fake):
    engine = fake()
    meta = engine.generate(">", {"regex": "a[bc]"}, return_logprob=True, top_logprobs_num=5)["meta_info"]
    first, second = meta["output_token_logprobs"]
    assert first[0] == 0.0 and second[0] < 0.0
    assert [len(top) for top in meta["output_top_logprobs"]] == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("guesses", [{}, {"speculative_algorithm": "NGRAM"}])
def test_requests_that_give_way_go_on_where_they_were(fake, guesses):
    """Twelve of them need more pages than there are."""
    engine = fake(max_running_requests=12, **guesses)
    params = {"regex": "(abc|abd){30}x", "temperature": 1.5, "max_new_tokens": 100}
    prompts = [f"{i}" * 20 + ">" for i in "abcdefghijkl"]
    together = engine.generate(prompts, params)
    assert sum(answer["meta_info"]["num_retractions"] for answer in together) > 0
    for answer in together:
        assert len(answer["text"]) == 91 and answer["text"].endswith("x")


# -- valid by construction --------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_whatever_is_sampled_is_of_its_schema(fake):
    rng = random.Random(11)
    schemas = [random_schema(rng) for _ in range(60)]
    engine = fake()
    params = [
        {"json_schema": schema, "temperature": 1.5, "max_new_tokens": 120, "ignore_eos": True} for schema in schemas
    ]
    answers = engine.generate([">"] * 60, params)
    num_finished = 0
    for schema, answer in zip(schemas, answers, strict=True):
        reason = answer["meta_info"]["finish_reason"]
        assert reason["type"] in ("stop", "length"), (schema, reason)
        if reason["type"] == "stop":
            num_finished += 1
            check(schema, json.loads(answer["text"]))
    assert num_finished > 30


PIECES = (
    '{" ": ", " "} "}, [" "] ": first name first_name created _at max un unit cel cels celsius low true null value kind'
)


@pytest.mark.slow
def test_what_is_forced_is_all_that_masks_allow_and_no_mask_depends_on_how_its_place_was_reached():
    """One constraint goes run by run, the other token by token. Tokens overlap: a run can be cut in many ways."""
    tokens = [bytes([byte]) for byte in range(256)] + [piece.encode() for piece in PIECES.split()] + [b"<|end|>"]
    size = len(tokens)
    opened = open_vocabulary(TokenBytes(tokens, [size - 1], [size - 1], []), size)
    rng, num_forced = random.Random(4), 0
    for _ in range(60):
        schema = json.dumps(random_schema(rng))
        by_run, by_token = constraint(opened, "json_schema", schema), constraint(opened, "json_schema", schema)
        for _ in range(40):
            run = list(by_run.forced(8))
            num_forced += len(run)
            masks = np.zeros((1 + len(run), -(-size // 32)), np.uint32)
            by_run.mask(run, masks)
            for place, mask in enumerate(masks):
                ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
                token_id = run[place] if place < len(run) else rng.choice(ids)
                assert place == len(run) or ids == [token_id]
                alone = np.zeros((1, len(mask)), np.uint32)
                by_token.mask((), alone)
                assert alone[0].tolist() == mask.tolist()
                by_token.advance([token_id])
            by_run.advance([*run, token_id])
            assert by_run.has_ended == by_token.has_ended
            if by_run.has_ended:
                break
    assert num_forced > 500
