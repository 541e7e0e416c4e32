"""Class labels as conditions (LDM's ClassEmbedder)."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.denoisers.denoiser import Conditions


class ClassEmbedder:
    """One learned vector for each class, as a sequence of length one for cross-attention.

    Args:
        embedding: the vectors; the last is that of no class (1000 of the 1001 that LDM's ImageNet model has).
    """

    def __init__(self, embedding: Float[Tensor, "classes channels"]) -> None:
        self.embedding = embedding

    def __call__(self, choices: Sequence[Any]) -> Conditions:
        """Conditions of these labels; ValueError for no label, or one that is no class."""
        count = len(self.embedding) - 1
        wrong = [label for label in choices if type(label) is not int or not 0 <= label < count]
        if wrong or not choices:
            given = f"got {wrong[0]!r}" if wrong else "got none"
            raise ValueError(f"this network is conditioned on a class for each image, 0 .. {count - 1}: {given}")
        given, null = self.embedding[list(choices)], self.embedding[-1:]
        return Conditions({"encoder_hidden_states": given[:, None]}, {"encoder_hidden_states": null[:, None]})

    def example(self) -> Conditions:
        return self([0])

    def to(self, device: torch.device) -> None:
        self.embedding = self.embedding.to(device)
