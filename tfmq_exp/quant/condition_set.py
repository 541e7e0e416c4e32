"""A finite set of conditions, and which of them a row of the batch has."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

SAME = 1e-4  # of its largest number, a condition may differ from that of the set: texts are encoded in other batches


class ConditionSet(nn.Module):
    """Conditions that temporal features are stored for: classes, pooled texts, guidance scales, each with that of no condition.

    Args:
        conditions: arguments of the network by name, a row for each condition; the rows of all names belong together.

    Raises:
        ValueError: no condition, or other numbers of rows.
    """

    def __init__(self, conditions: Mapping[str, Tensor]) -> None:
        super().__init__()
        if len({len(value) for value in conditions.values()} - {0}) != 1:
            raise ValueError(
                "a ConditionSet needs arguments with a row for each condition, as many rows for each argument"
            )
        self.names = tuple(conditions)
        for i, value in enumerate(conditions.values()):
            self.register_buffer(f"rows_{i}", value.detach().clone(), persistent=False)

    @property
    def rows(self) -> dict[str, Shaped[Tensor, "conditions ..."]]:
        """The conditions, by the names of their arguments."""
        return {name: self.get_buffer(f"rows_{i}") for i, name in enumerate(self.names)}

    def __len__(self) -> int:
        return len(self.get_buffer("rows_0"))

    def index(self, given: Mapping[str, Tensor]) -> Int[Tensor, "batch"]:
        """Place of each row's condition; waits for the device to look.

        Raises:
            ValueError: a condition that is not in the set, or an argument that is missing.
        """
        if lacking := [name for name in self.names if name not in given]:
            raise ValueError(
                f"temporal features are stored by timestep and {', '.join(self.names)}: {lacking[0]} is not given"
            )
        same = torch.stack([matches(given[name], rows) for name, rows in self.rows.items()]).all(dim=0)
        if bool((wrong := ~same.any(dim=1)).any()):
            first, said = int(wrong.nonzero()[0]), list[str]()
            for name in self.names:
                row = given[name][first].double().flatten()
                said.append(f"{name} {float(row[0]):.6g}" + (", ..." if len(row) > 1 else ""))
            raise ValueError(
                f"row {first} has a condition ({'; '.join(said)}) for which no temporal features are stored, but only for "
                f"{len(self)} of the run that made them: quantize with the conditions that are sampled, or compute the "
                "features (method/temporal=compute)"
            )
        return same.int().argmax(dim=1)


def matches(
    given: Shaped[Tensor, "batch ..."], rows: Shaped[Tensor, "conditions ..."]
) -> Bool[Tensor, "batch conditions"]:
    """Whether each row has each condition: whole numbers exactly, real ones within `SAME`."""
    if given.shape[1:] != rows.shape[1:]:
        raise ValueError(f"a condition of the shape {tuple(given.shape[1:])} is none of {tuple(rows.shape[1:])}")
    if not rows.is_floating_point():
        return (given.reshape(len(given), 1, -1) == rows.reshape(1, len(rows), -1)).all(dim=2)
    a, b = given.to(rows).reshape(len(given), -1), rows.reshape(len(rows), -1)
    return torch.cdist(a, b, p=float("inf")) <= SAME * b.abs().amax(dim=1)
