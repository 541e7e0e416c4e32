"""Diagnosis of quantization errors: shifted features, ranges that do not fit, sensitive units."""
