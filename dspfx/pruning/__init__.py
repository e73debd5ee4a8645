"""Which masks."""
