"""A model's files: all there, whole, of a kind that is read, and not larger than memory and disk.

Owns the checks of a folder or GGUF file. Reads headers and small files, never weights, and never the network.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mooli.doctor.findings import BACKENDS, PROBLEM, WARNING, Finding, Section
from mooli.errors import ChatTemplateError, CheckpointError, ModelError, TokenizerError, UnsupportedModelError
from mooli.formats.files import read_json
from mooli.formats.safetensors import INDEX_NAME, SINGLE_NAME, SafetensorsFile
from mooli.frontend.tokenizer import load_tokenizer
from mooli.hub import resolve
from mooli.models.config import DTYPES, ModelConfig
from mooli.models.loader import open_model
from mooli.models.modelslim import find_description
from mooli.models.quantized.folder import KEYS as QUANTIZATION_KEYS
from mooli.models.quantized.folder import take_format
from mooli.models.registry import read_hf_config
from mooli.plan import auto_dtype, read_model, weight_bytes
from mooli.plan_flags import DEVICE_NAMES

GIB = 2**30
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PARTIAL = (".incomplete", ".part", ".aria2", ".tmp", ".crdownload", ".download", "____temp")
READ_TYPES = ("F32", "F16", "BF16")
MODELSLIM_TYPES = ("I8", "I32", "I64")
"""Types read besides where msmodelslim's description says what they mean."""

QUANTISED_TYPES = ("I8", "U8", "I32", "I64", "F8_E4M3")
"""Types read besides where config.json says what they mean, in a format that is read."""


_POINTER = b"version https://git-lfs"


def probe_model(name: str, backend: str, free_bytes: int | None) -> Section:
    """free_bytes: of the memory that the backend computes in, None where it is not known."""
    section = Section("model")
    section.facts["given"] = name
    try:
        path = resolve(name)
    except ModelError as exc:
        folder = _as_folder(name)
        if folder is None:
            section.findings.append(_not_found(str(exc)))
            return section
        path = folder
    section.facts["path"] = str(path)
    if path.is_dir():
        _probe_folder(path, section)
    section.findings += _tokenizer(path, section)
    if not section.findings or all(finding.severity == WARNING for finding in section.findings):
        section.findings += _opens(path)
    config, section_types = None, None
    try:
        config, section_types = read_model(str(path))
    except ModelError as exc:
        if not any(finding.code.startswith(("model-", "config-", "weights-")) for finding in section.findings):
            section.findings.append(_refused(exc))
    if config is not None:
        _describe(config, section)
        device = DEVICE_NAMES.get(backend, "cpu")
        need = weight_bytes(config, auto_dtype(config, device), device=device, stored_types=section_types)
        section.facts["weights"] = f"{need / GIB:.2f} GiB"
        section.findings += memory_findings(config, need, free_bytes, backend, str(path))
        section.findings += dtype_findings(config, backend)
    return section


def _probe_folder(folder: Path, section: Section) -> None:
    names = _listing(folder)
    if isinstance(names, Finding):
        section.findings.append(names)
        return
    shards = [name for name in names if name.endswith(".safetensors")]
    section.facts["files"] = f"{len(names)}, {len(shards)} of weights"
    checks: tuple[Callable[[], Iterable[Finding]], ...] = (
        lambda: partial_findings(folder, names),
        lambda: config_findings(folder, section),
        lambda: index_findings(folder, shards),
        lambda: weight_findings(folder, names, shards),
    )
    for check in checks:
        section.findings += check()


def _listing(folder: Path) -> list[str] | Finding:
    try:
        return sorted(path.name for path in folder.iterdir())
    except OSError as exc:
        return _finding(
            "model-unreadable",
            f"cannot list {folder}: {exc}",
            "this user may not read it",
            f"sudo chown -R $USER {folder}",
        )


def config_findings(folder: Path, section: Section) -> list[Finding]:
    """What is wrong with config.json, first of all."""
    if not (folder / "config.json").is_file():
        if any(folder.glob("*.gguf")):
            return []
        cause = "without it nobody knows what the weights are"
        return [_finding("config-missing", f"no config.json in {folder}", cause, _download(folder, "config.json"))]
    try:
        raw = read_json(folder / "config.json")
        section.facts["architecture"] = ", ".join(map(str, raw.get("architectures") or [raw.get("model_type")]))
        if find_description(folder) is not None:
            for key in QUANTIZATION_KEYS:  # as the loader does
                raw.pop(key, None)
        take_format(raw)
        read_hf_config(raw)
    except UnsupportedModelError as exc:
        return [_refused(exc)]
    except ModelError as exc:
        cause = "the file is damaged or was changed"
        return [_finding("config-broken", str(exc), cause, _download(folder, "config.json"))]
    return []


