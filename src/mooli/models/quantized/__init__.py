"""Folders of safetensors that other tools quantised, read as if their weights lay there in blocks or as numbers."""
