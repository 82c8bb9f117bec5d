"""Several engines on the same work, in turns, on one machine. `benchmarks/compare.py` is its command."""
