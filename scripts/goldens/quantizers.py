"""All that the `quantizers` goldens hold, compared."""

from pathlib import Path

from goldens import grids, learning
from goldens.comparing import Group, coverage
from goldens.released import Goldens

CHECKS = (
    grids.scalers,
    grids.running,
    learning.adaround,
    learning.temperature,
    learning.loss,
    learning.recon,
    learning.time_embeddings,
    learning.tib,
    grids.split,
    grids.attention,
    grids.timesteps,
)


def check_quantizers(folder: Path) -> list[Group]:
    """Every comparison of a folder of the `quantizers` layout, and whether every tensor took part.

    Raises:
        DamagedError: something is missing or cannot be read.
    """
    goldens = Goldens.load(folder)
    groups = [group for check in CHECKS for group in check(goldens)]
    return [*groups, coverage("tensors read", set(goldens.tensors), goldens.tensors.read)]
