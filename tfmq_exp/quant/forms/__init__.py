"""Quantizers of quantization-aware training: what each makes of a value and its step, and with which gradients."""
