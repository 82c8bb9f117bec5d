"""Batches: files of requests in OpenAI's format, and files of their answers.

`rows` knows the format, `order` which row comes when, `output` what is kept and how it ends up in files, and `runner`
has the rows answered by whatever it is given. None of them knows a server, an engine or a command line.
"""
