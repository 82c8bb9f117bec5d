"""Logits of all positions of one prompt, from Mooli's packed weights or from its float32 reference.

python mooli_logits.py MODEL.gguf reference|file|int8|int4 IDS.json OUT.npy
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from accuracy import all_logits
from loaded import PAGE_SIZE, Loaded


def main() -> None:
    path, form, ids_file, out = sys.argv[1:]
    ids = np.array(json.loads(Path(ids_file).read_text()))
    backend = "reference" if form == "reference" else "cpu"
    quantization = form if form in ("int8", "int4") else None
    pages = -(-len(ids) // PAGE_SIZE)
    loaded = Loaded(Path(path), backend, quantization=quantization, num_pages=pages, max_tokens=len(ids))
    np.save(out, all_logits(loaded, ids))


if __name__ == "__main__":
    main()
