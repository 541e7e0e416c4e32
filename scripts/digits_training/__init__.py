"""Losses, loops and exports of `train_digits.py`."""
