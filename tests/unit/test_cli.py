"""The command line: what is printed where, exit statuses, and a conversation."""

from __future__ import annotations

import io
import signal
import threading

import pytest
from fake_engine import FakeEngine, says

import mooli
from mooli import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command on a fake model; gives (status, stdout, stderr)."""
    make = FakeEngine(monkeypatch)

    def run(*argv, stdin="", next_token=None, raises=None):
        make.runner_options = {"next_token": next_token or says("answer"), "raises": raises}
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        status = cli.main([*argv])
        return status, *capsys.readouterr()

    return run


MODEL = ("--model-path", "fake")
GREEDY = (*MODEL, "--temperature", "0")
IN_CHAT = says("answer", after="assistant: ")


def test_version_prints_the_version(run):
    assert run("version") == (0, f"mooli {mooli.__version__}\n", "")


def test_no_command_is_a_usage_error(run):
    with pytest.raises(SystemExit) as raised:
        run()
    assert raised.value.code == 2


@pytest.mark.parametrize("command", ["generate", "chat", "demo"])
def test_every_command_has_help_with_engine_flags(run, capsys, command):
    with pytest.raises(SystemExit) as raised:
        run(command, "--help")
    assert raised.value.code == 0
    assert "--mem-fraction-static" in capsys.readouterr().out


def test_generate_prints_the_answer_and_on_stderr_the_figures(run):
    status, out, err = run("generate", *GREEDY, "--prompt", "say>")
    assert (status, out) == (0, "answer\n")
    assert "fake: ready in" in err
    assert "[7 tokens" in err
    assert "prompt 4 tokens, 0 from the cache" in err


def test_generate_reads_its_prompt_from_a_pipe(run):
    assert run("generate", *GREEDY, stdin="say>")[1] == "answer\n"


def test_generate_answers_several_prompts_together(run):
    assert run("generate", *GREEDY, "--prompt", "1>", "--prompt", "2>")[1] == "--- 1>\nanswer\n--- 2>\nanswer\n"


def test_generate_can_use_the_chat_template(run):
    seen = []

    def next_token(context):
        seen.append(bytes(context[:40]))
        return 256

    run("generate", *GREEDY, "--chat", "--prompt", "hi", next_token=next_token)
    run("generate", *GREEDY, "--chat", "--prompt", "hi", "--prompt", "ho", next_token=next_token)
    assert seen[0] == b"user: hi\nassistant: "
    assert {b"user: hi\nassistant: ", b"user: ho\nassistant: "} == set(seen[1:])


def test_sampling_flags_reach_the_model(run):
    assert run("generate", *GREEDY, "--prompt", "say>", "--stop", "sw")[1] == "an\n"
    assert run("generate", *GREEDY, "--prompt", "say>", "--max-new-tokens", "1")[1] == "a\n"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate"], "model_path is missing"),
        (["generate", *MODEL, "--tp", "2"], "use tp_size=1"),
        (["generate", *MODEL, "--top-p", "7", "--prompt", "x"], "top_p=7.0 is outside"),
        (["generate", *MODEL, "--prompt", "x" * 500], "the prompt has 500 tokens"),
        (["chat", *MODEL, "--skip-tokenizer-init"], "remove it"),
    ],
    ids=["no model", "bad engine flag", "bad sampling flag", "long prompt", "no tokenizer"],
)
def test_an_error_is_one_line_and_status_2(run, argv, message):
    status, out, err = run(*argv)
    assert (status, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("mooli: error: ")
    assert message in last
    assert "Traceback" not in err


def test_a_failed_request_is_an_error(run):
    status, _, err = run("generate", *MODEL, "--prompt", "x", raises=lambda batch: MemoryError("planted"))
    assert status == 2
    assert "planted" in err.splitlines()[-1]


def test_chat_keeps_the_conversation_until_reset(run):
    prompts = []

    def next_token(context):
        text = bytes(i for i in context if i < 256).decode()
        if text.endswith("assistant: "):
            prompts.append(text)
            return ord("A")
        return 256

    status, out, err = run("chat", *GREEDY, stdin="one\ntwo\n/reset\n\nthree\n", next_token=next_token)
    assert status == 0
    assert out == "A\nA\nA\n"
    assert prompts == [
        "user: one\nassistant: ",
        "user: one\nassistant: A\nuser: two\nassistant: ",
        "user: three\nassistant: ",
    ]
    figures = [line for line in err.splitlines() if line.startswith("[")]
    assert "21 tokens, 0 from the cache" in figures[0]
    assert "44 tokens, 22 from the cache" in figures[1]
    assert "forgotten" in err


def test_chat_begins_with_the_system_message(run):
    seen = []
    run("chat", *GREEDY, "--system", "be brief", stdin="hi\n", next_token=lambda c: seen.append(bytes(c)) or 256)
    assert seen == [b"system: be brief\nuser: hi\nassistant: "]


def test_chat_ends_at_exit_and_explains_other_commands(run):
    status, out, err = run("chat", *GREEDY, stdin="/help\n/exit\nnever\n")
    assert (status, out) == (0, "")
    assert "Commands: /reset, /exit" in err


def test_chat_goes_on_after_a_message_that_is_too_long(run):
    status, out, err = run("chat", *GREEDY, stdin="x" * 500 + "\nhi\n", next_token=IN_CHAT)
    assert (status, out) == (0, "answer\n")
    assert "mooli: error: the prompt has" in err
    assert "The last message is forgotten" in err


def test_demo_asks_three_questions_and_shows_speed_and_cache_hits(run):
    status, out, _ = run("demo", "--temperature", "0", next_token=lambda c: 256 if c[-1] == ord("A") else ord("A"))
    assert status == 0
    assert out.count(">>> ") == 3
    assert "binary search in Python" in out
    assert out.count("from the cache") == 4
    assert "all together: [6 tokens" in out


def interrupts_at(step):
    """A Ctrl-C while the model computes a step."""
    steps = iter(range(1, 10**6))

    def raises(batch):
        if next(steps) == step:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    return raises


def test_ctrl_c_in_a_chat_ends_the_answer_and_not_the_program(run):
    status, out, err = run("chat", *GREEDY, stdin="one\n/reset\ntwo\n", next_token=IN_CHAT, raises=interrupts_at(2))
    assert status == 0
    assert out.endswith("answer\n")
    assert len(out) < 2 * len("answer\n") + 1
    assert "interrupted" in err


@pytest.mark.parametrize("command", ["generate", "demo"])
def test_ctrl_c_ends_other_commands_with_130(run, command):
    prompt = ["--prompt", "say>"] if command == "generate" else []
    assert run(command, *GREEDY, *prompt, raises=interrupts_at(2))[0] == 130
