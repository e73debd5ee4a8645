"""Prepared, compact and narrow modules, and their present state."""
