"""tfmq_exp: quantization of diffusion models, TFMQ-DM and what it is compared with, as software."""

from tfmq_exp.core.import_warnings import silence_import_warnings

__version__ = "0.1.0"

silence_import_warnings()  # before any module imports torch or diffusers
