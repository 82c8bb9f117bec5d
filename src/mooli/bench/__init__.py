"""Measuring a running server from outside: what is sent, when, what came back, and what that amounts to.

Works with any server that speaks one of the APIs in `backends`. Never looks into an engine of its own process.
"""
