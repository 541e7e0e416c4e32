"""A partition of one unit, for `debug=overfit`."""

from collections.abc import Callable
from dataclasses import dataclass

from tfmq_exp.denoisers.structure import UNetStructure
from tfmq_exp.reconstruction.units import Unit


@dataclass(frozen=True)
class SingleUnit:
    """One unit of a partition; all other layers stay float. For `until=weights`: such a network is not finished.

    Args:
        partition: cuts the network into units.
        unit: name of the one; None: the one with the most layers, the first of them.
    """

    partition: Callable[[UNetStructure, frozenset[str]], list[Unit]]
    unit: str | None = None

    def __call__(self, structure: UNetStructure, learnable: frozenset[str]) -> list[Unit]:
        """The unit by itself.

        Raises:
            ValueError: there is none of that name.
        """
        units = self.partition(structure, learnable)
        if self.unit is None:
            return [max(units, key=lambda unit: len(unit.layers))]
        chosen = [unit for unit in units if unit.name == self.unit]
        if not chosen:
            raise ValueError(f"unit must be one of {', '.join(unit.name for unit in units)}, got {self.unit!r}")
        return chosen
