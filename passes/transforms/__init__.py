"""Plans and emits the compact graph, and verifies it."""
