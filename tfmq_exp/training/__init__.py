"""Training a quantized network on images, all of it at once (quantization-aware training; TDQ, arXiv 2306.02316)."""
