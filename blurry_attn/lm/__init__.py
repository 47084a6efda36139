"""A small byte-level language model on blurry window attention: ``python -m blurry_attn.lm train``."""
