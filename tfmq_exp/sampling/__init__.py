"""Sampling: from noise to images, one random stream per image."""
