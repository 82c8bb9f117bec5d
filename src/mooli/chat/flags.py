"""The flags of `mooli chat` and `mooli run` that are not an engine's.

Owns their names and help. Imports nothing, as a command line is read before anything else is loaded.
"""

from __future__ import annotations

import argparse


def add_chat_args(parser: argparse.ArgumentParser) -> None:
    """Add them; those of sampling and of the engine are `mooli.cli`'s."""
    parser.add_argument(
        "words", nargs="*", metavar="MODEL PROMPT", help="The model, and one question to answer instead of talking."
    )
    parser.add_argument("--system", metavar="TEXT", help="System message at the head of the conversation.")
    parser.add_argument(
        "--file", action="append", metavar="FILE", help="Text to put into the first message; several may be given."
    )
    parser.add_argument("--load", metavar="FILE", help="Go on with a conversation that /save wrote.")
    parser.add_argument("--url", metavar="URL", help="Talk with the model of this server instead of loading one.")
    parser.add_argument("--api-key", metavar="KEY", help="The key of that server.")
    parser.add_argument("--plain", action="store_true", help="Show answers as they are, not as Markdown.")
    parser.add_argument("--no-history", action="store_true", help="Do not keep what is typed.")
    parser.add_argument(
        "--json",
        action="store_true",
        help="For scripts: each line of stdin is a message, as text or as JSON; each answer is a line of JSON.",
    )
