"""Forms that are left once training is over, as plain data."""

from collections.abc import Mapping
from typing import Any

from tfmq_exp.quant.qat.base import QATQuantizeFn
from tfmq_exp.quant.qat.duq import Duq
from tfmq_exp.quant.qat.lsq import Lsq
from tfmq_exp.quant.qat.qil import Qil

KINDS: Mapping[str, type[Lsq | Duq | Qil]] = {"lsq": Lsq, "duq": Duq, "qil": Qil}


def form_to_json(form: QATQuantizeFn) -> dict[str, Any]:
    """What a stored model needs to know of a settled form; TypeError for one that still trains."""
    for kind, cls in KINDS.items():
        if type(form) is cls and form == cls(form.levels):
            return {"kind": kind, "levels": form.levels}
    raise TypeError(f"{form} must be settled before it is stored")


def form_from_json(data: Mapping[str, Any]) -> QATQuantizeFn:
    """The inverse of `form_to_json`; ValueError for an unknown kind."""
    if data["kind"] not in KINDS:
        raise ValueError(f"unknown kind of form {data['kind']!r}; known: {', '.join(KINDS)}")
    return KINDS[data["kind"]](levels=data["levels"])
