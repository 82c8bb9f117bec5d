"""Pages of the KV cache on disk: segments that are only appended to, what is in them, and who may write.

Owns files. Never knows a device, a request or the scheduler, and never makes a digest: who stores pages does.
"""
