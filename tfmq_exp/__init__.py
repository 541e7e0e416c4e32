"""tfmq_exp: quantization of diffusion models, TFMQ-DM and what it is compared with, as software."""

__version__ = "0.1.0"
