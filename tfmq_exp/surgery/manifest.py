"""The manifest of a stored model: everything but its numbers, as plain data, and comparison with one that was read."""

import dataclasses
import inspect
import json
from typing import Any

from torch import Tensor

from tfmq_exp.denoisers.unet import attentions
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.surgery.quantized_unet import QuantizedUNet
from tfmq_exp.surgery.resolve import resolved_to_json
from tfmq_exp.surgery.temporal_cache import Unneeded

# network, its configuration, what is quantized, shapes of the integers, numbers of heads, and how the model is sampled
ENTRIES = frozenset({"network", "config", "plan", "shapes", "cached", "unneeded", "heads", "recipe"})
SOMETIMES = frozenset({"outside"})


def stored_integers(model: QuantizedUNet) -> dict[str, QuantizedWeight]:
    """All integer tensors by their names in the file: weights part by part, and cached temporal features."""
    weights = {f"weights/{layer}/{i}": part for layer, parts in model.integers.items() for i, part in enumerate(parts)}
    return weights | {f"cached/{layer}": integers for layer, integers in model.cached.items()}


def inside(zero_point: Tensor, spec: QuantSpec) -> bool:
    """Whether every zero point is an integer of the grid."""
    return bool(((zero_point >= spec.qmin) & (zero_point <= spec.qmax)).all())


def described(model: QuantizedUNet) -> dict[str, Any]:
    """The manifest of a model, without its recipe."""
    known = inspect.signature(type(model.unet).__init__).parameters
    integers = stored_integers(model)
    outside = [name for name, part in integers.items() if not inside(part.qparams.zero_point, part.spec)]
    manifest = {
        "network": type(model.unet).__name__,
        "config": {k: v for k, v in dict(model.unet.config).items() if k in known},
        "plan": resolved_to_json(model.plan),
        "shapes": {name: list(part.codes.shape) for name, part in integers.items()},
        "cached": {layer: dataclasses.asdict(integers.spec) for layer, integers in model.cached.items()},
        "unneeded": [name for name, module in model.unet.named_modules() if isinstance(module, Unneeded)],
        # not always what the configuration says: the original networks have one number of heads at every width
        "heads": {name: module.heads for name, module in attentions(model.unet).items()},
    }
    # ranges that do not contain zero, as in releases: no engine can execute them, so others may not have them unsaid
    return json.loads(json.dumps(manifest | ({"outside": outside} if outside else {})))


def check_entries(manifest: Any) -> None:
    """ValueError for anything but the entries of a manifest; their content is compared with that of the model later."""
    if type(manifest) is not dict:
        raise ValueError(f"its manifest must be entries with values, got a {type(manifest).__name__}")
    if lacking := ENTRIES - manifest.keys():
        raise ValueError(f"its manifest lacks {min(lacking)!r}")
    if unknown := manifest.keys() - ENTRIES - SOMETIMES:
        raise ValueError(f"its manifest has an unknown entry {min(unknown)[:50]!r}")


def difference(given: Any, written: Any, place: str = "") -> str | None:
    """The place where plain data that was read differs from what the model made of it would write; None if nowhere.

    An entry without a reader, a default, or a number that was taken for another one would otherwise pass.
    """
    if type(given) is not type(written):
        return f"{place or 'all'} is {str(given)[:50]!r} instead of {str(written)[:50]!r}"
    if isinstance(given, dict):
        if unknown := given.keys() - written.keys():
            return f"{place}.{min(unknown)} is unknown".removeprefix(".")
        if lacking := written.keys() - given.keys():
            return f"{place}.{min(lacking)} is missing".removeprefix(".")
        found = (difference(given[key], written[key], f"{place}.{key}".removeprefix(".")) for key in given)
    elif isinstance(given, list) and len(given) == len(written):
        found = (difference(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(given, written, strict=True)))
    else:
        return None if given == written else f"{place} is {str(given)[:50]!r} instead of {str(written)[:50]!r}"
    return next((wrong for wrong in found if wrong), None)
