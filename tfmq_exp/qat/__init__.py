"""Quantization-aware training: the denoiser's own training goes on, with quantizers in the network."""
