"""The arguments that a pipeline gives its denoiser: conditions, constants, timesteps, and how guidance lays out the calls of one step."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from tfmq_exp.denoisers.denoiser import nested

Kind = Literal["given", "null"]
LENGTHS = ".lengths"  # ends the name of the rows' lengths of an argument that is a list of tensors


@dataclass(frozen=True)
class GuidanceLayout:
    """The network's results of one sampling step, and what the scheduler is given of them.

    Args:
        order: of the conditions: in one call the kinds of its equal parts of rows, else the kind of each call. `("given",)` is no
            guidance, or one that is a condition itself.
        calls: of the network in one step: 1, or one for each kind.
        weights: the scheduler is given the sum of the results times these, in `order`; None where it is no such sum, as with results
            that are normalised after guidance.
        scale: the scheduler is given this times the result, where all results are equal: -1 of a network that predicts the opposite;
            None where that is not so.
    """

    order: tuple[Kind, ...]
    calls: int
    weights: tuple[float, ...] | None
    scale: float | None


@dataclass(frozen=True)
class PipelineCalls:
    """Everything that a pipeline gives its denoiser and its scheduler for some prompts or classes.

    Args of the network have dotted names where they are nested: `added_cond_kwargs.time_ids`, `image_rotary_emb.0`.

    Args:
        sample: name of the argument that is denoised.
        timestep: name of the timestep's argument; every network takes one for each row.
        sample_shape: of one image, as the network takes it.
        given: one row for each image.
        null: one row for no condition, the other half of guidance; empty without it.
        constants: what all images share: tensors without rows, numbers, None.
        null_constants: those of `constants` that are others in the call with the null condition.
        lists: names of arguments that are lists with one entry for each row, and not one tensor. Their rows are padded with zeros
            at the end, and the lengths are a condition beside them.
        guidance: layout of the calls in one step.
        timesteps: that the network is given, of every call in order; floats are exact copies.
        timestep_dtype: of them, as torch calls it.
        set_timesteps: arguments of the scheduler's method.
        scheduler_timesteps: of every step that the scheduler lists; floats are exact copies.
        scheduler_sigmas: exact copies; empty where the scheduler has none.
    """

    sample: str
    timestep: str
    sample_shape: tuple[int, ...]
    given: Mapping[str, Tensor]
    null: Mapping[str, Tensor]
    constants: Mapping[str, Any]
    guidance: GuidanceLayout
    timesteps: tuple[int | float, ...]
    timestep_dtype: str
    set_timesteps: Mapping[str, Any]
    scheduler_timesteps: tuple[int | float, ...]
    scheduler_sigmas: tuple[float, ...]
    null_constants: Mapping[str, Any] = field(default_factory=dict)
    lists: frozenset[str] = frozenset()

    def arguments(
        self, sample: Tensor, timestep: Tensor, rows: Mapping[str, Tensor], *, null: bool = False
    ) -> dict[str, Any]:
        """Keyword arguments of one call of the network.

        Args:
            sample: [batch, *sample_shape].
            timestep: [batch].
            rows: conditions of each row of the batch, by the names of `given`.
            null: whether this is a call of its own for the null condition.
        """
        count, constants = len(sample), {**self.constants, **(self.null_constants if null else {})}
        flat = {self.sample: sample, self.timestep: timestep, **constants, **rows}
        for name in self.lists & flat.keys():
            value, lengths = flat[name], flat.pop(name + LENGTHS, None)
            if lengths is None:
                flat[name] = list(value.unbind()) if name == self.sample else [value] * count
            else:
                flat[name] = [row[:length] for row, length in zip(value, lengths.tolist(), strict=True)]
        return nested(flat)
