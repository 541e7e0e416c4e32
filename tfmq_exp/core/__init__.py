"""Infrastructure for every package: files, validation of values, formatting."""
