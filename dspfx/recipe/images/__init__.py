"""Images of folders and data sets."""
