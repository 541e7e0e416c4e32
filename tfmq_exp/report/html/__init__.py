"""The HTML page of runs."""
