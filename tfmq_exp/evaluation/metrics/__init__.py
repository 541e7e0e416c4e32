"""Metrics of features."""
