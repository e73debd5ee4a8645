"""What a graph does to channels."""
