"""Families of denoisers: one file for each architecture of diffusers, with all that is particular to it."""
