"""Repair after pruning, in closed form: which layers, from which runs, by which sums."""
