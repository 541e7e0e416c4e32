"""Comparisons with numbers that the original programs made; `check_goldens.py` runs them."""

import tfmq_exp  # noqa: F401 - before diffusers, whose warnings about other packages it drops
