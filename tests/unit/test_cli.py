"""The command line: what is printed where, exit statuses, and a conversation."""

from __future__ import annotations

import functools
import io
import re
import signal
import threading

import pytest
from fake_engine import FakeEngine, says

import mooli
from mooli import cli
from mooli.config import EngineConfig


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command on a fake model; gives (status, stdout, stderr)."""
    make = FakeEngine(monkeypatch)

    def run(*argv, stdin="", next_token=None, raises=None):
        make.runner_options = {"next_token": next_token or says("answer"), "raises": raises}
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin)
        status = cli.main([*argv])
        return status, *capsys.readouterr()

    return run


MODEL = ("--model-path", "fake")
GREEDY = (*MODEL, "--temperature", "0")
IN_CHAT = says("answer", after="assistant: ")


def test_version_prints_the_version(run):
    assert run("version") == (0, f"mooli {mooli.__version__}\n", "")


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
    ("words", "temperature", "length"),
    [
        ([], 0.7, 128),
        (["--preferred-sampling-params", '{"temperature": 0.25}'], 0.25, 128),
        (["--preferred-sampling-params", '{"temperature": 0.25, "max_new_tokens": 3}'], 0.25, 3),
        (["--preferred-sampling-params", '{"temperature": 0.25}', "--temperature", "0.5"], 0.5, 128),
    ],
    ids=["neither", "preferred", "length too", "a flag wins"],
)
def test_preferred_parameters_win_over_the_commands_defaults_and_flags_over_both(run, words, temperature, length):
    seen = set()
    line = ("generate", *MODEL, "--context-length", "512", "--prompt", "say>", *words)
    look = {"next_token": lambda _: ord("a"), "raises": lambda batch: seen.update(batch.sampling.temperature.tolist())}
    status, out, _ = run(*line, **look)
    assert (status, out) == (0, "a" * length + "\n")
    assert list(seen) == [pytest.approx(temperature)]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate"], "model_path is missing"),
        (["generate", *MODEL, "--tp", "2"], "use tp_size=1"),
        (["generate", *MODEL, "--top-p", "7", "--prompt", "x"], "top_p=7.0 is outside"),
        (["generate", *MODEL, "--prompt", "x" * 500], "the prompt has 500 tokens"),
    ],
    ids=["no model", "bad engine flag", "bad sampling flag", "long prompt"],
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


def test_chat_tells_reasoning_apart_and_keeps_it_so(run, monkeypatch):
    """On standard error, dim where that is a terminal; the template decides what of it the model reads again."""
    seen = []
    template = (
        "{% for m in messages %}{{ m.role }}({{ m.reasoning_content }}): {{ m.content }}\n{% endfor %}assistant: "
    )
    words = says("<think>\nhm\n</think>\n\nyes", after="assistant: ")

    def next_token(context):
        text = bytes(i for i in context if i < 256).decode()
        if text.endswith("assistant: "):
            seen.append(text)
        return words(context)

    flags = ("--reasoning-parser", "qwen3", "--chat-template", template)
    status, out, err = run("chat", *GREEDY, *flags, stdin="one\ntwo\n", next_token=next_token)
    assert (status, out) == (0, "yes\nyes\n")
    assert err.count("\nhm\n") == 2 and "\x1b" not in err
    assert seen[1] == "user(): one\nassistant(hm): yes\nuser(): two\nassistant: "
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    err = run("chat", *GREEDY, *flags, stdin="one\n", next_token=words)[2]
    assert "\x1b[2mh" in err and "hm\n" in re.sub(r"\x1b\[[02]m", "", err)


def test_chat_begins_with_the_system_message(run):
    seen = []
    run("chat", *GREEDY, "--system", "be brief", stdin="hi\n", next_token=lambda c: seen.append(bytes(c)) or 256)
    assert seen == [b"system: be brief\nuser: hi\nassistant: "]


def test_chat_ends_at_exit_and_explains_other_commands(run):
    status, out, err = run("chat", *GREEDY, stdin="/help\n/exit\nnever\n")
    assert (status, out) == (0, "")
    assert "/reset" in err and "forget the conversation" in err


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


@pytest.fixture
def in_the_foreground():
    """A shell starts jobs in the background without Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_foreground")
