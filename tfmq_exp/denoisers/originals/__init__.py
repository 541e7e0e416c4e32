"""Checkpoints of original programs: LDM, Stable Diffusion, DDIM, DiT."""
