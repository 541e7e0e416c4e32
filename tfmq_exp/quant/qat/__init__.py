"""Quantizer functions of quantization-aware training."""
