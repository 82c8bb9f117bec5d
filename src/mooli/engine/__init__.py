"""The engine: one loop of schedule, execute, update, what builds it, and the processes it may be in."""
