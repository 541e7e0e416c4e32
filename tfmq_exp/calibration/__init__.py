"""Calibration data, taken from trajectories of the float model."""
