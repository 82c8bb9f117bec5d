"""`mooli chat` and `mooli run`: a conversation in a terminal, with an engine in this process or a server's."""
