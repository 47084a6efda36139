"""Whether a change costs time or memory: ``python -m benchmarks.guard before.whl after.whl --device cpu``."""
