"""Programs of the frontend language, in the style of SGLang's paper; everything is real but the model."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
import time

import pytest
from fake_engine import EOS, PAGE_SIZE, Gate

import mooli
import mooli as sgl
from mooli import ProgramError, RequestError
from mooli.frontend.chat_template import ChatTemplate
from mooli.lang import backends
from mooli.lang.transcript import Transcript

GREEDY = {"temperature": 0}

TEMPLATE = ChatTemplate(
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def replies(**marked: str):
    """A `next_token` that goes on with a reply behind the last of the marks in the context: `Q=x` behind "Q:"."""

    def next_token(context: list[int]) -> int | None:
        text = bytes(token_id if token_id < 256 else 0 for token_id in context).decode("latin-1")
        found = [(text.rfind(f"{mark}:"), mark) for mark in marked if f"{mark}:" in text]
        if not found:
            return None
        start, mark = max(found)
        said = text[start + len(mark) + 1 :]
        reply = marked[mark]
        if not reply.startswith(said):
            return EOS
        return EOS if said == reply else reply.encode("latin-1")[len(said)]

    return next_token


@pytest.fixture
def make(make_engine, monkeypatch):
    """Makes an engine that is the default backend, with room for programs."""
    monkeypatch.setattr(backends, "_default", [])

    def make(next_token=None, **kwargs):
        engine = make_engine(next_token, **{"context_length": 700, **kwargs})
        engine.tokenizer_manager.tokenizer.chat_template = TEMPLATE
        sgl.set_default_backend(engine)
        return engine

    return make


# -- programs ----------------------------------------------------------------------------------------------------------


@sgl.function
def classify(s, review):
    s += "good stuff => positive\nawful => negative\n"
    s += review + " L:"
    s += sgl.select("label", choices=["positive", "negative", "neutral, to say it long"])


def test_few_shot_select(make):
    make(replies(L="negative"))
    state = classify.run(review="boring")
    assert state["label"] == "negative"
    assert state.text() == "good stuff => positive\nawful => negative\nboring L:negative"
    meta = state.get_meta_info("label")
    scores = meta["normalized_prompt_logprobs"]
    assert scores[1] == max(scores) > -0.01
    assert [len(tokens) for tokens in meta["input_token_logprobs"]] == [9, 9, 24]  # one before, which has no number
    prompt = len("good stuff => positive\nawful => negative\nboring L:")
    assert meta["prompt_tokens"] == [prompt + 8, prompt + 8, prompt + len("neutral, to say it long")]


def test_options_of_a_choice_are_one_batch_that_computes_the_text_once(make, make_engine):
    make(replies(L="negative"))
    calls = []
    submit = make_engine.engines[-1]._loop.submit
    make_engine.engines[-1]._loop.submit = lambda requests, sinks: (
        calls.append(len(requests)),
        submit(requests, sinks),
    )
    cached = classify.run(review="boring").get_meta_info("label")["cached_tokens"]
    text = len("good stuff => positive\nawful => negative\nboring L:")
    assert calls == [3]
    # Full pages, but for the text's last token: it predicts the first of the option.
    shared = (text - 1) // PAGE_SIZE * PAGE_SIZE
    assert sorted(cached) == [0, shared, shared]


@sgl.function
def tree_of_thought(s, question, width):
    s += "Q: " + question + "\n"
    ideas = s.fork(width)
    ideas += lambda i: f"{i} I:" + sgl.gen("idea", max_tokens=8, temperature=0, stop="\n")
    for i, idea in enumerate(ideas):
        idea += "\n"
        steps = idea.fork(2)
        for j in range(2):
            steps[j] += f"{j} S:" + sgl.gen("step", max_tokens=8, temperature=0, stop=".")
        steps.join()
        idea += "W:" + sgl.select("worth", choices=["high", "low"])
        s[f"worth {i}"] = idea["worth"]
    ideas.join()
    s += "A:" + sgl.gen("answer", max_tokens=16, temperature=0)
    return [idea["idea"] for idea in ideas]


def test_tree_of_thought(make, check_balanced):
    make(replies(I="try\n", S="do.", W="low", A="42"))
    state = tree_of_thought.run(question="why?", width=3)
    assert state.ret_value == ["try"] * 3
    assert state["idea"] == ["try"] * 3
    assert state["step"] == [["do", "do"]] * 3
    assert state["worth"] == ["low"] * 3
    assert state["worth 2"] == "low"
    assert state.text() == "Q: why?\nA:42"


@sgl.function
def forked(s, text):
    s += text
    forks = s.fork(3)
    forks += lambda i: f"{i} I:" + sgl.gen("x", max_tokens=4)
    forks.join()
    s["metas"] = [fork.get_meta_info("x") for fork in forks]


def test_forks_share_the_pages_of_what_they_forked_from(make):
    make(replies(I="abc"))
    text = "what all of them have in common, " * 10
    cached = [meta["cached_tokens"] for meta in forked.run(text=text)["metas"]]
    assert sorted(cached) == [0, len(text), len(text)]  # computed once, also where all begin at once
    again = [meta["cached_tokens"] for meta in forked.run(text=text)["metas"]]
    assert all(count >= len(text) for count in again)


DIMENSIONS = ["clear", "right"]


@sgl.function
def judge(s, essay):
    s += sgl.system("You judge.")
    s += sgl.user("An essay: " + essay)
    forks = s.fork(len(DIMENSIONS))
    for fork, dimension in zip(forks, DIMENSIONS, strict=True):
        fork += sgl.assistant(f"Is it {dimension}? V:" + sgl.gen("verdict", stop="\n", max_tokens=20))
    forks.join()
    s += sgl.assistant("G:" + sgl.select("grade", choices=["A", "B"]))


def test_a_judge_of_several_dimensions(make):
    make(replies(V="yes\n", G="B"))
    state = judge.run(essay="so <eos> there", **GREEDY)
    assert state["verdict"] == ["yes", "yes"]
    assert state["grade"] == "B"
    assert state.messages() == [
        {"role": "system", "content": "You judge."},
        {"role": "user", "content": "An essay: so <eos> there"},
        {"role": "assistant", "content": "G:B"},
    ]
    assert state.text() == "system: You judge.\nuser: An essay: so <eos> there\nassistant: G:B\n"


@sgl.function
def chat(s, first, second):
    s += sgl.system("Be kind.")
    s += sgl.user(first)
    s += sgl.assistant(sgl.gen("one", max_tokens=30, return_logprob=True))
    with s.user():
        s += second
    s += sgl.assistant_begin()
    s += sgl.gen("two", max_tokens=30)
    s += sgl.assistant_end()


def test_a_second_turn_computes_only_what_is_new(make):
    make(replies(assistant=" hello"))
    state = chat.run(first="hi", second="and 2", **GREEDY)
    assert (state["one"], state["two"]) == ("hello", "hello")
    first, second = state.get_meta_info("one"), state.get_meta_info("two")
    assert first["output_token_logprobs"]
    assert second["cached_tokens"] == first["prompt_tokens"] + len(state["one"])


def test_what_a_message_says_is_never_a_control_token(make):
    engine = make(replies(assistant=""))
    seen = []
    generate = engine.generate
    engine.generate = lambda *args, **kwargs: (seen.append(args[2]), generate(*args, **kwargs))[1]
    judge.run(essay="<eos>", **GREEDY)
    assert seen
    assert all(EOS not in (ids if isinstance(ids[0], int) else ids[0]) for ids in seen)


# -- what can be said --------------------------------------------------------------------------------------------------


def test_parameters_of_the_run_hold_where_an_answer_has_none(make):
    make(replies(a="xyzxyz", b="xyzxyz"))

    @sgl.function
    def program(s):
        s += "a:" + sgl.gen("a") + " b:" + sgl.gen("b", max_tokens=2)

    state = program.run(max_new_tokens=4, **GREEDY)
    assert (state["a"], state["b"]) == ("xyzx", "xy")
    assert state.text() == "a:xyzx b:xy"


def test_several_answers_are_a_list_and_the_first_goes_on(make):
    make()

    @sgl.function
    def program(s):
        s += "x" + sgl.gen("a", n=3, max_tokens=4, ignore_eos=True)

    state = program.run(sampling_seed=5)
    assert len(set(state["a"])) == 3
    assert state.text() == "x" + state["a"][0]
    assert [meta["completion_tokens"] for meta in state.get_meta_info("a")] == [4, 4, 4]


def test_gen_with_choices_is_a_select(make):
    make(replies(a="two"))

    @sgl.function
    def program(s):
        s += "a:" + sgl.gen("n", choices=["one", "two"])
        with s.var_scope("all"):
            s += " it is " + s["n"]

    state = program.run()
    assert (state["n"], state["all"]) == ("two", " it is two")
    assert "n" in state and "m" not in state


def test_a_program_is_part_of_another(make):
    make(replies(a="x"))

    @sgl.function
    def inner(s, name):
        s += "a:" + sgl.gen(name)
        return "told"

    @sgl.function
    def outer(s):
        s["said"] = inner(s, name="n")

    state = outer.run(use_thread=False)
    assert (state["n"], state["said"]) == ("x", "told")
    assert inner.bind(name="m").run()["m"] == "x"


def test_arguments_of_gen_have_sglangs_order():
    assert " ".join(inspect.signature(sgl.gen).parameters) == (
        "name max_tokens min_tokens n stop stop_token_ids stop_regex temperature top_p top_k min_p frequency_penalty"
        " presence_penalty ignore_eos return_logprob logprob_start_len top_logprobs_num return_text_in_logprobs dtype"
        " choices choices_method regex json_schema"
    )


def test_a_dtype_becomes_a_regex():
    number = sgl.gen_int("n", max_tokens=5, stop="!")
    assert number.params["regex"] == r"[-+]?[0-9]+[ \n]?"
    assert number.params["stop"] == ["!", " ", "\n"]
    assert sgl.gen_string("n").params["regex"].startswith('"')
    assert sgl.gen("n", dtype=bool).params["regex"] == "(True|False)"


@pytest.mark.parametrize(
    ("make_expression", "said"),
    [
        (lambda: sgl.gen("n", dtype=bytes), "dtype must be one of"),
        (lambda: sgl.gen("n", dtype=int, regex="a"), "give one of"),
        (lambda: sgl.gen("n", choices=["a"], regex="a"), "cannot be together"),
        (lambda: sgl.select("n", []), "must be a list of texts"),
        (lambda: sgl.select("n", ["a", ""]), "must be a list of texts"),
        (lambda: sgl.select("n", ["a"], temperature=1.0), "is not sampled"),
        (lambda: sgl.image("cat.png"), "image\\(\\) is not supported"),
        (lambda: sgl.video("cat.mp4", 3), "video\\(\\) is not supported"),
        (lambda: sgl.function(lambda state: None), "must be s"),
        (lambda: sgl.user() + 3, "a int cannot be added"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(make_expression, said):
    with pytest.raises(ProgramError, match=said):
        make_expression()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda s: sgl.user("a") + "between", "stands between messages"),
        (lambda s: sgl.user("a") + sgl.gen("x"), "must stand in a message"),
        (lambda s: sgl.user_begin() + sgl.system("b"), "begins inside one of user"),
        (lambda s: sgl.assistant_end(), "has not begun"),
        (lambda s: "plain" + sgl.user("a"), "behind plain text"),
        (lambda s: "a:" + sgl.gen("x", temperature=-1), r"program wrong_one, gen\('x'\): .*temperature"),
        (lambda s: sgl.select("x", ["a"]), "needs a text before it"),
        (lambda s: "a:" + sgl.gen("x", stop_regex="b+"), "stop_regex is not supported"),
        (lambda s: "a:" + sgl.gen("x", return_logprob=True, return_text_in_logprobs=True), "is a server's"),
    ],
)
def test_what_is_wrong_in_a_program_is_told_with_its_name(make, wrong, said):
    make(replies(a="x"))

    @sgl.function
    def wrong_one(s):
        s += wrong(s)

    with pytest.raises(ProgramError, match=said) as caught:
        wrong_one.run()
    assert "wrong_one" in str(caught.value)


class Words:
    """A backend whose model may write a text with other ids than its encoder: "ab" is 3, and 1 2 as well."""

    keeps_ids = True
    texts = ("", "a", "b", "ab", " ", "[", "]", "user", "assistant")

    def encode(self, text, *, begins=False, has_special=False):
        ids = []
        while text:
            ids.append(
                max((i for i, t in enumerate(self.texts) if t and text.startswith(t)), key=lambda i: len(self.texts[i]))
            )
            text = text[len(self.texts[ids[-1]]) :]
        return ids

    def encode_chat(self, messages, *, is_open, goes_on=True):
        text = "".join(f"[{m['role']} {m['content']}]" for m in messages)
        return self.encode(text + ("[assistant " if goes_on else ""))

    def decode(self, ids):
        return "".join(self.texts[i] for i in ids)


def test_what_the_model_wrote_stays_as_it_wrote_it():
    backend, said = Words(), Transcript()
    said.say("a")
    said.say_generated("ab", [1, 2], said.prompt_ids(backend), backend)
    said.say("b")
    assert said.prompt_ids(backend) == [1, 1, 2, 2]
    said.say_generated("a", [1, 2, 4], said.prompt_ids(backend), backend)  # a stop string was cut off
    assert said.prompt_ids(backend, "b") == [1, 1, 2, 2, 1, 2]
    assert said.text(backend) == "aabba"


@pytest.mark.parametrize("is_rewritten", [False, True])
def test_what_the_model_wrote_stays_in_messages_if_the_template_repeats_it(is_rewritten):
    backend, said = Words(), Transcript()
    said.begin("user")
    said.say("ab")
    said.end("user")
    said.begin("assistant")
    said.say_generated("ab", [1, 2], said.prompt_ids(backend), backend)
    assert said.prompt_ids(backend)[-2:] == [1, 2]
    said.end("assistant")
    if is_rewritten:
        said.messages[1]["content"] = "b"
    said.begin("assistant")
    answer = [2] if is_rewritten else [1, 2]
    assert said.prompt_ids(backend) == [5, 7, 4, 3, 6, 5, 8, 4, *answer, 6, 5, 8, 4]


# -- methods of choice -------------------------------------------------------------------------------------------------


def test_the_three_methods_choose_by_their_own_measure():
    given, alone = [[-1.0, -1.0], [-0.5, -3.0, -0.1]], [[-1.0, -1.0], [-3.0, -3.0, -0.1]]
    assert sgl.token_length_normalized(given) == pytest.approx([-1.0, -1.2])
    assert sgl.greedy_token_selection(given) == [0.0, 2.0]
    assert sgl.greedy_token_selection([[-1.0], [-1.0, -2.0]]) == [3.0, 1.0]  # goes on with its mean
    assert sgl.unconditional_likelihood_normalized(given, alone) == pytest.approx([0.0, 2.5 / 3])


@pytest.mark.parametrize("method", [sgl.greedy_token_selection, sgl.unconditional_likelihood_normalized])
def test_other_methods_of_choice_run(make, method):
    make(replies(a="two"))

    @sgl.function
    def program(s):
        s += "a:" + sgl.select("n", ["one", "two"], choices_method=method)

    assert program.run()["n"] == "two"


# -- many, and while they grow -----------------------------------------------------------------------------------------


@sgl.function
def answer(s, question):
    s += question + " a:" + sgl.gen("x", max_tokens=8)


def test_a_batch_gives_states_in_order(make, check_balanced, capsys):
    make(replies(a="yes"))
    rows = [{"question": f"{i}?"} for i in range(20)]
    states = answer.run_batch(rows, num_threads=4, progress_bar=True, **GREEDY)
    assert [state.text() for state in states] == [f"{i}? a:yes" for i in range(20)]
    assert "20/20 programs" in capsys.readouterr().err
    states = answer.run_batch([("1?",), ("2?",)], generator_style=True)
    assert [state["x"] for state in states] == ["yes", "yes"]
    assert answer.run_batch([]) == []


def test_a_batch_ends_with_the_first_error(make, check_balanced):
    make(replies(a="yes"))
    with pytest.raises(ProgramError, match=r"program answer, gen\('x'\)"):
        answer.run_batch([{"question": "1?"}, {"question": "2" * 5000}, {"question": "3?"}])


def test_a_variable_is_read_while_it_grows(make, check_balanced):
    make(replies(a="abcdef"))
    state = answer.run(question="q", stream=True)
    pieces = list(state.text_iter("x"))
    assert "".join(pieces) == "abcdef" == state["x"]
    assert "".join(answer.run(question="q", stream=True).text_iter()) == "q a:abcdef"
    assert list(answer.run(question="q").text_iter("x")) == ["abcdef"]


def test_a_variable_is_read_by_asyncio(make, check_balanced):
    make(replies(a="abcdef"))

    async def read():
        state = answer.run(question="q", stream=True)
        pieces = [piece async for piece in state.text_async_iter("x")]
        told = [item async for item in state.text_async_iter("x", return_meta_data=True)]
        return pieces, told

    pieces, told = asyncio.run(read())
    assert "".join(pieces) == "abcdef"
    assert told[-1][0] == "" and told[-1][1]["finish_reason"]["type"] == "stop"


def test_an_engine_whose_chunks_hold_what_is_new_gives_the_same(make):
    make(replies(a="abcdef"), incremental_streaming_output=True)
    state = answer.run(question="q", stream=True, return_logprob=True)
    assert "".join(state.text_iter("x")) == "abcdef"
    assert len(state.get_meta_info("x")["output_token_logprobs"]) == 7


@sgl.function
def tree_search(s, question, width):
    def plans(s):
        s += sgl.user(question)
        forks = s.fork(width)
        forks += sgl.assistant("P:" + sgl.gen("plan", max_tokens=9))
        return forks

    def answers(s):
        s += sgl.user("do it")
        forks = s.fork(width)
        forks += sgl.assistant("A:" + sgl.gen("answer", max_tokens=9))
        return forks

    found = []
    for plan in plans(s):
        found.extend(answers(plan))
    del plan
    gc.collect()  # what they were forked from is gone
    return found


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_forks_outlive_what_they_were_forked_from(make, check_balanced, stream):
    make(replies(P="first", A="done"))
    state = tree_search.run(question="why", width=2, stream=stream)
    if stream:
        assert list(state.text_iter()) == ["why"]
    found = state.ret_value
    del state
    assert [fork["answer"] for fork in found] == ["done"] * 4
    assert [message["content"] for message in found[3].messages()] == ["why", "P:first", "do it", "A:done"]


# -- ends --------------------------------------------------------------------------------------------------------------


def wait_until_idle(engine, core):
    deadline = time.monotonic() + 60
    while engine._loop.call(lambda: core.has_work):
        assert time.monotonic() < deadline, "requests go on though nobody wants them"
        time.sleep(0.005)


@pytest.fixture
def endless(make, make_engine):
    """An engine whose answers do not end, with its steps held until told."""
    gate = Gate()
    engine = make(replies(), runner_options={"raises": gate})
    yield engine, gate
    gate.is_open.set()


@sgl.function
def long_one(s, num_forks=0):
    s += "text"
    if num_forks:
        forks = s.fork(num_forks)
        forks += sgl.gen("x", max_tokens=500, ignore_eos=True)
        forks.join()
    s += sgl.gen("x", max_tokens=500, ignore_eos=True)


@pytest.mark.slow
@pytest.mark.parametrize("num_forks", [0, 2])
def test_a_stream_that_is_dropped_ends_its_requests(endless, make_engine, check_balanced, num_forks):
    engine, gate = endless
    state = long_one.run(num_forks=num_forks, stream=True)
    assert gate.entered.wait(60)
    del state
    gc.collect()
    gate.is_open.set()
    wait_until_idle(engine, make_engine.core)
    assert engine.get_server_info()["internal_states"][0]["generated_tokens"] < 500


@pytest.mark.slow
def test_streams_dropped_at_any_moment_leave_nothing_behind(make, check_balanced):
    make(replies())
    for num_pieces in range(12):
        state = long_one.run(num_forks=num_pieces % 3, stream=True)
        pieces = state.text_iter()
        # Of forks, the first piece of all that is said is the last; and who reads slowly gets fewer, larger ones.
        for _ in range(1 if num_pieces % 3 else num_pieces):
            next(pieces, None)
        del state, pieces
    gc.collect()
    deadline = time.monotonic() + 60
    while threads := [thread.name for thread in threading.enumerate() if thread.name.startswith("mooli-long_one")]:
        assert time.monotonic() < deadline, threads
        time.sleep(0.005)


def test_a_program_that_raises_ends_its_requests(endless, make_engine, check_balanced):
    engine, gate = endless

    @sgl.function
    def program(s):
        s += "text" + sgl.gen("x", max_tokens=500, ignore_eos=True)
        assert gate.entered.wait(60)
        raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        program.run()
    gate.is_open.set()
    wait_until_idle(engine, make_engine.core)


def test_a_fork_that_fails_is_told_with_its_number(make):
    make(replies(a="x"))

    @sgl.function
    def program(s):
        forks = s.fork(2)
        forks += ["a:" + sgl.gen("x"), "a:" + sgl.gen("x", top_p=7)]
        forks.join()

    with pytest.raises(ProgramError, match=r"program program/fork 1, gen\('x'\): .*top_p") as caught:
        program.run()
    assert isinstance(caught.value.__cause__, RequestError)


def test_a_step_that_fails_reaches_the_reader_of_a_stream(make):
    make(runner_options={"raises": lambda batch: RuntimeError("planted")})
    state = answer.run(question="q", stream=True)
    with pytest.raises(ProgramError, match="planted"):
        list(state.text_iter("x"))
    assert "planted" in str(state.error())
    with pytest.raises(ProgramError, match="planted"):
        state["x"]


def test_a_variable_that_nothing_makes_is_a_key_error(make):
    make(replies(a="x"))
    state = answer.run(question="q")
    with pytest.raises(KeyError, match="no variable 'y'"):
        state["y"]


def test_without_a_backend_it_is_said_how_to_get_one(monkeypatch):
    monkeypatch.setattr(backends, "_default", [])
    with pytest.raises(ProgramError, match="set_default_backend"):
        answer.run(question="q")
    with pytest.raises(ProgramError, match="a str is no backend"):
        sgl.set_default_backend("http://localhost")


def test_a_stream_is_closed_from_another_thread_while_it_waits(endless):
    engine, gate = endless
    stream = engine.generate("text", {"max_new_tokens": 500, "ignore_eos": True}, stream=True)
    assert gate.entered.wait(60)
    read: list[dict] = []
    reader = threading.Thread(target=lambda: read.extend(stream))
    reader.start()
    stream.close()
    reader.join(60)
    assert not reader.is_alive()


# -- Engine.chat and the tokenizer -------------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "hi <eos>"}]


def test_chat_is_generate_with_the_models_template(make):
    engine = make(replies(assistant=" hello"))
    answer = engine.chat(HELLO, GREEDY)
    assert answer["text"] == "hello"
    ids = engine.tokenizer_manager.tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)
    assert EOS not in ids and answer["meta_info"]["prompt_tokens"] == len(ids)
    assert engine.generate(input_ids=ids, sampling_params=GREEDY)["text"] == answer["text"]
    assert [a["text"] for a in engine.chat([HELLO, HELLO], GREEDY)] == [answer["text"]] * 2
    assert list(engine.chat(HELLO, GREEDY, stream=True))[-1]["text"] == answer["text"]
    assert asyncio.run(engine.async_chat(HELLO, GREEDY))["text"] == answer["text"]
    assert engine.chat(HELLO, GREEDY, return_logprob=True)["meta_info"]["output_token_logprobs"]


def test_chat_refuses_a_prompt_and_needs_a_tokenizer(make, make_engine):
    with pytest.raises(RequestError, match="leave out input_ids"):
        make().chat(HELLO, input_ids=[1])
    with pytest.raises(TypeError, match="nonsense"):
        make().chat(HELLO, nonsense=1)
    with pytest.raises(mooli.PromptError, match="needs a tokenizer"):
        make_engine(skip_tokenizer_init=True).chat(HELLO)


def test_the_tokenizer_has_what_scripts_ask_of_it(make):
    tokenizer = make().tokenizer_manager.tokenizer
    text = tokenizer.apply_chat_template(HELLO, tokenize=False, add_generation_prompt=True)
    assert text == "user: hi <eos>\nassistant: "
    assert tokenizer.apply_chat_template([HELLO], tokenize=False) == ["user: hi <eos>\n"]
    assert tokenizer.decode(tokenizer.encode("añ")) == "añ"
    assert tokenizer.eos_token is None and tokenizer.eos_token_id is None
