"""The arithmetic of quantization. Needs torch alone and knows nothing of diffusion models."""
