"""Modules that end up in a user's network, and their kernels."""
