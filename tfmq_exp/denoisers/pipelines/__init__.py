"""Whole pipelines of diffusers: read from their folders, and what they give their denoisers."""
