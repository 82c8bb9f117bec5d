"""What runs in the other process: imports, shared libraries, and questions to torch. Run as a file, never imported.

Each argument is a step, "kind:what". One line of JSON goes out before a step and one after it, on a copy of standard
output: what libraries print themselves goes to standard error. A step that fails does not end the program; one that
crashes does, and the lines say which it was.
"""

import sys

if not getattr(sys.flags, "safe_path", False):  # from Python 3.11 on
    del sys.path[0]  # the folder of this file, whose modules have names that others have too

import json
import os
from collections.abc import Callable
from typing import Any


def version_of(name: str) -> Any:
    import importlib.metadata

    return importlib.metadata.version(name)


def import_module(name: str) -> Any:
    import importlib

    module = importlib.import_module(name)
    return {"version": str(getattr(module, "__version__", "")), "file": str(getattr(module, "__file__", ""))}


def open_library(name: str) -> Any:
    import ctypes

    ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    return name


def native_facts(_: str) -> Any:
    from mooli import _native

    return {"isas": list(_native.available_isas()), "file": _native.__file__}


def resources(root: str) -> Any:
    from pathlib import Path

    from mooli.backends.cpu.processors import cpu_quota, default_num_threads, usable_cpus
    from mooli.backends.host_memory import host_memory

    meminfo, cgroup, groups = (Path(root) / name for name in ("proc/meminfo", "proc/self/cgroup", "sys/fs/cgroup"))
    memory, machine = host_memory(meminfo, cgroup, groups), host_memory(meminfo, Path(os.devnull), groups)
    cpus, quota = usable_cpus(), cpu_quota(cgroup, groups)
    return {
        "available": memory.available_bytes,
        "total": memory.total_bytes,
        "machine": machine.total_bytes,
        "cpus": cpus,
        "quota": quota,
        "threads": default_num_threads(cpus, quota),
    }


def torch_facts(_: str) -> Any:
    import torch

    return {"version": str(torch.__version__), "cuda": torch.version.cuda, "cann": getattr(torch.version, "cann", None)}


def cuda_facts(_: str) -> Any:
    import torch as module

    torch: Any = module  # its parts depend on the build
    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except Exception as exc:
            return {"available": False, "why": f"{type(exc).__name__}: {exc}"}
        return {"available": False, "why": "torch.cuda.is_available() is False"}
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    free, total = torch.cuda.mem_get_info(0)
    return {"available": True, "devices": devices, "free": free, "total": total}


def npu_facts(_: str) -> Any:
    import torch as module

    torch: Any = module  # its parts depend on the build
    if not torch.npu.is_available():
        return {"available": False, "why": "torch.npu.is_available() is False"}
    devices = [torch.npu.get_device_name(i) for i in range(torch.npu.device_count())]
    free, total = torch.npu.mem_get_info()
    return {"available": True, "devices": devices, "free": free, "total": total}


def device_numbers(device: str) -> Any:
    """The largest error of a product whose exact values, at most 128, every type holds; inf if any is NaN."""
    import torch

    worst = {}
    for dtype in (torch.bfloat16, torch.float16):
        left = (torch.arange(128 * 128) % 3).reshape(128, 128).float()
        right = (torch.arange(128 * 128) % 2).reshape(128, 128).float()
        got = (left.to(dtype).to(device) @ right.to(dtype).to(device)).to("cpu").float()
        error = float((got - left @ right).abs().max())
        worst[str(dtype).replace("torch.", "")] = error if error == error else float("inf")
    return worst


STEPS: dict[str, Callable[[str], Any]] = {
    "version": version_of,
    "import": import_module,
    "dlopen": open_library,
    "native": native_facts,
    "resources": resources,
    "torch": torch_facts,
    "cuda": cuda_facts,
    "npu": npu_facts,
    "numbers": device_numbers,
}


def chain(exc: BaseException | None) -> str:
    """The error and those behind it, as text."""
    texts: list[str] = []
    while exc is not None and len(texts) < 5:
        texts.append(f"{type(exc).__name__}: {exc}")
        exc = exc.__cause__ or exc.__context__
    return "; caused by ".join(texts)


def main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)
    for step in sys.argv[1:]:
        kind, _, what = step.partition(":")
        print(json.dumps({"begin": step}), file=out, flush=True)
        try:
            line = {"end": step, "value": STEPS[kind](what)}
        except BaseException as exc:  # a module may even raise SystemExit
            line = {"end": step, "error": chain(exc)[:4000]}
        print(json.dumps(line), file=out, flush=True)
    out.flush()
    os._exit(0)  # libraries that crash when unloaded have given their answers


if __name__ == "__main__":
    main()
