"""Checked readers of model files. Knows bytes and layouts, never what a tensor is for."""
