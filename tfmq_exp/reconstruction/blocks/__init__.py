"""Reconstruction block by block, where a network's blocks form chains: two streams of activations, weights loaded as they are needed."""