def partial_findings(folder: Path, names: list[str]) -> list[Finding]:
    """Files that a download has left behind, and pointers that stand for files."""
    findings = []
    partial = [name for name in names if name.lower().endswith(PARTIAL)]
    if partial:
        findings.append(
            _finding(
                "download-incomplete",
                f"{', '.join(partial[:3])}{' …' if len(partial) > 3 else ''} in {folder}",
                "a download was cut off",
                _download(folder),
                severity=WARNING,
            )
        )
    pointers = [name for name in names if _is_pointer(folder / name)]
    if pointers:
        findings.append(
            _finding(
                "git-lfs-pointer",
                f"{', '.join(pointers[:3])} {'holds' if len(pointers) == 1 else 'hold'} only a pointer of Git LFS",
                "the repository was cloned without git-lfs: the contents were not fetched",
                f"cd {folder} && git lfs install && git lfs pull",
                _download(folder),
            )
        )
    return findings


def index_findings(folder: Path, shards: list[str]) -> list[Finding]:
    """Shards that the index names and the folder lacks, and whether the disk has room for them."""
    if not (folder / INDEX_NAME).is_file() or SINGLE_NAME in shards:
        return []
    try:
        index = read_json(folder / INDEX_NAME)
    except ModelError as exc:
        return [_finding("index-broken", str(exc), "the file is damaged", _download(folder, INDEX_NAME))]
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        cause = "the file is damaged: it says for no tensor where it is"
        return [_finding("index-broken", f"{INDEX_NAME} has no weight_map", cause, _download(folder, INDEX_NAME))]
    wanted = sorted({str(shard) for shard in weight_map.values()})
    missing = [shard for shard in wanted if shard not in shards]
    if not missing:
        return []
    shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    cause = "the download is not complete"
    findings = [
        _finding(
            "shards-missing", f"{len(missing)} of {len(wanted)} shards: {shown}", cause, _download(folder, *missing)
        )
    ]
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if isinstance(total, int):
        findings += disk_findings(folder, total - sum(_size(folder / shard) for shard in wanted))
    return findings


def disk_findings(folder: Path, needed_bytes: int) -> list[Finding]:
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return []
    if needed_bytes <= free:
        return []
    return [
        _finding(
            "disk-full",
            f"{needed_bytes / GIB:.1f} GiB are still to come, {free / GIB:.1f} GiB are free under {folder}",
            "the disk cannot hold the model",
            f"df -h {folder}   # make room, or download to another disk",
        )
    ]


def weight_findings(folder: Path, names: list[str], shards: list[str]) -> list[Finding]:
    """Every safetensors file: whole, and of types that are read. Without one: what there is instead."""
    if not shards:
        pickles = [name for name in names if name.lower().endswith(PICKLES)]
        if pickles:
            return [
                _finding(
                    "pickle-weights",
                    f"the weights are in {pickles[0]}{f' and {len(pickles) - 1} more' if len(pickles) > 1 else ''}",
                    "pickle files can run code when they are read, so they are not",
                    'python -c "from transformers import AutoModelForCausalLM as M;'
                    f" M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\"",
                    "or download the model in a version that has .safetensors",
                )
            ]
        if not any(name.endswith(".gguf") for name in names):
            return [
                _finding(
                    "weights-missing",
                    f"no .safetensors or .gguf file in {folder}",
                    "only small files were downloaded",
                    _download(folder),
                )
            ]
    findings, types = [], set()
    for name in shards:
        if _is_pointer(folder / name):
            continue
        try:
            with SafetensorsFile(folder / name) as file:
                types |= {info.dtype for info in file.tensors.values()}
        except (ModelError, OSError) as exc:
            cause = "the file is cut off or damaged"
            findings.append(
                _finding(
                    "weights-damaged", str(exc), cause, f"rm {folder / name}", _download(folder, name), subject=name
                )
            )
    if any(name.startswith("quant_model_description") for name in names):
        types -= set(MODELSLIM_TYPES)
    elif _is_quantised(folder):
        types -= set(QUANTISED_TYPES)
    other = sorted(types - set(READ_TYPES))
    if other:
        findings.append(
            _finding(
                "weights-of-other-type",
                f"tensors of type {', '.join(other)[:200]}",
                f"read are {', '.join(READ_TYPES)}: this model was quantised by another tool",
                "take the model that is not quantised, and --quantization int8 or int4, or a GGUF file of it",
            )
        )
    return findings


def _is_quantised(folder: Path) -> bool:
    """In a format that is read. What is wrong with config.json is found elsewhere."""
    try:
        return take_format(read_json(folder / "config.json")) is not None
    except ModelError:
        return False


def dtype_findings(config: ModelConfig, backend: str) -> list[Finding]:
    if backend != "ascend" or config.dtype != "float16":
        return []
    return [
        Finding(
            code="float16-overflows",
            found=f"the checkpoint is float16 ({config.architecture})",
            cause="values above 65504 overflow and give garbled text, rows of '!' for example",
            cure=("start with --dtype bfloat16",),
            severity=WARNING,
        )
    ]


