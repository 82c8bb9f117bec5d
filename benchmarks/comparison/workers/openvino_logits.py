"""Logits of all positions of one prompt, from the model that OpenVINO GenAI makes of a GGUF file.

GenAI has no call for them: it is asked to write the model it made, and OpenVINO runs that as it stands. (GenAI itself
runs it with its own paged attention and an 8-bit KV cache.)

    python openvino_logits.py MODEL.gguf FOLDER IDS.json OUT.npy
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import openvino
import openvino_genai


def written_model(path: Path, folder: Path) -> Path:
    """The model of `path` as OpenVINO's files, which GenAI writes beside the file it reads."""
    copy = folder / "openvino" / path.name
    shutil.rmtree(copy.parent, ignore_errors=True)
    copy.parent.mkdir(parents=True)
    copy.symlink_to(path.resolve())
    openvino_genai.LLMPipeline(str(copy), "CPU", enable_save_ov_model=True)
    return next(file for file in copy.parent.glob("*.xml") if "token" not in file.name)


def main() -> None:
    path, folder, ids_file, out = sys.argv[1:]
    model = openvino.Core().compile_model(str(written_model(Path(path), Path(folder))), "CPU")
    ids = np.array([json.loads(Path(ids_file).read_text())], np.int64)
    known = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "position_ids": np.arange(ids.shape[1], dtype=np.int64)[None],
        "beam_idx": np.zeros(1, np.int32),
    }
    names = {name for port in model.inputs for name in port.get_names()}
    request = model.create_infer_request()
    request.infer({name: value for name, value in known.items() if name in names})
    np.save(out, request.get_tensor("logits").data[0].astype(np.float32))


if __name__ == "__main__":
    main()
