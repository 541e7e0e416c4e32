"""Outputs of a run in its folder, on the terminal and on the dashboard."""
