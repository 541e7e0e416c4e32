"""Gradients of a batch, added up over its microbatches by one process or several."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tfmq_exp.core.distributed import ProcessGroup, ordered_sum


def set_gradients(
    parameters: Sequence[nn.Parameter], count: int, processes: ProcessGroup, compute: Callable[[int], Sequence[Tensor]]
) -> Tensor:
    """Set `.grad` of the parameters to the sum over all microbatches, in their order for any number of processes.

    Args:
        parameters: all that are learned.
        count: number of microbatches, none of them empty.
        processes: ranks that share the microbatches.
        compute: index of a microbatch -> gradient of every parameter and, last, its share of the loss.

    Returns:
        The loss of the batch, without gradient.
    """
    vectors: list[Tensor] = []
    for index in processes.shard(range(count)):
        vectors.append(concatenated(compute(index)))
        if processes.world_size == 1:
            vectors = [ordered_sum(vectors)]  # the sum in the same order, without keeping its terms
    sizes = [parameter.numel() for parameter in parameters]
    no_share = torch.zeros(sum(sizes) + 1, device=parameters[0].device)
    total = processes.ordered_all_reduce(vectors or [no_share], count if processes.world_size > 1 else 1)
    for parameter, gradient in zip(parameters, total.split([*sizes, 1]), strict=False):
        parameter.grad = gradient.view_as(parameter)
    return total[-1]


def concatenated(tensors: Sequence[Tensor]) -> Tensor:
    """All elements as one vector."""
    return torch.cat([x.flatten() for x in tensors])
