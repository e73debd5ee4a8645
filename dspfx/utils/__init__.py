"""Knows no model: typed JSON, formatting, timing, processes, trees, caches."""
