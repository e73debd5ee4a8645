"""From a compact module to one whose layers compute with integers of 8 bits."""
