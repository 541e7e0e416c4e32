"""Mirrors: dashboards that show what a run writes to its folder."""
