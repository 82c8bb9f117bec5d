"""Writes mutated model folders, has them opened one by one, and says what was wrong.

Owns the process that opens them and its environment. What is done with a model is `model_opener`'s.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import model_opener
from mutated_models import Mutation, write_model

SECRET = "what only the environment of the process holds"


def faults(mutations: Sequence[Mutation], folder: Path) -> list[str]:
    """folder: an empty one, for theirs."""
    good = folder / "good"
    write_model(good)
    names = {str(good): "a good model"}
    for number, mutation in enumerate(mutations):
        path = folder / str(number)
        shutil.copytree(good, path)
        mutation.apply(path)
        names[str(path)] = mutation.name
    done = subprocess.run(
        [sys.executable, model_opener.__file__],
        input="".join(f"{path}\n" for path in names),
        capture_output=True,
        text=True,
        env={**os.environ, model_opener.SECRET_NAME: SECRET},
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode or [one["folder"] for one in found] != list(names) or found[0]["result"] != "opened":
        return [f"not all were opened: {done.stdout[-500:]}{done.stderr[-3000:]}"]
    return [
        f"{names[one['folder']]}: {one['result']} ({one['memory_mib']} MiB, {one['cpu_s']:.1f} s)"
        for one in found
        if one["result"] not in ("opened", "refused")
    ]
