"""Logits of all positions of one prompt, from transformers in bfloat16.

python transformers_logits.py FOLDER IDS.json OUT.npy
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def main() -> None:
    folder, ids_file, out = sys.argv[1:]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = torch.tensor([json.loads(Path(ids_file).read_text())])
    with torch.inference_mode():
        np.save(out, model(ids).logits[0].float().numpy())


if __name__ == "__main__":
    main()
