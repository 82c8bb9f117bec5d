"""The flags of `mooli batch`, apart from what it does, so that its help imports nothing of that (`mooli.batch_run`)."""

from __future__ import annotations

import argparse
from typing import Any

from mooli.arguments import group_titled
from mooli.config import DEMO, EngineConfig

DEFAULTS: dict[str, Any] = {"model_path": DEMO, "log_level": "warning", "random_seed": 0}
"""Defaults of engine arguments that this command has other than `Engine`."""

AT_A_SERVER = 32
"""Rows sent at the same time to a server, which does not say how many it computes together."""

OF_SERVERS = ("sampling_defaults", "default_chat_template_kwargs", "watchdog_timeout")
"""Arguments of a server that this command has too."""

WITHOUT_EFFECT = {
    "skip_tokenizer_init": "the rows are texts, and so are their answers",
    "incremental_streaming_output": "a batch has no streams",
    "stream_interval": "a batch has no streams",
}
"""Engine arguments that would change nothing here, and why."""


def add_batch_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.usage = "%(prog)s INPUT -o OUTPUT [FLAG ...]"
    parser.add_argument("input", metavar="INPUT", help="File of rows, as OpenAI's batches have them: JSON lines.")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUTPUT",
        help="File of answers. Beside it: .errors.jsonl for rows that fail, .journal until all are done.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Begin anew, whatever an earlier run has left.")
    parser.add_argument(
        "--max-concurrency",
        type=int,
        metavar="INT",
        help=f"Rows answered at the same time; default: as many as the engine computes together, {AT_A_SERVER} at a"
        " --url.",
    )
    group = parser.add_argument_group("a server instead of an engine")
    group.add_argument("--url", metavar="URL", help="Any server with OpenAI's API; its address, with or without /v1.")
    group.add_argument("--api-key", metavar="KEY", help="Its key; default: that in OPENAI_API_KEY or MOOLI_API_KEY.")
    EngineConfig.add_cli_args(parser, defaults=DEFAULTS, hidden=tuple(WITHOUT_EFFECT))
    group = group_titled(parser, "answers")
    group.add_argument(
        "--sampling-defaults",
        choices=("model", "openai"),
        help="Sampling parameters of a chat that names none: the model's, or OpenAI's. Default: model.",
    )
    group.add_argument(
        "--default-chat-template-kwargs",
        metavar="JSON",
        help="JSON object with arguments of the chat template, for chats that bring none. Default: {}.",
    )
    group_titled(parser, "limits").add_argument(
        "--watchdog-timeout",
        type=float,
        metavar="FLOAT",
        help="Seconds one step of the engine may take before it is given up. Default: 300.0.",
    )
