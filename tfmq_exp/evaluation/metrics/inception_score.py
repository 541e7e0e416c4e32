"""The Inception score (arXiv 1606.03498) by torchmetrics, in the two conventions that papers report: splits and order."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore

SPLITS, SEED = 10, 2020  # torch-fidelity's defaults
ADM_SPLIT = 5000  # guided-diffusion's evaluator


class Given(nn.Module):
    """Stands where torchmetrics expects a network: the logits are there already."""

    def forward(self, logits: Tensor) -> Tensor:
        """As they are."""
        return logits


def mean_over(parts: Sequence[Float[Tensor, "images classes"]]) -> float:
    """Mean of the scores of parts, each in double precision; within a part order matters in the last bit only, and is fixed."""
    found: list[float] = []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # torchmetrics shuffles, by the global generator
        warnings.simplefilter("ignore", UserWarning)  # that it keeps what it is given, and of one part's deviation
        torch.default_generator.manual_seed(SEED)
        for part in parts:
            score = InceptionScore(feature=Given(), splits=1, sync_on_compute=False)
            score.update(part.double())
            found.append(float(score.compute()[0]))
    return sum(found) / len(found)


def inception_score(logits: Float[Tensor, "images classes"]) -> float:
    """Mean over 10 parts of all images in torch-fidelity's own random order.

    The score of a part is at most the number of its images.

    Raises:
        ValueError: fewer images than parts.
    """
    count = len(logits)
    if count < SPLITS:
        raise ValueError(f"an Inception score over {SPLITS} parts needs as many images, got {count}")
    shuffled = logits[torch.from_numpy(np.random.RandomState(SEED).permutation(count))]
    return mean_over([shuffled[i * count // SPLITS : (i + 1) * count // SPLITS] for i in range(SPLITS)])


def inception_score_adm(logits: Float[Tensor, "images classes"]) -> float:
    """Mean over parts of 5000 images in the order given, the last may be shorter, as guided-diffusion's evaluator does.

    Files ordered by class get a score that is far too low.
    """
    return mean_over(logits.split(ADM_SPLIT))
