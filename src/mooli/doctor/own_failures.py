"""What Mooli's own commands and servers print when something goes wrong: cause and cure of each, for logs.

Owns the table of those messages. What devices and their software print is in `failures`.
"""

from __future__ import annotations

import re

from mooli.doctor.failures import Failure
from mooli.doctor.findings import BACKENDS, PROBLEM, WARNING


def _failure(code: str, pattern: str, cause: str, *cure: str, severity: str = PROBLEM) -> Failure:
    return Failure(code, re.compile(pattern), cause, cure, BACKENDS, severity)


OWN_FAILURES: tuple[Failure, ...] = (
    _failure(
        "engine-hung",
        r"has given no sign for [\d.]+ s|gave no sign for [\d.]+ s",
        "one step took longer than --watchdog-timeout: a device or its driver hangs, or the machine is overloaded",
        "mooli doctor --backend <the server's>   # does the device answer?",
        "if steps are only slow: a larger --watchdog-timeout, or a smaller --chunked-prefill-size",
    ),
    _failure(
        "engine-killed",
        r"was killed by signal 9 \(SIGKILL\)",
        "somebody has ended the engine's process: most often the system, which had no memory left",
        "dmesg | grep -i 'out of memory'   # in a container: raise its limit of memory",
        "start with a smaller --max-total-tokens or --mem-fraction-static, or with --quantization int8",
    ),
    _failure(
        "engine-died",
        r"the engine (?:loop )?has died|engine process (?:has ended with exit status|was killed by signal (?!9\b))",
        "the engine ended by an error of its own; the lines before say which",
        "mooli doctor --backend <the server's>   # is everything there that it needs?",
        "please report it with the log",
    ),
    _failure(
        "out-of-memory",
        r"a KV cache of \d+ tokens needs|no memory for a (?:weight|table|KV pool)|no memory on \S+ for"
        r"|a KV pool of \d+ pages needs",
        "weights and KV cache are more than the memory that is free",
        "mooli plan --model <model> --memory <free memory>   # what fits",
        "start with a smaller --max-total-tokens, with --quantization int8, or end other programs",
    ),
    _failure(
        "address-not-free",
        r"cannot listen on \S+:\d+",
        "another program listens there already, or the address is not one of this machine",
        "ss -ltnp   # who listens",
        "start with another --port (0 takes a free one), or another --host",
    ),
    _failure(
        "no-api-key",
        r"there is no api_key: anybody there may use",
        "the server can be reached from other machines, and needs no key",
        "export MOOLI_API_KEY=<a long random text>   # or listen on 127.0.0.1",
        severity=WARNING,
    ),
    _failure(
        "model-not-found",
        r"is not on this machine|there is no folder or file \S+, and it is not a name|it is not a model folder"
        r"|the demo model is not installed|there is no model at|(?:there is|but) no \.safetensors file",
        "no model at that path or of that name, or only a part of one",
        "mooli pull <name>   # fetches a name such as Qwen/Qwen2.5-0.5B-Instruct",
        "mooli doctor --model-path <path>   # what a folder lacks",
    ),
    _failure(
        "model-not-fetched",
        r"could not be fetched|cannot be fetched|forbids the network",
        "the hub does not answer, does not have the model, or may not be asked",
        "mooli pull <name> --source modelscope   # or huggingface",
        "unset MOOLI_OFFLINE HF_HUB_OFFLINE   # if they are set; behind a proxy: export HTTPS_PROXY=…",
    ),
    _failure(
        "model-unsupported",
        r"(?:model family|activation|rope scaling|mixture of experts|sliding window)\b.{0,120}\bis not implemented"
        r"|quantised with .{1,80}, which is not implemented|, which is not read; read are"
        r"|is a pickle file, which can run code",
        "this family, type of weights or feature of a model is not implemented",
        "take another version of the model, such as a GGUF file: docs/compatibility.md says what is read",
    ),
    _failure(
        "backend-does-not-load",
        r"backend '\w+' does not load",
        "what the backend computes with is not installed, or is for another Python or processor",
        "mooli doctor --backend <that backend>",
    ),
    _failure(
        "unknown-flag",
        r"there is no flag -|there is no argument '|is known to SGLang but not supported by Mooli yet"
        r"|is a flag of `mooli serve`",
        "the command line has a flag that Mooli does not know or cannot honour",
        "mooli serve --help   # remove the flag, or write it as it is there",
    ),
    _failure(
        "too-many-open-files",
        r"Too many open files",
        "more connections than this process may have open files",
        "ulimit -n 65536   # before the start; under systemd: LimitNOFILE=65536",
        "start with a smaller --max-concurrent-requests",
    ),
)
"""The order is that of the answer: causes come before what follows from them."""
