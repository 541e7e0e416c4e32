"""Quant scales."""
