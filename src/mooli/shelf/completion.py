"""Tab completion: what a shell must be told, and what may stand where the cursor is.

Owns the three shells' few lines and the choice of candidates. It reads parsers as they are, and never runs a command.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

from mooli.errors import MooliError

BASH = r"""# bash: put this line into ~/.bashrc:  eval "$(mooli completion bash)"
_mooli() {
    local line="${COMP_LINE:0:$COMP_POINT}" IFS=$'\n' word before
    word="${line##* }"
    before="${word%"${word##*:}"}"   # bash cuts words at a colon, which names of models have
    COMPREPLY=($(mooli _candidates "${line#* }" 2>/dev/null))
    COMPREPLY=("${COMPREPLY[@]#"$before"}")
}
complete -o bashdefault -o default -F _mooli mooli
"""

ZSH = r"""# zsh: put this line into ~/.zshrc, behind compinit:  eval "$(mooli completion zsh)"
_mooli() {
    local -a found
    found=(${(f)"$(mooli _candidates "${(j: :)words[2,CURRENT]}" 2>/dev/null)"})
    if (( $#found )); then compadd -a found; else _files; fi
}
compdef _mooli mooli
"""

FISH = r"""# fish: put this into a file:  mooli completion fish > ~/.config/fish/completions/mooli.fish
complete -c mooli -a '(mooli _candidates (string join -- " " (commandline -opc)[2..] (commandline -ct)) 2>/dev/null)'
"""

SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}

_OF_MODELS = ("words", "positional_model", "model", "model_path", "tokenizer_path")
"""Arguments that are a model, by their names in parsers."""


def print_script(args: argparse.Namespace) -> int:
    """What a shell must be told."""
    print(SCRIPTS[args.shell], end="")
    return 0


def candidates(parser: argparse.ArgumentParser, typed: Sequence[str]) -> list[str]:
    """What may stand in the place of the last word. Nothing where a file may: shells know those.

    typed: the words behind the command's name, the last as far as it is typed, "" where none is begun.
    """
    word, before = typed[-1], typed[-2] if len(typed) > 1 else ""
    actions = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    flag = next((action for action in actions if before and before in action.option_strings), None)
    if flag is not None and flag.nargs != 0:
        return _starting(word, _values(flag))
    if word.startswith("-"):
        return _starting(word, (name for action in actions for name in action.option_strings))
    return _starting(word, (value for action in actions if not action.option_strings for value in _values(action)))


def _values(action: argparse.Action) -> Iterable[str]:
    if action.choices is not None:
        return map(str, action.choices)
    if action.dest in _OF_MODELS:
        return [*_short(), *_kept()]
    if action.dest == "models":  # to be removed
        return _kept()
    if action.dest == "server":
        from mooli.server.running_servers import running_servers, servers_folder

        return [word for server in running_servers(servers_folder()) for word in (*server.models, str(server.pid))]
    return ()


def _short() -> list[str]:
    from mooli.hub.short_names import short_names

    try:
        return ["demo", *short_names()]
    except MooliError:
        return ["demo"]


def _kept() -> list[str]:
    from mooli.hub.shelf import kept_models

    return [model.name for model in kept_models()]


def _starting(word: str, names: Iterable[str]) -> list[str]:
    return sorted({name for name in names if name.startswith(word)})