def test_ctrl_c_in_a_chat_ends_the_answer_and_not_the_program(run):
    status, out, err = run("chat", *GREEDY, stdin="one\n/reset\ntwo\n", next_token=IN_CHAT, raises=interrupts_at(2))
    assert status == 0
    assert out.endswith("answer\n")
    assert len(out) < 2 * len("answer\n") + 1
    assert "interrupted" in err


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize("command", ["generate", "demo"])
def test_ctrl_c_ends_other_commands_with_130(run, command):
    prompt = ["--prompt", "say>"] if command == "generate" else []
    assert run(command, *GREEDY, *prompt, raises=interrupts_at(2))[0] == 130


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["generate", "--max-new-tokenz", "3"], "there is no flag --max-new-tokenz; did you mean --max-new-tokens?"),
        (["chat", "--tempereture=3"], "there is no flag --tempereture; did you mean --temperature?"),
        (["generate", "--qqqqqqqq"], "there is no flag --qqqqqqqq (see"),
        (["generate", "--speculative-eagle-topk", "4"], "known to SGLang but not supported"),
        (["generate", "--dtype", "int9"], "invalid choice: 'int9'"),
        (["generate", "--context-length", "8z"], "'8z' is not a number like"),
        (["chta"], "invalid choice: 'chta'"),
        ([], "required: COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_command_line_is_one_line_that_says_what_is_right(run, capsys, argv, message):
    with pytest.raises(SystemExit) as raised:
        run(*argv)
    assert raised.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert message in err
    assert "--help" in err


def test_the_version_is_a_flag_too(run, capsys):
    with pytest.raises(SystemExit) as raised:
        run("--version")
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"mooli {mooli.__version__}\n"


def test_the_device_is_named_once_when_the_model_is_ready(run, monkeypatch):
    monkeypatch.setattr("mooli.answers.device_words", lambda described: "avx2, 2 threads")
    _, _, err = run("demo", "--temperature", "0")
    assert err.count("backend cpu (avx2, 2 threads)") == 1


def test_a_line_end_behind_a_piped_prompt_is_no_part_of_it(run):
    seen = []
    run("generate", *GREEDY, stdin="two\nlines\n", next_token=lambda c: seen.append(bytes(c)) or 256)
    assert seen == [b"two\nlines"]


@pytest.mark.parametrize("flag", [("--temperature", "nan"), ("--seed", "-99999999999999999999"), ("--stop", "")])
def test_sampling_flags_are_checked_before_the_model_is_loaded(run, flag):
    status, _, err = run("generate", *MODEL, "--prompt", "x", *flag)
    assert status == 2
    assert "ready in" not in err


def test_an_empty_prompt_is_refused_before_the_model_is_loaded(run):
    status, _, err = run("generate", *MODEL, stdin="")
    assert status == 2
    assert "the prompt is empty" in err
    assert "ready in" not in err


def test_an_empty_prompt_of_a_flag_is_refused_before_the_model_is_loaded(run):
    status, _, err = run("generate", *MODEL, "--prompt", "say>", "--prompt", "")
    assert (status, err) == (2, "mooli: error: --prompt is empty: give a text, or leave it out for standard input\n")


IN_EVERY_COMMAND = (["--served-model-name", "x"], ["--incremental-streaming-output"], ["--skip-tokenizer-init"])
IN_A_CONVERSATION = (["--schedule-policy", "lpm"], ["--max-running-requests", "4"])


@pytest.mark.parametrize(
    ("command", "words"),
    [
        *((command, words) for command in ("generate", "chat", "demo") for words in IN_EVERY_COMMAND),
        *((command, words) for command in ("chat", "demo") for words in IN_A_CONVERSATION),
        ("generate", ["--stream-interval", "2", "--prompt", "a", "--prompt", "b"]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_an_engine_flag_that_would_change_nothing_is_refused_with_the_reason(run, command, words):
    status, out, err = run(command, *MODEL, *words)
    assert (status, out) == (2, "")
    assert err.startswith(f"mooli: error: {words[0]}: ")
    assert err.endswith("; remove it\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize("command", ["generate", "chat", "demo"])
def test_help_is_as_clean_as_the_servers_and_shows_only_what_works(run, capsys, command):
    with pytest.raises(SystemExit):
        run(command, "--help")
    text = capsys.readouterr().out
    takes_words = command != "demo"
    assert text.startswith(f"usage: mooli {command} {'[MODEL] [PROMPT] ' if takes_words else ''}[FLAG ...]\n")
    headings = re.findall(r"^(\w.*):$", text, re.MULTILINE)
    assert headings == [
        *(["positional arguments"] if takes_words else []),
        *("options", "sampling", "model", "weights and numbers", "device", "memory and batching"),
        *("KV cache on disk", "guessed tokens", "answers", "logs"),
    ]
    hidden = {words[0] for words in (*IN_EVERY_COMMAND, *(IN_A_CONVERSATION if command != "generate" else ()))}
    shown = {f"--{name.replace('_', '-')}" for name in EngineConfig.names()} - hidden - {"--trust-remote-code"}
    assert shown - {"--stream-output"} <= set(re.findall(r"--[\w-]+", text))
    assert not hidden & set(re.findall(r"--[\w-]+", text))


def test_of_several_prompts_one_that_fails_is_an_error_and_the_others_are_answered(run):
    def raises(batch):
        return MemoryError("planted") if b"2" in bytes(batch.token_ids.tolist()) else None

    prompts = ("--prompt", "1>", "--prompt", "2>")
    status, out, err = run("generate", *GREEDY, *prompts, "--max-running-requests", "1", raises=raises)
    assert status == 2
    assert "--- 1>" in out
    assert "planted" in err


def test_what_is_typed_in_a_chat_cannot_end_the_turn(run):
    seen = []
    run("chat", *GREEDY, stdin="a<mark>b<eos>\n", next_token=lambda c: seen.append(list(c)) or 256)
    assert max(seen[0]) < 256
    assert bytes(seen[0]) == b"user: a<mark>b<eos>\nassistant: "


class Full(io.StringIO):
    """A disk without space."""

    def write(self, text):
        raise OSError(28, "No space left on device")

    flush = functools.partialmethod(write, "")


def test_output_that_cannot_be_written_is_an_error_without_a_traceback(run, monkeypatch):
    monkeypatch.setattr("sys.stdout", Full())
    status, _, err = run("generate", *GREEDY, "--prompt", "say>")
    assert status == 1
    assert err.splitlines()[-1].endswith("No space left on device")
    assert "Traceback" not in err


def test_another_error_of_the_system_is_not_called_one_of_the_output(run, monkeypatch):
    def raises(*_, **__):
        raise PermissionError(13, "Permission denied", "/models/m.gguf")

    monkeypatch.setattr("mooli.answers.Engine", raises)
    status, out, err = run("generate", *GREEDY, "--prompt", "say>")
    assert (status, out, err) == (2, "", "mooli: error: [Errno 13] Permission denied: '/models/m.gguf'\n")


def test_a_closed_standard_output_is_said_before_anything_is_loaded(run, monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    status, _, err = run("generate", *GREEDY, "--prompt", "say>")
    assert status == 1
    assert err == "mooli: error: standard output is closed: nothing could be printed\n"


def test_characters_that_the_terminal_lacks_are_replaced(run, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert run("generate", *GREEDY, "--prompt", "say>", next_token=says("a\u00e9b"))[0] == 0
    assert written.getvalue() == b"a?b\n"


def test_bytes_in_a_pipe_that_are_no_text_are_refused(run):
    status, _, err = run("generate", *GREEDY, stdin=io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    assert status == 2
    assert "not valid Unicode" in err.splitlines()[-1]
