"""Runtimes that execute a compact network, behind one interface."""
