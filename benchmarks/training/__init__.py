"""Training throughput of a language model of 100 million parameters: ``python -m benchmarks.training``."""
