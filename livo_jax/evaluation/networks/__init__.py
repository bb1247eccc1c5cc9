"""Networks that images are measured with."""
