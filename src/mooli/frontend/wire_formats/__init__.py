"""How models write their messages: a declaration for each format, and which one a model has."""
