"""The version of the installed package. Owns nothing else."""

from __future__ import annotations

import importlib.metadata

try:
    __version__ = importlib.metadata.version("mooli")
except importlib.metadata.PackageNotFoundError:  # imported from a source tree that is not installed
    __version__ = "0.0.0+source"
