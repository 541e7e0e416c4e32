"""From a float UNet to a quantized one, and from there to a file of integers."""
