"""Learning the rounding of weights, one unit at a time (BRECQ, arXiv 2102.05426)."""
