"""Programs of the frontend language with the real 135M model: in this process, over HTTP, and the example."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from server_process import ServerProcess, needs_demo, wait_until

import mooli
import mooli as sgl
from mooli.lang import backends

pytestmark = needs_demo

EXAMPLE = Path(__file__).parents[2] / "examples/judge.py"
DOCUMENT = Path(__file__).parents[2] / "docs/lang.md"
POOL = 4096
LONG_QUESTION = "Tell me two uses of it that people in many countries would know. " * 5


@sgl.function
def capitals(s, country):
    s += "The capital of Germany is Berlin.\nThe capital of Spain is Madrid.\nThe capital of Italy is Rome.\n"
    s += f"The capital of {country} is" + sgl.gen("capital", max_tokens=6, stop=[".", "\n"])
    s += ".\nIt lies in" + sgl.select("continent", choices=[" Europe", " Asia", " Africa"])


@sgl.function
def conversation(s, first, second):
    s += sgl.system("You answer in one sentence.")
    s += sgl.user(first)
    s += sgl.assistant(sgl.gen("one", max_tokens=12))
    s += sgl.user(second)
    forks = s.fork(2)
    for i, fork in enumerate(forks):
        fork += sgl.assistant(f"{i + 1}." + sgl.gen("two", max_tokens=6))
    forks.join()
    s["metas"] = [fork.get_meta_info("two") for fork in forks]


def run_both(backend):
    first = capitals.run(country="France", backend=backend, temperature=0)
    second = conversation.run(first="What is bread?", second=LONG_QUESTION, backend=backend, temperature=0)
    return first, second


@pytest.fixture(scope="module")
def in_process():
    with mooli.Engine(model_path="demo", backend="cpu", max_total_tokens=POOL) as engine:
        yield run_both(engine)


def test_few_shot_programs_are_answered_and_choose(in_process):
    state, _ = in_process
    assert state["capital"].strip() == "Paris"
    assert state["continent"] == " Europe"
    assert "The capital of France is Paris.\nIt lies in Europe" in state.text()
    meta = state.get_meta_info("continent")
    # All options begin at once: the text before is computed for one, and the full pages of it are there for all.
    assert all(
        cached >= prompt // 32 * 32 - 32
        for cached, prompt in zip(meta["cached_tokens"], meta["prompt_tokens"], strict=True)
    )


def test_a_second_turn_and_its_forks_compute_only_what_is_new(in_process):
    _, state = in_process
    one = state.get_meta_info("one")
    known = one["prompt_tokens"] + one["completion_tokens"] - 1  # the last token was never read
    cached = [meta["cached_tokens"] for meta in state["metas"]]
    assert all(count >= known for count in cached)
    assert sorted(cached)[1] >= known + 32, "the second turn's question is computed once for both"


@sgl.function
def held(s):
    s += "The year in which Columbus sailed: " + sgl.gen_int("year", max_tokens=6) + ". He said: "
    s += sgl.gen_string("words", max_tokens=60) + " Was it so? " + sgl.gen("so", regex="(yes|no)", max_tokens=4)


def test_what_a_program_holds_to_a_form_is_of_it():
    with mooli.Engine(model_path="demo", backend="cpu", max_total_tokens=POOL) as engine:
        state = held.run(backend=engine, temperature=0)
    assert int(state["year"]) == 1492
    assert isinstance(json.loads(state["words"]), str)
    assert state["so"] in ("yes", "no")


def test_a_server_answers_programs_as_the_engine_does(in_process):
    with ServerProcess() as server:
        state, chat = run_both(sgl.RuntimeEndpoint(server.url))
        assert [state[name] for name in ("capital", "continent")] == [
            in_process[0][name] for name in ("capital", "continent")
        ]
        assert chat["one"] == in_process[1]["one"]
        assert chat["two"] == in_process[1]["two"]
        assert chat.text() == in_process[1].text()
        endless = capitals.run(country="France", backend=sgl.RuntimeEndpoint(server.url), temperature=0, stream=True)
        assert "".join(endless.text_iter("capital")) == state["capital"]
        with pytest.raises(mooli.ProgramError, match=r"program capitals, gen\('capital'\).*temperature"):
            capitals.run(country="France", backend=sgl.RuntimeEndpoint(server.url), temperature=-1)
    with pytest.raises(mooli.ProgramError, match="cannot be reached"):
        capitals.run(country="France", backend=sgl.RuntimeEndpoint(server.url))


def test_a_program_that_is_dropped_ends_its_requests_on_the_server():
    @sgl.function
    def endless(s):
        s += "Once" + sgl.gen("x", max_tokens=3000, ignore_eos=True)

    with ServerProcess() as server:
        state = endless.run(backend=sgl.RuntimeEndpoint(server.url), stream=True)
        next(pieces := state.text_iter("x"))
        del state, pieces

        wait_until(lambda: server.load()["num_running_reqs"] == 0, "the request ends")


def test_a_runtime_starts_a_server_of_its_own():
    with sgl.Runtime(model_path="demo", max_total_tokens=POOL) as runtime:
        assert capitals.run(country="France", backend=runtime, temperature=0)["capital"].strip() == "Paris"
        answer = json.loads(runtime.generate("Hello", {"max_new_tokens": 2, "temperature": 0}))
        assert answer["meta_info"]["completion_tokens"] == 2
        process = runtime._process
    assert process.poll() is not None
    with pytest.raises(mooli.EngineError, match="no-such-flag"):
        sgl.Runtime(model_path="demo", no_such_flag=1)


def test_the_example_runs():
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Grade: " in done.stdout and done.stdout.count("were in the cache") == 3


def test_the_program_of_the_document_runs(monkeypatch, capsys):
    monkeypatch.setattr(backends, "_default", [])
    (code,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict = {}
    exec(code, names)
    names["engine"].shutdown()
    assert capsys.readouterr().out == " Paris Europe\n"
    assert [state["city"] for state in names["states"]] == [" Rome", " Tokyo"]


def test_names_of_the_language_cost_nothing_until_they_are_used():
    code = (
        "import sys, mooli; mooli.gen, mooli.function, mooli.user\n"
        "print(sorted({'numpy', 'tokenizers', 'asyncio', 'http.client', 'mooli.frontend'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
