"""Text, pages and pictures, all from plain data."""
