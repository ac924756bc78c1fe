"""Benchmarks: one case at a time, correct first, then timed against named baselines in the same process."""
