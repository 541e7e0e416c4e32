"""The Inception score (arXiv 1606.03498) by torchmetrics, in the two conventions that papers report: splits and order."""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.image.inception import InceptionScore

SPLITS, SEED = 10, 2020  # torch-fidelity's defaults


def inception_score(logits: Float[Tensor, "images classes"]) -> float:
    """Mean over 10 parts of all images in torch-fidelity's random order; a part's score is at most its number of images."""
    count = len(logits)
    if count < SPLITS:
        raise ValueError(f"an Inception score over {SPLITS} parts needs as many images, got {count}")
    shuffled = logits[torch.from_numpy(np.random.RandomState(SEED).permutation(count))]
    return _mean_score([shuffled[i * count // SPLITS : (i + 1) * count // SPLITS] for i in range(SPLITS)])


def inception_score_adm(logits: Float[Tensor, "images classes"], split: int = 5000) -> float:
    """Mean over parts of `split` images in the order given, the last may be shorter, as guided-diffusion's evaluator does.

    Files ordered by class get a score that is far too low.
    """
    return _mean_score(logits.split(split))


def _mean_score(parts: Sequence[Float[Tensor, "images classes"]]) -> float:
    """Mean of the parts' scores, in double precision; within a part order matters in the last bit only, and is fixed."""
    scores: list[float] = []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # torchmetrics shuffles, by the global generator
        warnings.simplefilter("ignore", UserWarning)  # that it keeps its features, and of one part's deviation
        torch.default_generator.manual_seed(SEED)
        for part in parts:
            metric = InceptionScore(feature=nn.Identity(), splits=1, sync_on_compute=False)
            metric.update(part.double())
            scores.append(float(metric.compute()[0]))
    return sum(scores) / len(scores)
