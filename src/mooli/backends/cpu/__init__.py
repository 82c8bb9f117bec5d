"""The CPU backend: native kernels chosen at run time by what the processor has.

Owns the Python side of the native module: which weight becomes which packed kind, the recording of a model's operations
as a tape, threads and processors. Never computes on arrays itself.
"""

from mooli.backends.cpu.backend import CpuBackend

__all__ = ["CpuBackend"]
