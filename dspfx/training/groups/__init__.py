"""Learns groups of filters: the method of the paper."""
