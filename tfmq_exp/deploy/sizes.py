"""Bytes of an exported model by kind of constant."""

from typing import Any

import numpy as np

BITS = {"u4": 4, "i4": 4, "i8": 8, "u8": 8, "f32": 32, "i32": 32, "i64": 64, "f16": 16, "boolean": 8}


def stored_bytes(model: Any) -> dict[str, int]:
    """Bytes of an OpenVINO model's constants by element type, the largest share first."""
    found: dict[str, int] = {}
    for op in model.get_ordered_ops():
        if op.get_type_name() == "Constant":
            kind = op.get_output_element_type(0).get_type_name()
            size = int(np.prod(op.get_output_shape(0), dtype=np.int64)) * BITS[kind]
            found[kind] = found.get(kind, 0) + -(-size // 8)
    return dict(sorted(found.items(), key=lambda item: -item[1]))
