"""Evaluation features."""
