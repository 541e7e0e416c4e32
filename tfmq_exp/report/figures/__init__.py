"""Figures of runs, drawn by matplotlib without a display."""

import matplotlib

matplotlib.use("Agg")
