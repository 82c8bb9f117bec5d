"""`python3 -m mooli.bench_offline_throughput`: throughput of an engine in this process, under SGLang's name for it.

Owns nothing but the name: `mooli bench offline` is the same, and lives in `mooli.bench.offline`.
"""

from __future__ import annotations

import sys

from mooli.bench.offline import main

if __name__ == "__main__":
    sys.exit(main())
