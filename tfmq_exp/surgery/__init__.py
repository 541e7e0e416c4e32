"""Conversion of a float network to a quantized one, and of that to a file of integers."""
