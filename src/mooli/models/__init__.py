"""Model families, their configuration and their checkpoints. Never names a device: weights go through a backend."""
