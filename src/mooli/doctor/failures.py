"""Failures that people have met, by what is printed: cause and cure of each.

Owns the tables of patterns: of Ascend's software, and of Mooli's own commands and servers, for logs. A text may come
from an import, from a computation on the device, or from a log.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mooli.doctor.findings import BACKENDS, PROBLEM, WARNING, Finding

SET_ENV = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
SET_ENV_NNAL = "source /usr/local/Ascend/nnal/atb/set_env.sh"

MAX_TEXT = 1 << 24


@dataclass(frozen=True, slots=True)
class Failure:
    code: str
    pattern: re.Pattern[str]
    cause: str
    cure: tuple[str, ...]
    backends: tuple[str, ...] = ("ascend",)
    severity: str = PROBLEM


def _failure(code: str, pattern: str, cause: str, *cure: str, backends: tuple[str, ...] = ("ascend",)) -> Failure:
    return Failure(code, re.compile(pattern, re.IGNORECASE), cause, cure, backends)


_ATB_CURE = (
    "ls /usr/local/Ascend/nnal   # if it is not there:",
    "bash Ascend-cann-nnal_<version of CANN>_linux-$(uname -m).run --install",
    SET_ENV_NNAL,
)
_DRIVER_CURE = (
    "ls /usr/local/Ascend/driver/lib64   # in a container: start it with",
    "-v /usr/local/Ascend/driver/lib64:/usr/local/Ascend/driver/lib64"
    " -v /usr/local/Ascend/driver/version.info:/usr/local/Ascend/driver/version.info",
    "D=/usr/local/Ascend/driver/lib64; export LD_LIBRARY_PATH=$D/driver:$D/common:$D:$LD_LIBRARY_PATH",
)

FAILURES: tuple[Failure, ...] = (
    _failure(
        "cann-library-not-found",
        r"lib(?:hccl|ascendcl|acl_op_compiler|ge_runner|graph)\.so\S*: cannot open shared object",
        "CANN is not installed, or its set_env.sh was not sourced in this shell",
        SET_ENV,
        "if that file is not there, install CANN: bash Ascend-cann-toolkit_8.2.RC1_linux-$(uname -m).run --full",
    ),
    _failure(
        "atb-library-not-found",
        r"libatb\.so\S*: cannot open shared object|nnal package",
        "NNAL, the package with the attention kernels, is not installed or its set_env.sh was not sourced",
        *_ATB_CURE,
    ),
    _failure(
        "driver-library-not-found",
        r"libascend_hal\.so\S*: cannot open shared object",
        "the driver's libraries are not visible: no driver, or a container without them",
        *_DRIVER_CURE,
    ),
    _failure(
        "versions-do-not-match",
        r"undefined symbol\S*|version `\S+' not found",
        "CANN, NNAL and torch_npu are not of the same release",
        "mooli doctor --backend ascend   # shows the versions; the pairs that go together are in its table of versions",
        "install torch, torch_npu, toolkit, kernels and NNAL of one row of that table",
    ),
    _failure(
        "cann-parts-missing",
        r"error code is 500001|\bEH9999\b|SetPrecisionMode",
        "kernels package missing or not of the toolkit's version, or Python packages that CANN needs are missing",
        "bash Ascend-cann-kernels-910b_<version of the toolkit>_linux-$(uname -m).run --install",
        "pip install 'mooli[ascend]'   # attrs, decorator, sympy, … that CANN's own Python parts import",
        SET_ENV,
    ),
    _failure(
        "kernels-do-not-fit-the-chip",
        r"error code is 561103|aclnnInplaceZero failed",
        "the kernels package is not for this chip, or too new for this driver",
        "npu-smi info   # the chip, then the kernels of that chip and of the toolkit's version:",
        "bash Ascend-cann-kernels-<chip>_<version of the toolkit>_linux-$(uname -m).run --install",
    ),
    _failure(
        "device-not-usable-here",
        r"\b507008\b|aclInit.{0,60}fail",
        "the driver does not give this process the device: a container without rights, or another driver's version",
        "npu-smi info   # must work in the same shell",
        "start the container with all /dev/davinci* devices and the driver's folders of the host",
    ),
    _failure(
        "device-held-by-another",
        r"dcmi module initialize failed|ret is -8005|-8020\b|device is used",
        "another container holds the device, or the mounts of the driver are missing",
        "docker ps   # on the host: end the other container, or give this one another card",
        "docker run … -v /usr/local/dcmi:/usr/local/dcmi -v /usr/local/bin/npu-smi:/usr/local/bin/npu-smi …",
        "if nothing else helps: docker run --privileged …",
    ),
    _failure(
        "garbled-text",
        r"!{16,}|(?:nan|inf(?:inity)?)\b.{0,20}\b(?:in|found in) (?:the )?logits",
        "numbers overflow: float16 ends at 65504; or versions that do not go together",
        "start with --dtype bfloat16",
        "keep the page size at 128, and check that CANN and torch_npu are a pair: mooli doctor --backend ascend",
    ),
    _failure(
        "address-out-of-range",
        r"\b507015\b|MTE DDR address out of range",
        "a kernel has read outside its memory: a wrong page number, or memory that a captured graph still uses",
        "export ASCEND_LAUNCH_BLOCKING=1   # then run it again: the failing operation is named",
        "if it only happens with graphs: export MOOLI_GRAPHS=0; please report it with the log",
    ),
    _failure(
        "npu-out-of-memory",
        r"NPU out of memory",
        "weights, KV cache and work space are more than the card has free",
        "npu-smi info   # does another program hold memory?",
        "start with --mem-fraction-static 0.8, or lower, and a shorter --context-length",
        "export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True",
        "mooli plan <model> --memory 61GiB   # what fits",
    ),
    _failure(
        "cuda-out-of-memory",
        r"CUDA out of memory",
        "weights, KV cache and work space are more than the card has free",
        "nvidia-smi   # does another program hold memory?",
        "start with a lower --mem-fraction-static",
        "mooli plan <model> --memory <free memory>",
        backends=("cuda",),
    ),
    _failure(
        "cached-prefix-changes-text",
        r"(?:prefix|cache)[^\n]{0,60}(?:different|other) (?:text|tokens|answer)|cold and warm [^\n]{0,40}differ",
        "an attention kernel has not read the cached pages: wrong lengths, or a prefix not aligned as CANN wants it",
        "keep the page size at 128",
        "start with --disable-radix-cache to compare; if the answers differ, please report it with the versions",
    ),
    _failure(
        "npu-not-visible",
        r"NPU device is not available or visible|torch\.npu\.is_available\(\) is False",
        "ASCEND_RT_VISIBLE_DEVICES names no device that is here, or the driver does not answer",
        "unset ASCEND_RT_VISIBLE_DEVICES",
        "npu-smi info",
    ),
    _failure(
        "two-accelerators",
        r"Two accelerators cannot be used at the same time",
        "this build of torch is for CUDA, and torch_npu wants one for the CPU",
        "pip uninstall -y torch triton",
        "pip install torch==<version of torch_npu> --index-url https://download.pytorch.org/whl/cpu",
    ),
    _failure(
        "graph-streams-exhausted",
        r"\b207008\b|Stream resources are insufficient",
        "the card has too few streams for so many captured graphs",
        "export MOOLI_GRAPHS=0   # no graphs are captured",
    ),
    _failure(
        "page-size-not-aligned",
        r"block_?size should (?:be )?align",
        "the attention kernels take pages of 128 tokens",
        "start with --page-size 128, or without that flag",
    ),
    _failure(
        "rank-is-missing",
        r"\bEI0006\b|Getting socket times out|Transport init error|fftsplus task timeout",
        "one of the processes that share the model has died, came late, or cannot be reached over the network",
        "look for the first error in the logs of all ranks; then: export HCCL_CONNECT_TIMEOUT=600 on all of them",
        "hccn_tool -i 0 -tls -g   # must be the same on all cards",
    ),
    _failure(
        "cann-folder-wrong",
        r"ASCEND_(?:HOME|OPP)_PATH\b.{0,80}(?:does not exist|not set|is not|not exist)",
        "the environment names a folder of CANN that is not there",
        "unset ASCEND_HOME_PATH ASCEND_OPP_PATH ASCEND_TOOLKIT_HOME",
        SET_ENV,
    ),
    _failure(
        "backend-extension-does-not-load",
        r"Failed to load the backend extension",
        "torch loads torch_npu when it is imported, and that fails: CANN or the driver is not visible",
        SET_ENV,
        "to use torch without the NPU: export TORCH_DEVICE_BACKEND_AUTOLOAD=0",
        backends=("torch", "cuda", "ascend"),
    ),
)
"""The order is that of the answer: causes come before what follows from them."""


def explain(text: str, failures: Sequence[Failure] = FAILURES) -> list[Finding]:
    """A finding for every one of `failures` that `text` shows, each once, with the line that shows it."""
    findings = []
    for failure in failures:
        match = failure.pattern.search(text, 0, MAX_TEXT)
        if match:
            findings.append(
                Finding(
                    code=failure.code,
                    found=_line_around(text, match.start(), match.end()),
                    cause=failure.cause,
                    cure=failure.cure,
                    backends=failure.backends,
                    severity=failure.severity,
                )
            )
    return findings


def _line_around(text: str, start: int, end: int) -> str:
    """The line of a match, shortened around it."""
    first = max(text.rfind("\n", 0, start) + 1, start - 160)
    last = text.find("\n", end)
    line = text[first : min(len(text) if last < 0 else last, end + 160)].strip()
    return f"…{line}" if first and text[first - 1] != "\n" else line


# -- Mooli's own -------------------------------------------------------------------------------------------------------


def _own(code: str, pattern: str, cause: str, *cure: str, severity: str = PROBLEM) -> Failure:
    return Failure(code, re.compile(pattern), cause, cure, BACKENDS, severity)


OWN_FAILURES: tuple[Failure, ...] = (
    _own(
        "engine-hung",
        r"has given no sign for [\d.]+ s|gave no sign for [\d.]+ s",
        "one step took longer than --watchdog-timeout: a device or its driver hangs, or the machine is overloaded",
        "mooli doctor --backend <the server's>   # does the device answer?",
        "if steps are only slow: a larger --watchdog-timeout, or a smaller --chunked-prefill-size",
    ),
    _own(
        "engine-killed",
        r"was killed by signal 9 \(SIGKILL\)",
        "somebody has ended the engine's process: most often the system, which had no memory left",
        "dmesg | grep -i 'out of memory'   # in a container: raise its limit of memory",
        "start with a smaller --max-total-tokens or --mem-fraction-static, or with --quantization int8",
    ),
    _own(
        "engine-died",
        r"the engine (?:loop )?has died|engine process (?:has ended with exit status|was killed by signal (?!9\b))",
        "the engine ended by an error of its own; the lines before say which",
        "mooli doctor --backend <the server's>   # is everything there that it needs?",
        "please report it with the log",
    ),
    _own(
        "out-of-memory",
        r"a KV cache of \d+ tokens needs|no memory for a (?:weight|table|KV pool)|no memory on \S+ for"
        r"|a KV pool of \d+ pages needs",
        "weights and KV cache are more than the memory that is free",
        "mooli plan <model> --memory <free memory>   # what fits",
        "start with a smaller --max-total-tokens, with --quantization int8, or end other programs",
    ),
    _own(
        "address-not-free",
        r"cannot listen on \S+:\d+",
        "another program listens there already, or the address is not one of this machine",
        "ss -ltnp   # who listens",
        "start with another --port (0 takes a free one), or another --host",
    ),
    _own(
        "no-api-key",
        r"there is no api_key: anybody there may use",
        "the server can be reached from other machines, and needs no key",
        "export MOOLI_API_KEY=<a long random text>   # or listen on 127.0.0.1",
        severity=WARNING,
    ),
    _own(
        "model-not-found",
        r"is not on this machine|there is no folder or file \S+, and it is (?:not|neither) a name"
        r"|it is not a model folder|the demo model is not installed|there is no model at"
        r"|(?:there is|but) no \.safetensors file",
        "no model at that path or of that name, or only a part of one",
        "mooli pull <name>   # fetches a name such as Qwen/Qwen2.5-0.5B-Instruct",
        "mooli doctor <path>   # what a folder lacks",
    ),
    _own(
        "model-not-fetched",
        r"could not be fetched|cannot be fetched|forbids the network",
        "the hub does not answer, does not have the model, or may not be asked",
        "mooli pull <name> --source modelscope   # or huggingface",
        "unset MOOLI_OFFLINE HF_HUB_OFFLINE   # if they are set; behind a proxy: export HTTPS_PROXY=…",
    ),
    _own(
        "model-unsupported",
        r"(?:model family|activation|rope scaling|mixture of experts|sliding window)\b.{0,120}\bis not implemented"
        r"|quantised with .{1,80}, which is not implemented|, which is not read; read are"
        r"|is a pickle file, which can run code",
        "this family, type of weights or feature of a model is not implemented",
        "take another version of the model, such as a GGUF file: docs/compatibility.md says what is read",
    ),
    _own(
        "backend-does-not-load",
        r"backend '\w+' does not load",
        "what the backend computes with is not installed, or is for another Python or processor",
        "mooli doctor --backend <that backend>",
    ),
    _own(
        "unknown-flag",
        r"there is no flag -|there is no argument '|is known to SGLang but not supported by Mooli yet"
        r"|is a flag of `mooli serve`",
        "the command line has a flag that Mooli does not know or cannot honour",
        "mooli serve --help   # remove the flag, or write it as it is there",
    ),
    _own(
        "too-many-open-files",
        r"Too many open files",
        "more connections than this process may have open files",
        "ulimit -n 65536   # before the start; under systemd: LimitNOFILE=65536",
        "start with a smaller --max-concurrent-requests",
    ),
)
