"""One script for each claim that the README makes; run them as `python -m benchmarks.NAME`."""
