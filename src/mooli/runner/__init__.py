"""Runners carry out a ScheduleBatch. They keep no request state and decide nothing."""
