"""The stages of an experiment, by subject."""
