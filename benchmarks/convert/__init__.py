"""What a model trained with full attention loses when it is switched to a blurry window, and wins back by training."""
