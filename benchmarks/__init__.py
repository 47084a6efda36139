"""Benchmarks: one folder each, one command each (``python -m benchmarks.NAME``), results as JSON and a plot."""
