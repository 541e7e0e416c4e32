"""Rewriting a linear layer before it is quantized: balanced channels, and a branch of low rank beside it."""
