"""Reasoning in every format: whatever the cut into tokens and readings, the same parts, and no marker among them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from fake_engine import EOS, byte_tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from mooli.config import REASONING_PARSERS, EngineConfig
from mooli.errors import ConfigError
from mooli.frontend.chat_template import ChatTemplate
from mooli.frontend.generation import Generation
from mooli.frontend.parts import PLAIN_TEXT, Part, PartReader, ReasoningCount, parser_for
from mooli.frontend.tokenizer import Tokenizer
from mooli.frontend.wire_formats.choice import open_wire_format
from mooli.frontend.wire_formats.reasoning import REASONING_FORMATS
from mooli.types import FinishReason, Request, RequestOutput, SamplingParams

BYTES = byte_tokenizer()


def sequence(
    ids: Sequence[int], wire_format, tokenizer: Tokenizer = BYTES, *, prompt: Sequence[int] = (33,), **sampling
) -> Iterator[Generation]:
    """One that grows by each of `ids`, then ends with EOS."""
    request = Request(rid="r", prompt_ids=np.array(prompt, np.int32), sampling=SamplingParams(**sampling))
    shown_ids = tokenizer.special_ids_of(wire_format.marker_tokens)
    generation = Generation(request, tokenizer, shown_ids=shown_ids)
    yield generation
    for token_id in [*ids, EOS]:
        finish = FinishReason("stop", matched=EOS) if token_id == EOS else None
        generation.update(RequestOutput("r", [token_id], finish))
        yield generation


def reader_of(generation: Generation, wire_format, tokenizer: Tokenizer = BYTES, **options) -> PartReader:
    return PartReader(generation, parser_for(wire_format, generation.request, tokenizer), **options)


def whole(ids: Sequence[int], wire_format, tokenizer: Tokenizer = BYTES, **options) -> tuple[list[Part], int]:
    """Its parts, read once at the end, and how many tokens are reasoning."""
    *_, generation = sequence(ids, wire_format, tokenizer, **options)
    reader = reader_of(generation, wire_format, tokenizer)
    parts = reader.take()
    assert [token_id for part in parts for token_id in part.token_ids] == generation.output_ids
    return parts[1:-1], reader.num_reasoning_tokens


def words(parts: Sequence[Part]) -> list[tuple[str, str]]:
    return [(part.kind, part.text) for part in parts if part.text]


def say(text: str, wire_format, prompt: str = "!") -> list[tuple[str, str]]:
    return words(whole([*text.encode()], wire_format, prompt=[*prompt.encode()])[0])


MARKERS = {
    name: (wire_format.opening, wire_format.closing)
    for name, wire_format in REASONING_FORMATS.items()
    if name != "gpt-oss"
}
HARMONY = "<|channel|>analysis<|message|>m é<|end|><|start|>assistant<|channel|>final<|message|>t<"
PLAIN_HARMONY = "<|chan> t"


def test_every_name_that_an_engine_takes_has_a_format():
    assert set(REASONING_PARSERS) == set(REASONING_FORMATS)
    assert all(wire_format.name == name for name, wire_format in REASONING_FORMATS.items())
    with pytest.raises(
        ConfigError, match=r"reasoning_parser='qwen9' is not possible; choose one of auto, none, .*qwen3"
    ):
        EngineConfig.from_kwargs(model_path="m", reasoning_parser="qwen9")
    assert EngineConfig.from_kwargs(model_path="m", reasoning_parser=None).reasoning_parser == "none"


# -- all cuts ----------------------------------------------------------------------------------------------------------
def cases() -> Iterator[tuple[str, str, str]]:
    kinds = {(*MARKERS[name], REASONING_FORMATS[name].starts_inside): name for name in MARKERS}
    for (opening, closing, _), name in kinds.items():
        yield name, f"{opening}\nm é\n{closing}\n\nt", "!"
        yield name, f"m{closing[:2]} {closing}t", f"!{opening}\n"
        yield name, f"{opening}m{closing[:-1]}", "!"
        yield name, f"a{opening}b{closing}", f"!{opening}{closing}"
    yield "gpt-oss", HARMONY, "!<|start|>assistant"
    yield "gpt-oss", PLAIN_HARMONY, "!"


CASES = [*cases()]


@pytest.mark.parametrize(("name", "text", "prompt"), CASES)
def test_no_reading_and_no_cut_changes_what_is_told(name, text, prompt):
    """Tokens are bytes. Every pair of readings is tried: what a reading leaves behind is one state of the parser, so
    that pairs reach each state that any cut reaches, and go on from it to each other one."""
    wire_format = REASONING_FORMATS[name]
    ids = [*text.encode()]
    expected, num_reasoning = whole(ids, wire_format, prompt=[*prompt.encode()])
    num_steps = len(ids) + 1
    for first, second in [*itertools.combinations(range(0, num_steps, 3), 2), *((i, i + 1) for i in range(num_steps))]:
        *_, generation = sequence([], wire_format, prompt=[*prompt.encode()])
        growing = sequence(ids, wire_format, prompt=[*prompt.encode()])
        generation = next(growing)
        reader = reader_of(generation, wire_format)
        parts: list[Part] = []
        for step, _ in enumerate(growing):
            if step in (first, second) or generation.finish is not None:
                parts += reader.take()
        assert joined(parts) == joined(expected), (first, second)
        assert reader.num_reasoning_tokens == num_reasoning


@pytest.mark.parametrize(("name", "text", "prompt"), CASES)
def test_every_token_read_alone_joins_to_the_same(name, text, prompt):
    wire_format, ids = REASONING_FORMATS[name], [*text.encode()]
    expected, num_reasoning = whole(ids, wire_format, prompt=[*prompt.encode()])
    growing = sequence(ids, wire_format, prompt=[*prompt.encode()])
    generation = next(growing)
    reader, count = reader_of(generation, wire_format), ReasoningCount(generation, wire_format, BYTES)
    parts: list[Part] = []
    for _ in growing:
        parts += reader.take()
        assert count.update() >= reader.num_reasoning_tokens
    assert joined(parts) == joined(expected)
    assert (reader.num_reasoning_tokens, count.update(), count.update()) == (num_reasoning,) * 3


@pytest.mark.slow
def test_all_cuts_of_a_short_text_at_once():
    """2^n readings of one with everything: white space, a half marker, half a character, both markers."""
    for text in ("m <é</think>", "m <</think> t"):
        wire_format, ids = REASONING_FORMATS["deepseek-r1"], [*text.encode()]
        expected = joined(whole(ids, wire_format)[0])
        for mask in range(2 ** len(ids)):
            growing = sequence(ids, wire_format)
            reader = reader_of(next(growing), wire_format)
            parts: list[Part] = []
            for step, generation in enumerate(growing):
                if mask >> step & 1 or generation.finish is not None:
                    parts += reader.take()
            assert joined(parts) == expected, bin(mask)


def joined(parts: Sequence[Part]) -> list[tuple[str, str, list[int]]]:
    runs: list[tuple[str, str, list[int]]] = []
    for part in parts:
        if part.kind in ("begin", "end"):
            continue
        if runs and runs[-1][0] == part.kind:
            runs[-1] = (part.kind, runs[-1][1] + part.text, runs[-1][2] + part.token_ids)
        else:
            runs.append((part.kind, part.text, part.token_ids))
    return runs


# -- what is told ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", MARKERS)
def test_reasoning_and_answer_of_a_pair(name):
    wire_format = REASONING_FORMATS[name]
    opening, closing = MARKERS[name]
    expected = [("reasoning", "m é"), ("text", "t ")]
    assert say(f"{opening}\nm é\n{closing}\n\nt ", wire_format) == expected
    assert say(f" {opening}m é{closing}t ", wire_format) == expected
    assert say(f"m é\n{closing}t ", wire_format, prompt=f"!{opening}\n") == expected  # the prompt has opened it
    assert say(f"{opening}m é\n{closing}t ", wire_format, prompt=f"!{opening}\n") == expected  # and the model again
    assert say(f"{opening}m é {closing[:-1]}", wire_format) == [("reasoning", f"m é {closing[:-1]}")]  # never closed
    assert say(f"{opening}{closing}t", wire_format) == [("text", "t")]
    assert say(f"{opening}m{closing}a{opening}b{closing}", wire_format) == [
        ("reasoning", "m"), ("text", f"a{opening}b{closing}"),
    ]  # fmt: skip
    shut = f"!{opening}\n\n{closing}\n\n"
    assert say("t <", wire_format, prompt=shut) == [("text", "t <")]
    assert say(f"t {closing}", wire_format.continued) == [("text", f"t {closing}")]


@pytest.mark.parametrize("name", MARKERS)
def test_without_markers_only_formats_that_always_reason_take_it_for_reasoning(name):
    wire_format = REASONING_FORMATS[name]
    kind = "reasoning" if wire_format.starts_inside else "text"
    assert say("hm", wire_format) == [(kind, "hm")]
    assert say("", wire_format) == []


def test_both_markers_count_as_reasoning_and_white_space_goes_with_what_it_is_beside():
    parts, num_reasoning = whole([*b"<think>\nm\n</think>\n\nt"], REASONING_FORMATS["qwen3"])
    assert num_reasoning == len("<think>\nm\n</think>")
    assert [(part.text, bytes(i for i in part.token_ids if i != EOS)) for part in parts] == [
        ("m", b"<think>\nm\n</think>"), ("t", b"\n\nt"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        (HARMONY, "!<|start|>assistant", [("reasoning", "m é"), ("text", "t<")]),
        ("t", "!<|start|>assistant<|channel|>final<|message|>", [("text", "t")]),
        ("m", "!<|start|>assistant<|channel|>analysis<|message|>", [("reasoning", "m")]),
        ("plain <", "!", [("text", "plain <")]),
        ("<|chan", "!", [("text", "<|chan")]),
        ("<|channel|>analysis", "!", []),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|start|>assistant"
            "<|channel|>commentary<|message|>c<|end|><|start|>assistant<|channel|>final<|message|>d<|return|>",
            "!",
            [("reasoning", "a\nb"), ("text", "c\nd")],
        ),
    ],
)
def test_channels_of_harmony(text, prompt, expected):
    assert say(text, REASONING_FORMATS["gpt-oss"], prompt) == expected


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("m<|close|>think<|sep|>{r}t<{/r}{/m}", "<|open|>think<|sep|>", [("reasoning", "m"), ("text", "t<")]),
        ("t{/r}{/m}", "{r}", [("text", "t")]),
        ("{r}t {/r}{tools}a {/r} b{/tools}{/m}", "!", [("text", "t {tools}a {/r} b{/tools}")]),
        ("{r}a{/r}{r}b{/r}", "!", [("text", "ab")]),
        ("{tools}{tools}", "!", [("text", "{tools}{tools}")]),
    ],
)
def test_channels_of_kimi_k3(text, prompt, expected):
    def written(words: str) -> str:
        for word, name in (("r", "response"), ("m", "message"), ("tools", "tools")):
            words = words.replace(f"{{{word}}}", f"<|open|>{name}<|sep|>")
            words = words.replace(f"{{/{word}}}", f"<|close|>{name}<|sep|>")
        return words

    wire_format, ids = REASONING_FORMATS["kimi_k3"], [*written(text).encode()]
    parts, _ = whole(ids, wire_format, prompt=[*written(f"!{prompt}").encode()])
    assert words(parts) == [(kind, written(said)) for kind, said in expected]
    growing = sequence(ids, wire_format, prompt=[*written(f"!{prompt}").encode()])
    reader = reader_of(next(growing), wire_format)
    assert [run[:2] for run in joined([part for _ in growing for part in reader.take()]) if run[1]] == words(parts)


def test_reasoning_can_come_in_one_piece():
    wire_format = REASONING_FORMATS["qwen3"]
    growing = sequence([*b"<think>ab</think>xy"], wire_format)
    reader = reader_of(next(growing), wire_format, streams_reasoning=False, shows_tokens=False)
    taken = [part for _ in growing for part in reader.take()]
    assert [(part.kind, part.text) for part in taken] == [
        ("begin", ""), ("reasoning", "ab"), ("text", "x"), ("text", "y"), ("text", ""), ("end", ""),
    ]  # fmt: skip


# -- markers that are tokens, special ones -----------------------------------------------------------------------------
def tokenizer_with(markers: Sequence[str], template: str | None = None, *, special: bool = True) -> Tokenizer:
    """The byte tokenizer with `markers` as tokens from 258 on."""
    backend = Backend(models.BPE({char: i for i, char in enumerate(_alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<eos>", "<other>")])
    tokens = [AddedToken(t, special=special, normalized=False) for t in markers]
    (backend.add_special_tokens if special else backend.add_tokens)(tokens)
    return Tokenizer(backend, eos_ids=[EOS], chat_template=None if template is None else ChatTemplate(template))


def _alphabet() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda char: (ord(char) >= 256, ord(char)))


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", [*MARKERS, "gpt-oss"])
def test_markers_that_are_special_tokens_are_seen_by_the_format_and_by_nobody_else(name, special):
    wire_format = REASONING_FORMATS[name]
    tokenizer = tokenizer_with(wire_format.marker_tokens, special=special)
    if name == "gpt-oss":
        text = HARMONY.replace("é", "").replace("t<", "t")
    else:
        text = f"{MARKERS[name][0]}\nm{MARKERS[name][1]}t"
    ids = tokenizer.encode(text + "<other>", add_special_tokens=False)
    assert len(ids) < len(text) and max(ids) > 257
    parts, num_reasoning = whole(ids, wire_format, tokenizer)
    assert words(parts) == [("reasoning", "m " if name == "gpt-oss" else "m"), ("text", "t")]
    *_, plain = sequence(ids, PLAIN_TEXT, tokenizer)
    assert ("<" in plain.text or "[" in plain.text or "◁" in plain.text) is not special
    assert ReasoningCount(plain, wire_format, tokenizer).update() == num_reasoning > 2


# -- which one a model has ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("template", "markers", "name"),
    [
        ("{{ messages }}", (), None),
        (None, (), None),
        ("{% if enable_thinking %}<think>{% endif %}</think>", (), "qwen3"),
        ("{{ m.split('</think>')[-1] }}", (), "qwen3"),
        ("{{ messages }}", ("<think>", "</think>"), "qwen3"),
        ("<|start|>assistant<|channel|>analysis", (), "gpt-oss"),
        ("<|channel>thought\n<channel|>", (), "gemma4"),
        ("<mm:think></mm:think>", (), "minimax-m3"),
        (None, ("<|open|>", "<|close|>", "<|sep|>"), "kimi_k3"),
        ("{{ messages }}", ("◁think▷", "◁/think▷"), "kimi"),
        ("[THINK][/THINK]", ("<think>", "</think>"), "mistral"),
        ("[unused9]系统：", (), "openpangu"),
        ("{{ messages }}", ("[unused16]", "[unused17]"), None),
    ],
)
def test_the_format_is_found_in_the_template_or_in_the_vocabulary(template, markers, name):
    tokenizer = tokenizer_with(markers, template, special=False)
    config = EngineConfig.from_kwargs(model_path="m")
    wire_format = open_wire_format(config, tokenizer)
    assert wire_format.name == name
    assert (wire_format.without_calls is PLAIN_TEXT) == (name is None)
    assert open_wire_format(config, None) is PLAIN_TEXT


def test_a_format_that_is_named_is_taken_and_none_is_plain_text():
    tokenizer = tokenizer_with((), "</think>")
    for name, expected in (("deepseek-r1", "deepseek-r1"), ("none", None), ("auto", "qwen3")):
        config = EngineConfig.from_kwargs(model_path="m", reasoning_parser=name)
        assert open_wire_format(config, tokenizer).name == expected
