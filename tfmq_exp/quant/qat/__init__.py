"""Quant qat."""
