"""Pretrained denoisers from the disk: original checkpoints and folders of diffusers' layout. Nothing is downloaded."""
