"""KV cache pages: who owns them, and which token sequences they hold. Host bookkeeping only, never device memory."""
