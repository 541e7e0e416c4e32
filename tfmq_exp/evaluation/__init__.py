"""Scores of images, and errors of a quantized network against its float one."""
