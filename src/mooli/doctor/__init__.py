"""`mooli doctor`: what this machine has, what is missing, and the exact cure.

A probe is a function from `Surroundings` to a `Section`; what it reads is parsed by pure functions, from text to
dataclasses. `examination` runs the probes, each on its own: a probe that fails becomes a finding. Foreign code
(torch, shared libraries, npu-smi) only ever runs in other processes with a time limit.
"""