def memory_findings(
    config: ModelConfig, need_bytes: int, free_bytes: int | None, backend: str, path: str
) -> list[Finding]:
    """Weights against what is free; the engine's own arithmetic, which adds the KV cache, is `mooli plan`."""
    if free_bytes is None or need_bytes + GIB <= free_bytes:
        return []
    device = DEVICE_NAMES.get(backend, "cpu")
    smaller = {
        kind: weight_bytes(config, auto_dtype(config, device), device=device, quantization=kind)
        for kind in (("int8", "int4") if device == "cpu" else ("int8",))
    }
    fitting = [kind for kind, size in smaller.items() if size + GIB <= free_bytes]
    cure = [f"start with --quantization {kind}: {smaller[kind] / GIB:.1f} GiB" for kind in fitting[:1]]
    cure.append(f"mooli plan {path} --memory {max(free_bytes // 2**20, 1)}Mi --device {device}   # what fits")
    if backend == "ascend":
        cure.append("npu-smi info   # does another program hold memory? Else: --mem-fraction-static 0.8")
        cure.append("export PYTORCH_NPU_ALLOC_CONF=expandable_segments:True")
    else:
        cure.append("free some memory, or take a smaller model")
    return [
        Finding(
            code="out-of-memory",
            found=f"the weights take {need_bytes / GIB:.2f} GiB, {free_bytes / GIB:.2f} GiB are free",
            cause="weights, KV cache and work space must fit in the memory of the device",
            cure=tuple(cure),
            backends=(backend,),
        )
    ]


def _tokenizer(path: Path, section: Section) -> list[Finding]:
    try:
        tokenizer = load_tokenizer(path)
    except TokenizerError as exc:
        cause = "without it text cannot become ids"
        return [_finding("tokenizer-broken", str(exc), cause, _download(path, "tokenizer.json tokenizer_config.json"))]
    except (ModelError, OSError) as exc:
        cause = "the file is cut off or damaged"
        return [_finding("weights-damaged", str(exc), cause, "download it again")]
    section.facts["chat template"] = "there is one" if tokenizer.chat_template else None
    if tokenizer.chat_template:
        try:
            tokenizer.chat_template.compile()
        except ChatTemplateError as exc:
            cause = "no chat can be put into the model's form, and a server does not start"
            cure = "take newer files of the model, or give one: --chat-template file.jinja"
            return [_finding("chat-template-broken", str(exc), cause, cure)]
        return []
    return [
        _finding(
            "no-chat-template",
            "the tokenizer has no chat template",
            "this is a base model, or an older folder: chat and /v1/chat/completions need a template",
            "take the model's Instruct version, or give one: --chat-template file.jinja",
            severity=WARNING,
        )
    ]


def _opens(path: Path) -> list[Finding]:
    """As the engine opens it: names and shapes of all tensors."""
    try:
        open_model(path)[1].close()
    except (UnsupportedModelError, CheckpointError) as exc:
        return [_refused(exc)]
    except ModelError as exc:
        return [_not_found(str(exc))]
    return []


def _describe(config: ModelConfig, section: Section) -> None:
    facts: dict[str, Any] = {
        "architecture": config.architecture,
        "dtype": config.dtype if config.dtype in DTYPES else None,
        "layers": config.num_layers,
        "context": config.max_position_embeddings,
    }
    section.facts.update(facts)


def _refused(exc: ModelError) -> Finding:
    if isinstance(exc, UnsupportedModelError):
        cause = "Mooli has no implementation of it"
        return _finding(
            "model-unsupported",
            str(exc),
            cause,
            "docs/models.md has the families, docs/compatibility.md the files that are read",
        )
    return _finding("model-broken", str(exc), "files are damaged or do not belong together", "download the model again")


def _not_found(found: str) -> Finding:
    cause = "there is no such model on this machine"
    return _finding("model-not-found", found, cause, "hf download <name>, or modelscope download --model <name>")


def _finding(code: str, found: str, cause: str, *cure: str, severity: str = PROBLEM, subject: str = "") -> Finding:
    return Finding(
        code=code, found=found[:1000], cause=cause, cure=cure, backends=BACKENDS, severity=severity, subject=subject
    )


def _download(folder: Path, *names: str) -> str:
    files = " ".join(names[:4]) + (" …" if len(names) > 4 else "")
    # A leading space of its own where files are named.
    wanted = f" {files}" if files else ""
    return f"hf download <name of the model>{wanted} --local-dir {folder}"


def _as_folder(name: str) -> Path | None:
    """A folder that holds no model, which can be looked at all the same."""
    try:
        path = Path(name).expanduser()
        return path if name and path.is_dir() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _is_pointer(path: Path) -> bool:
    try:
        if not path.is_file() or path.stat().st_size > 1024:
            return False
        with path.open("rb") as file:
            return file.read(len(_POINTER)) == _POINTER
    except OSError:
        return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
