"""Measuring: a running server from outside, and an engine of this process.

Owns what is sent, when, what came back, and what that amounts to. `serving`, `multiturn` and `replay` work with any
server that speaks one of the APIs in `backends`, and never look into an engine; `offline` and `one_batch` run one.
"""
