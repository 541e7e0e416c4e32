"""Quantizers, with an explicit mode."""
