"""The networks that are quantized, and their anatomy. Knows nothing of quantization."""
