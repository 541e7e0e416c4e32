"""The Inception score (arXiv 1606.03498) in the two conventions that papers report: they differ in splits and order."""

import math

from jaxtyping import Float
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

SPLITS, SEED = 10, 2020  # torch-fidelity's defaults
ADM_SPLIT = 5000  # guided-diffusion's evaluator


def inception_score(logits: Float[Tensor, "images classes"]) -> float:
    """Mean over 10 parts of all images in torch-fidelity's own random order; nan for fewer images than parts."""
    if len(logits) < SPLITS:
        return math.nan
    return isc_features_to_metric(logits, SPLITS, True, SEED)[KEY_METRIC_ISC_MEAN]


def inception_score_adm(logits: Float[Tensor, "images classes"]) -> float:
    """Mean over parts of 5000 images in the order given, the last may be shorter, as guided-diffusion's evaluator does.

    Files ordered by class get a score that is far too low.
    """
    parts = logits.split(ADM_SPLIT)
    return sum(isc_features_to_metric(part, 1, False)[KEY_METRIC_ISC_MEAN] for part in parts) / len(parts)
