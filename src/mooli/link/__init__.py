"""The ways to an engine: on a thread of this process, or in a process of its own."""
