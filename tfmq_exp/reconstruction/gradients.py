"""Gradients of a batch that is computed in parts, by one process or several."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tfmq_exp.core.distributed import ProcessGroup, add_up


def set_gradients(
    parameters: Sequence[nn.Parameter], parts: int, processes: ProcessGroup, part: Callable[[int], Sequence[Tensor]]
) -> Tensor:
    """Add up the gradients of the parts, in their order whoever has computed them, and leave them with the parameters.

    Args:
        parameters: all that are learned.
        parts: of the batch, none of them empty.
        processes: who share the parts.
        part: for the number of one, the gradient of every parameter and, last, its share of the error.

    Returns:
        The error of the batch, without gradient.
    """
    vectors: list[Tensor] = []
    for number in processes.shard(range(parts)):
        vectors.append(flat(part(number)))
        if processes.world_size == 1:
            vectors = [add_up(vectors)]  # the sum in the same order, without keeping its terms
    sizes = [parameter.numel() for parameter in parameters]
    nothing = torch.zeros(sum(sizes) + 1, device=parameters[0].device)
    total = processes.ordered_all_reduce(vectors or [nothing], parts=parts if processes.world_size > 1 else 1)
    for parameter, gradient in zip(parameters, total.split([*sizes, 1]), strict=False):
        parameter.grad = gradient.view_as(parameter)
    return total[-1]


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of them all."""
    return torch.cat([x.flatten() for x in tensors])
