"""Decoding after a long history: a state of slots against a cache of all keys and values."""
