"""`python3 -m mooli.bench_one_batch`: prefill and decode by batch size, under SGLang's name for it.

Owns nothing but the name: `mooli bench one-batch` is the same, and lives in `mooli.bench.one_batch`.
"""

from __future__ import annotations

import sys

from mooli.bench.one_batch import main

if __name__ == "__main__":
    sys.exit(main())
