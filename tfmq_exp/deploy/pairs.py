"""Whether this processor adds pairs of byte products in sixteen bits."""

from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

from tfmq_exp.deploy.loader import settings


def pairs_saturate() -> bool:
    """Multiply the largest bytes and look: without VNNI instructions their sums stop at 2^15 - 1."""
    channels = 64
    x = ops.parameter([1, channels, 8, 8], np.float32)
    ends = [ops.constant(np.float32(end)) for end in (0, 255)]
    weight = ops.convert(ops.constant(np.full((channels, channels, 1, 1), 127, np.int8)), "f32")
    scaled = ops.multiply(weight, ops.constant(np.ones((channels, 1, 1, 1), np.float32)))
    y = ops.convolution(ops.fake_quantize(x, *ends, *ends, 256), scaled, [1, 1], [0, 0], [0, 0], [1, 1])
    model: Any = ov.Model([y], [x])  # pyright: ignore[reportGeneralTypeIssues]
    compiled = ov.Core().compile_model(model, "CPU", settings(1, "f32"))
    found = compiled([np.full((1, channels, 8, 8), 255, np.float32)])[0]
    return bool(np.abs(found - 255 * 127 * channels).max() > 1)
