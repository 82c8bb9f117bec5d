"""The operations of the seam in plain PyTorch, on any device PyTorch has: the CPU and CUDA devices.

Owns nothing but the names of its backends. Importing it imports torch, which `import mooli` never does.
"""

from mooli.backends.torch.backend import TorchBackend
from mooli.backends.torch.cuda import CudaBackend

__all__ = ["CudaBackend", "TorchBackend"]
