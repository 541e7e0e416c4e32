"""All that the `transformers` goldens hold, compared, part by part."""

from collections.abc import Callable
from pathlib import Path

from goldens.comparing import DamagedError, Group
from goldens.dit import check_dit
from goldens.edm import check_edm
from goldens.flow import check_flow
from goldens.pipelines import check_pipelines
from goldens.temporal import check_temporal
from goldens.transformer_quantizers import check_transformer_quantizers

PARTS: dict[str, Callable[[Path], list[Group]]] = {
    "flow": check_flow,
    "edm": check_edm,
    "temporal": check_temporal,
    "dit": check_dit,
    "pipelines": check_pipelines,
    "quantizers": check_transformer_quantizers,
}  # by the names of their folders


def check_transformers(folder: Path) -> list[Group]:
    """Every comparison of the parts that a folder has.

    Raises:
        DamagedError: no part is there, or something in one is missing or cannot be read.
    """
    found = {name: check for name, check in PARTS.items() if (folder / name).is_dir()}
    if not found:
        raise DamagedError(f"{folder} has no folder {', '.join(PARTS)}")
    return [group for name, check in found.items() for group in check(folder / name)]
