"""Quantizers: a spec, a source and a rounding, with an explicit mode."""
