"""Opens model folders, each in a child with limits: `python model_opener.py < folders`, one JSON line for each.

Owns what is done with a model and what its child may take. The first folder must be good: what opening it imported
is imported here, and all children are forked from here, so one costs milliseconds.

"result" is "opened", "refused" (a MooliError) or what went wrong.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import select
import signal
import sys
import time
import traceback

import mooli
from mooli.frontend.chat_encoding import encode_chat

MAX_MEMORY_MIB = 512
"""More than this of resident memory beyond what the empty process has is a fault."""
MAX_ADDRESS_SPACE = 2 << 30
MAX_CPU_S = 10
PATIENCE_S = 30
"""Of the wall's clock: what waits for something that does not come uses no processor."""
MAX_MESSAGE = 4000

SECRET_NAME = "MOOLI_TEST_SECRET"


def open_and_use(folder: str) -> None:
    engine = mooli.Engine(
        model_path=folder, backend="cpu", num_threads=1, max_total_tokens=256, log_level="critical", random_seed=1
    )
    with engine:
        tokenizer = engine.tokenizer_manager.tokenizer
        said = []
        if tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": "hello world, aaa"}]
            try:
                ids = encode_chat(tokenizer, messages, add_generation_prompt=True)
                said.append(tokenizer.decode(ids, skip_special_tokens=False))
            except mooli.MooliError as exc:
                said.append(str(exc))
        answer = engine.generate("hello aaa world", {"max_new_tokens": 4, "ignore_eos": True})
        said.append(answer["text"])
        _check_said("\n".join(said))


def _check_said(text: str) -> None:
    secret = os.environ[SECRET_NAME]
    if secret in text:
        raise AssertionError("what the folder links to was given away")


def child(folder: str) -> str:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_ADDRESS_SPACE, MAX_ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_S, MAX_CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        open_and_use(folder)
    except mooli.MooliError as exc:
        _check_said(str(exc))
        return "refused" if len(str(exc)) <= MAX_MESSAGE else f"a message of {len(str(exc))} characters"
    return "opened"


def modules_of_an_opening(folder: str) -> list[str]:
    """What is imported while a good folder is opened. In a child: threads and forks do not go together."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        open_and_use(folder)
        with os.fdopen(theirs, "w") as out:
            json.dump(list(sys.modules), out)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as stream:
        names = json.load(stream)
    os.waitpid(pid, 0)
    return [name for name in names if name not in sys.modules]


def run(folder: str) -> dict[str, object]:
    ours, theirs = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        quiet = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(quiet, number)
        try:
            said = child(folder)
        except BaseException:
            said = traceback.format_exc()[-3000:]
        os.write(theirs, said.encode())
        os._exit(0)
    os.close(theirs)
    began, said = time.monotonic(), b""
    while time.monotonic() - began < PATIENCE_S:
        ready, _, _ = select.select([ours], [], [], PATIENCE_S)
        piece = os.read(ours, 65536) if ready else b""
        if not piece:
            break
        said += piece
    os.close(ours)
    is_late = time.monotonic() - began >= PATIENCE_S
    if is_late:
        os.kill(pid, signal.SIGKILL)
    _, status, used = os.wait4(pid, 0)
    result = said.decode("utf-8", "replace")
    if is_late:
        result = f"not ended after {PATIENCE_S} s"
    elif not result:
        killed = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        result = "ended without a word" if killed is None else f"killed by {signal.Signals(killed).name}"
    memory = used.ru_maxrss // 1024
    return {"folder": folder, "result": result, "memory_mib": memory, "cpu_s": used.ru_utime + used.ru_stime}


def main() -> None:
    good = sys.stdin.readline().rstrip("\n")
    for name in modules_of_an_opening(good):
        importlib.import_module(name)
    empty = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    for folder in (good, *(line.rstrip("\n") for line in sys.stdin)):
        found = run(folder)
        if int(str(found["memory_mib"])) - empty > MAX_MEMORY_MIB:
            found["result"] = f"{found['result']}, with {found['memory_mib']} MiB of memory"
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
