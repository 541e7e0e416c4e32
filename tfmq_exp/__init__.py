"""tfmq_exp: quantization of diffusion models, TFMQ-DM and what it is compared with, as software.

import tfmq_exp

model = tfmq_exp.quantize(tfmq_exp.load_denoiser("digits"), method="tfmq", bits="w4a8")
images = tfmq_exp.sample(model, range(16), seed=0)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tfmq_exp.core.import_warnings import silence_import_warnings

if TYPE_CHECKING:
    from tfmq_exp.api import QuantizedModel, load_denoiser, load_quantized, quantize, sample, with_components
    from tfmq_exp.surgery.config import QuantizationConfig

__version__ = "0.1.0"
__all__ = [
    "QuantizationConfig",
    "QuantizedModel",
    "load_denoiser",
    "load_quantized",
    "quantize",
    "sample",
    "with_components",
]

silence_import_warnings()  # before any module imports torch or diffusers


def __getattr__(name: str) -> Any:
    """Import the library when it is used: `python run.py --help` does without torch."""
    if name in __all__:
        return getattr(import_module("tfmq_exp.api"), name)
    raise AttributeError(f"module 'tfmq_exp' has no attribute {name!r}")
