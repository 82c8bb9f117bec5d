"""SGLang's frontend language: programs that hold text, generations and choices between them.

Owns what a program may say and how it is carried out: on an `Engine` in this process, or over HTTP on a server. All of
its names are `mooli`'s, loaded when they are used. Never knows pages: a fork is a copy of a text, and the engine's
cache finds what texts share.
"""
