"""From a module to a gated fx graph."""
