"""Trajectories: from noise to images, one seed per image."""
