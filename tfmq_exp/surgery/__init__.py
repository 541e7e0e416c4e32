"""Conversion of a float UNet to a quantized one, and of that to a file of integers."""
