"""`python -m mooli` is the same as the `mooli` command."""

from __future__ import annotations

import sys

from mooli.cli import main

if __name__ == "__main__":
    sys.exit(main())
