"""Quantization methods: records of choices, and the phases that they consist of."""
