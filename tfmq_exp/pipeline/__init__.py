"""The run of an experiment: its stages, the store that keeps their results, and the pipeline that computes them."""
