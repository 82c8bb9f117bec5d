"""The text side: prompts in, text out. Knows tokenizers and requests, never pages, steps or devices."""
