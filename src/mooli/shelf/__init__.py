"""`mooli list`, `show`, `rm`, `ps`, `stop` and `completion`: the models and the servers of this machine."""
