"""Comparisons with numbers that the original programs made; `check_goldens.py` runs them."""
