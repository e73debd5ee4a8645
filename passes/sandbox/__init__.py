"""Runs a user's code without leaving a trace: state, calls, sizes, randomness."""
