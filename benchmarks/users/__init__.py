"""Models of libraries that dspfx does not know, in files that list them as they are imported."""
