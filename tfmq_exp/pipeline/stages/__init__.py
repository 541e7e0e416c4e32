"""The stages of an experiment, one file each."""
